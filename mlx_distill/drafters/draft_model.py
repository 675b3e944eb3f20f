"""A second model that drafts: any model of mlx-lm with the target's tokenizer.

Its cache runs ahead of the text by what it drafted, and goes back to what was accepted:

    cache    text ... | root  d1  d2           accepted: root d1, drawn: x
             text ...   root  d1 |             then it reads x, and drafts behind it

Chains are drafted token by token. Trees are drafted by a beam search whose every level is one call
on all nodes so far; of those nothing is kept.

A chain may be drawn from the draft model's own law, with random numbers of its own, for block
verification. Else random numbers are in sight, as for every drafter: at each place the draft is the
best of the draft model's logits plus the very noise that the target's token will be drawn with,
which agrees as often as such a coupling of the two laws can be expected to, and more often than two
independent draws.

Source:
    Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318; Daliri, Musco and
    Suresh 2024, arXiv:2408.07978 (the coupling).
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace

import mlx.core as mx
from jaxtyping import Float, Int, Integer
from mlx import nn
from mlx_lm.models.cache import ChunkedKVCache, trim_prompt_cache

from mlx_distill.arrays import log_probs, num_bytes, to_host
from mlx_distill.core.beam_search import beam_search
from mlx_distill.core.draft import Draft
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.sampling import Sampling, shaped_fast
from mlx_distill.drafters.protocol import DraftPlan, Features
from mlx_distill.errors import InputError
from mlx_distill.limits import Count, check_value, plain
from mlx_distill.target.context import position_limit
from mlx_distill.target.layer_cache import LayerCache, cached_tokens, leaves
from mlx_distill.target.prompt_cache import prompt_caches
from mlx_distill.target.reading import vocab_width
from mlx_distill.target.restoring import RestorePoint, even_out
from mlx_distill.target.target import Target
from mlx_distill.target.tree_cache import can_trim

READ_AT_ONCE = 2048  # tokens of a text that was not read yet


class DraftModelDrafter:
    """A ``Drafter`` that is a whole model.

    Args:
        model: Drafts. Heads of different widths are taken to be padded: what only one of the two
            models has is never drafted.
        vocab_size: Number of the target's logits.
        max_kv_size: Longest context that its caches keep, in tokens; None for all.
        caches: Hold the text before the next prompt; None where there is none.
        law: How tokens are drawn from the draft model's own logits; they are chains then. None
            drafts in sight of the text's noise.

    Raises:
        InputError: If the model is none, or a number is out of its range.

    Attributes:
        config: Tells it from other draft models, for what is measured of a pair.
        positions: How many the model has a learned row for; None where it computes them. Behind
            them nothing is drafted.
    """

    taps: tuple[int, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        vocab_size: int,
        max_kv_size: int | None = None,
        caches: list[LayerCache] | None = None,
        law: Sampling | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise InputError(f"a draft model must be a network, as load returns, got {model!r:.40}")
        vocab_size, max_kv_size = plain(vocab_size), plain(max_kv_size)
        check_value("vocab_size", vocab_size, Count)
        check_value("max_kv_size", max_kv_size, int | None)
        self.model = model
        self.law = law
        self.vocab_size = vocab_size
        self.max_kv_size = max_kv_size
        self.caches = caches
        self.num_rows = vocab_width(model)
        self.positions = position_limit(model)
        self.shared_vocab = min(vocab_size, self.num_rows)
        kind = getattr(model, "model_type", type(model).__name__)
        self.config = f"{kind} of {num_bytes(model.parameters())} bytes"

    def open(self, prompt: Int[mx.array, " T"], features: Features) -> "DraftModelState":
        """Return the state of a text; the prompt is read when something is drafted."""
        caches = self.new_caches() if self.caches is None else self.caches
        return DraftModelState(self, caches, to_host(prompt))

    def new_caches(self) -> list[LayerCache]:
        """Return empty caches."""
        return prompt_caches(self.model, self.max_kv_size)

    def opened(self) -> Target:
        """Return the draft model as one that trees can be put to."""
        return Target.of(self.model)


class DraftModelState:
    """A text, as a draft model knows it.

    Args:
        drafter: The model.
        caches: Of its layers; they hold what comes before the prompt.
        prompt: What the text begins with.
    """

    def __init__(self, drafter: DraftModelDrafter, caches: list[LayerCache], prompt: list[int]):
        self.drafter = drafter
        self.caches = caches
        self.text = prompt
        self.num_read = 0  # tokens of the text that the caches hold
        self._line: list[mx.array] = []  # a root and drafted tokens, which they hold behind that
        self._waiting: list[mx.array] = []
        # Chunks drop their front when more is read, which may be text again behind a draft.
        chunks = any(isinstance(cache, ChunkedKVCache) for cache in leaves(caches))
        self._trims = all(map(can_trim, caches)) and not chunks
        self._opened = RestorePoint(caches)
        # Before and behind the latest root, for caches that cannot drop single tokens.
        self._points = (self._opened, 0), self._opened

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft | None:
        """Return the likeliest continuations of the root, by the draft model; none at its end."""
        self._take_in()
        if self.drafter.positions is not None:
            # The root is read, and all of the draft but its last token.
            known = cached_tokens(self.caches) + len(self.text) - self.num_read
            room = self.drafter.positions - known
            if room < 1:
                return None
            plan = replace(plan, draft_length=min(plan.draft_length, room))
        logits = self._read_root(root)
        if (
            plan.beam_width > 1
            and self.drafter.law is None
            and self._trims
            and self.drafter.opened().support in ("row", "batch")
        ):
            return self._beams(root, logits, plan, noise)
        return self._chain(root, logits, plan.draft_length, noise)

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Take note of what became text; the caches go there when the next draft is made."""
        self._waiting.append(tokens)

    def rewind(self, num_tokens: int) -> None:
        """Forget the last tokens of the text."""
        self._take_in()
        del self.text[len(self.text) - num_tokens :]
        beyond = self.num_read - len(self.text)
        if beyond > 0 and self._trims:
            trim_prompt_cache(self.caches, beyond)
            self.num_read -= beyond
        elif beyond > 0:
            self._opened.restore(self.caches)
            self.num_read = 0

    def hold(self, text: list[int]) -> None:
        """Let the caches hold exactly a text that begins with the prompt, or nothing of it.

        It may be repeated, and come after an interrupt: which layers have read more does not count.
        """
        kept = _num_equal(self.text[: self.num_read], text)
        point = RestorePoint(())
        if self._trims:
            point.states = [_behind(state, kept) for state in self._opened.states]
        else:
            point, num_read = self._points[0]
            if num_read > kept:
                point, num_read = self._opened, 0
            kept = num_read
        point.restore(self.caches)
        for cache in self.caches:
            even_out(cache)
        self._read(text[kept:])

    def _take_in(self) -> None:
        """Let the caches hold nothing but text; this waits for the target."""
        for tokens in self._waiting:
            self.text += [token for token in to_host(tokens) if token >= 0]
        self._waiting = []
        if not self._line:
            return
        # They are computed by now: to put them together would be an operation to wait for.
        line = [token for one in self._line for token in to_host(one)]
        new = self.text[self.num_read :]
        self._line = []
        kept = _num_equal(line, new)
        (before, num_read), behind = self._points
        if self._trims:
            trim_prompt_cache(self.caches, len(line) - kept)
            self.num_read += kept
        elif kept:
            behind.restore(self.caches)
            self.num_read += 1
        else:
            before.restore(self.caches)
            self.num_read = num_read

    def _read_root(self, root: Int[mx.array, " 1"]) -> Float[mx.array, "1 V"]:
        """Return the logits behind a root, after the text before it was read."""
        before = RestorePoint(self.caches), self.num_read
        rest = self.text[self.num_read :]
        first = max(0, len(rest) - READ_AT_ONCE)
        self._read(rest[:first])
        tokens = mx.concatenate([mx.array(rest[first:], mx.int32), root.astype(mx.int32)])
        logits = self._logits(tokens)[-1:]
        self.num_read, self._line = len(self.text), [root]
        self._points = before, RestorePoint(self.caches)
        return logits

    def _read(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), READ_AT_ONCE):
            self._logits(mx.array(tokens[start : start + READ_AT_ONCE], mx.int32))
            mx.eval([cache.state for cache in self.caches])

    def _logits(self, tokens: Int[mx.array, " T"]) -> Float[mx.array, "T V"]:
        """Return the logits behind tokens, of those that the target has, too."""
        known = mx.minimum(tokens, self.drafter.num_rows - 1)  # a padded target's may be beyond
        logits = self.drafter.model(known[None], cache=self.caches)
        return logits[0, :, : self.drafter.shared_vocab]

    def _chain(
        self,
        root: Int[mx.array, " 1"],
        logits: Float[mx.array, "1 V"],
        length: int,
        noise: Float[mx.array, "L _"] | None,
    ) -> Draft:
        """Return the best tokens, or drawn ones, one behind the other."""
        tokens, scores, laws = [root.astype(mx.int32)], [mx.zeros(1)], []
        while True:
            if self.drafter.law is not None:
                logits, _ = shaped_fast(logits, self.drafter.law)
                laws.append(logits)
            logits = self._in_sight(logits, noise, len(tokens) - 1)
            tokens.append(mx.argmax(logits, axis=-1).astype(mx.int32))
            scores.append(scores[-1] + log_probs(logits).max(axis=-1))
            mx.async_eval(tokens[-1])
            if len(tokens) > length:
                break
            logits = self._logits(tokens[-1])
            self._line.append(tokens[-1])
        depths = mx.arange(length + 1)
        parents = mx.maximum(depths - 1, 0)
        draft = Draft(mx.concatenate(tokens), parents, depths, mx.concatenate(scores), length)
        return replace(draft, laws=self._whole(laws)) if laws else draft

    def _whole(self, laws: list[mx.array]) -> Float[mx.array, "L V"]:
        """Return laws as logits of all of the target's tokens; those it lacks are barred."""
        rows, missing = mx.concatenate(laws), self.drafter.vocab_size - self.drafter.shared_vocab
        return mx.pad(rows, [(0, 0), (0, missing)], constant_values=-mx.inf) if missing else rows

    def _beams(
        self,
        root: Int[mx.array, " 1"],
        logits: Float[mx.array, "1 V"],
        plan: DraftPlan,
        noise: Float[mx.array, "L _"] | None,
    ) -> Draft:
        """Return beams; every level is a call on all nodes so far."""
        target, levels = self.drafter.opened(), Levels()
        rows = iter(range(plan.draft_length))  # of noise, in the search's order

        def step(columns: mx.array, above: mx.array | None) -> tuple[mx.array, mx.array]:
            if above is None:
                return self._in_sight(logits, noise, next(rows)), mx.zeros((1, 0), mx.bool_)
            tree = levels.with_one_more(columns, above)
            call = target.verify(tree, self.caches)
            call.rewind(0)
            found = call.logits[-columns.size :, : self.drafter.shared_vocab]
            return self._in_sight(found, noise, next(rows)), levels.lines

        shape, num_tokens = (plan.beam_width, plan.draft_length), self.drafter.shared_vocab
        return beam_search(step, root, None, *shape, num_tokens=num_tokens)

    def _in_sight(
        self, logits: Float[mx.array, "W V"], noise: Float[mx.array, "L _"] | None, row: int
    ) -> Float[mx.array, "W V"]:
        """Return logits in float32 with a row of noise."""
        logits = logits.astype(mx.float32)
        return logits if noise is None else logits + noise[row, : logits.shape[-1]]


class Levels:
    """The nodes of a beam search, level by level, as trees that a target can be called on."""

    def __init__(self) -> None:
        self.tokens: list[mx.array] = []
        self.masks: list[mx.array] = []

    @property
    def lines(self) -> mx.array:
        """For the latest level's nodes, which of all nodes are on the path to each."""
        return self.masks[-1]

    def with_one_more(self, tokens: Integer[mx.array, " W"], above: mx.array) -> PrefixTree:
        """Return the tree with a level more.

        Args:
            tokens: Of the level.
            above: For each of them the ancestors, among the nodes so far.
        """
        width = tokens.size
        self.tokens.append(tokens.astype(mx.int32))
        self.masks.append(mx.concatenate([above, mx.eye(width) > 0], axis=1))
        size = width * len(self.tokens)
        mask = mx.concatenate([mx.pad(x, [(0, 0), (0, size - x.shape[1])]) for x in self.masks])
        depths = mx.repeat(mx.arange(len(self.tokens)), width)
        parents = mx.zeros(size, mx.int32)  # nobody walks this tree
        return PrefixTree(mx.concatenate(self.tokens), parents, mask, depths, len(self.tokens) - 1)


def _num_equal(one: Iterable[int], other: Iterable[int]) -> int:
    """Return how many of the first tokens are the same."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _behind(state: object, num_tokens: int) -> object:
    """Return the state of a cache that appends when it has read so many more tokens."""
    if isinstance(state, list):
        return [_behind(part, num_tokens) for part in state]
    assert isinstance(state, int)
    return state + num_tokens
