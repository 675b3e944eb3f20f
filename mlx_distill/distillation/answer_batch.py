"""Answers to many prompts in one batch, whose rows begin anew when their answers have ended.

    row 0   a a a a a a . . e e e     answer a has ended; its row waits until more have,
    row 1   b b b b b b b . f f f     then new prompts are read together and take their places
    row 2   c c c c c c c c c c c

Changing rows copies the caches, which is why they wait. The host is a token behind the device, and
reads one array per step. What is drawn for an answer follows from its seed and the place in the
answer alone. A model that says something else of texts together than of each alone writes them one
by one.
"""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, UInt
from mlx import nn

from mlx_distill.target.batch.merged import read_alone, read_merged, takes_merged

_SAID = "_mlx_distill_said_alone"
CHANGED_SHARE = 8  # rows are changed when one of so many has ended


@dataclass(frozen=True)
class Wanted:
    """An answer to write.

    Args:
        prompt: Token ids, at least one.
        most: The longest answer, in tokens, at least one.
        temperature: At which it is drawn; 0 is greedy.
        seed: Of what is drawn; below 2 ** 32.
    """

    prompt: Sequence[int]
    most: int
    temperature: float
    seed: int


def written(
    model: nn.Module, wanted: Sequence[Wanted], ends: set[int], rows: int, limit: int | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Yield answers as they end, each behind the number of what was wanted.

    Args:
        model: A language model.
        wanted: Those with prompts of similar length are best beside each other.
        ends: Tokens that end an answer, and belong to it.
        rows: How many answers are written at once, if the model takes several texts.
        limit: The longest text that the model can be given, in tokens.
    """
    rows = rows if rows == 1 or _takes_several(model) else 1
    waiting = deque(range(len(wanted)))
    batch = _Batch(model, wanted, ends, limit, several=rows > 1)
    while waiting or batch.num_alive:
        if batch.is_due(rows, bool(waiting)):
            free = min(rows - batch.num_alive, len(waiting))
            batch.change([waiting.popleft() for _ in range(free)])
        yield from batch.step()


def _takes_several(model: nn.Module) -> bool:
    """Return whether a model takes several texts; if it does not, that is said once."""
    takes = takes_merged(model)
    if not takes and _SAID not in model.__dict__:
        object.__setattr__(model, _SAID, True)
        why = "in a batch the model does not say what it says of a text alone"
        print(f"mlx_distill: answers are written one by one: {why}", file=sys.stderr)
    return takes


class _Batch:
    """Rows of answers, with the model's caches of them.

    A row of tokens begins with the prompt's last one; ``counts`` says how many of a row the host
    has seen. The next one of every row is in ``inputs``.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Sequence[Wanted],
        ends: set[int],
        limit: int | None,
        several: bool,
    ):
        self.model = model
        self.several = several
        self.wanted = wanted
        self.ends = np.array(sorted(ends), np.int64)
        self.limit = limit
        self.caches: list[Any] = []
        self.inputs: mx.array = mx.zeros((0,), mx.uint32)
        self.places = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)
        self.alive = np.zeros(0, bool)
        self.tokens = np.zeros((0, 1 + max((one.most for one in wanted), default=0)), np.int64)
        self.is_full = False  # the model must not be given more of some row
        self.draws = _Draws([], self.counts)

    @property
    def num_alive(self) -> int:
        """How many rows have not ended."""
        return int(self.alive.sum())

    def is_due(self, rows: int, more: bool) -> bool:
        """Return whether rows that have ended should go, and others begin if there are more."""
        if self.is_full or not self.num_alive:
            return True
        if more:
            return (rows - self.num_alive) * CHANGED_SHARE >= rows
        return 2 * self.num_alive <= len(self.alive)

    def change(self, new: list[int]) -> None:
        """Let go of the rows that have ended; begin new ones."""
        keep, inputs = np.flatnonzero(self.alive), []
        if keep.size < len(self.alive):
            self.caches = _filtered(self.caches, keep)
        if keep.size:
            inputs.append(self.inputs[mx.array(keep)])
        if new:
            prompts = [self.wanted[place].prompt for place in new]
            inputs.append(mx.array([prompt[-1] for prompt in prompts], mx.uint32))
            read = read_merged if self.several else read_alone
            self.caches = _joined(self.caches, read(self.model, prompts))
        self.inputs = mx.concatenate(inputs)
        self.tokens = np.pad(self.tokens[keep], ((0, len(new)), (0, 0)))
        self.counts = np.pad(self.counts[keep], (0, len(new)))
        self.places = np.append(self.places[keep], np.array(new, np.int64))
        self.alive = np.ones(len(self.places), bool)
        self.is_full = False
        self.draws = _Draws([self.wanted[place] for place in self.places.tolist()], self.counts)
        if mx.get_cache_memory() > 2 * sum(cache.nbytes for cache in self.caches):
            mx.clear_cache()  # buffers of other widths pile up

    def step(self) -> Iterator[tuple[int, list[int]]]:
        """Send a step to the device; yield the answers that the tokens before it have ended."""
        before = self.inputs
        logits = self.model(before[:, None], cache=self.caches)[:, -1]
        self.inputs = self.draws.next(logits)
        mx.async_eval(self.inputs)
        tokens = np.array(before)  # waits for the step before this one
        rows = np.flatnonzero(self.alive)
        self.tokens[rows, self.counts[rows]] = tokens[rows]
        self.counts[rows] += 1
        for row in rows[self._ended(rows, tokens[rows])].tolist():
            self.alive[row] = False
            place = int(self.places[row])
            answer = self.tokens[row, 1 : self.counts[row]].tolist()
            length = len(self.wanted[place].prompt) + len(answer)
            self.is_full |= self.limit is not None and length >= self.limit
            yield place, answer

    def _ended(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return which of some rows end with their last tokens."""
        lengths = self.counts[rows] - 1
        most = np.array([self.wanted[place].most for place in self.places[rows].tolist()], np.int64)
        return (lengths >= most) | ((lengths > 0) & np.isin(tokens, self.ends))


class _Draws:
    """Draws the next tokens of rows.

    Args:
        wanted: Of every row.
        counts: How many tokens of every answer have been drawn.
    """

    def __init__(self, wanted: Sequence[Wanted], counts: np.ndarray):
        drawn = [row for row, one in enumerate(wanted) if one.temperature > 0]
        self._rows = mx.array(drawn, mx.int32)
        self._temperatures = mx.array([[wanted[row].temperature] for row in drawn], mx.float32)
        keys = [[wanted[row].seed, int(counts[row])] for row in drawn]
        self._keys = mx.array(keys, mx.uint32)

    def next(self, logits: Float[mx.array, "B V"]) -> UInt[mx.array, " B"]:
        """Return a token for every row."""
        if self._rows.size:
            shape = logits.shape[-1:]
            noise = mx.vmap(lambda key: mx.random.gumbel(shape, key=key))(self._keys)
            # The largest of logits / temperature + noise, as that of all that times temperature.
            logits = logits.astype(mx.float32).at[self._rows].add(self._temperatures * noise)
            self._keys = self._keys + mx.array([0, 1], mx.uint32)
        return mx.argmax(logits, axis=-1)


def _filtered(caches: list[Any], rows: np.ndarray) -> list[Any]:
    """Return caches of some rows; one layer at a time is there twice."""
    if not rows.size:
        return []
    for cache in caches:
        cache.filter(mx.array(rows))
        mx.eval(cache.state)
    return caches


def _joined(caches: list[Any], more: list[Any]) -> list[Any]:
    """Return caches of the rows of both; one layer at a time is there twice."""
    if not caches:
        return more
    for cache, new in zip(caches, more, strict=True):
        cache.extend(new)
        mx.eval(cache.state)
    return caches
