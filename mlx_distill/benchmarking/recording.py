"""A text with the trees that it was written with, for looking at.

    recorder = Recorder()
    with watching(recorder):
        for response in stream_generate(...):
            ...
    recorder.cycles        each with its tree, the path that was accepted, and probabilities

What is recorded is read from the device, so such a run is not timed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_distill.arrays import log_probs, to_host
from mlx_distill.core.draft import Draft
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.speculation.phases import Made, watching


@dataclass
class RecordedCycle:
    """One tree.

    Args:
        tokens: One per node; node 0 is certain already.
        parents: Of the nodes.
        target: How probable each is after its parent by the target itself, before temperature and
            filters; None for the root.
        draft: The same by the drafter's scores, as it searches with them; None where it has none.
        path: The nodes that became text, root first; None if the text ended before.
    """

    tokens: list[int]
    parents: list[int]
    target: list[float | None]
    draft: list[float | None]
    path: list[int] | None = None


@dataclass
class Recorder:
    """Watches the parts of cycles and keeps their trees.

    Attributes:
        cycles: In order.
    """

    cycles: list[RecordedCycle] = field(default_factory=list)
    scores: dict[tuple[int, ...], float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, needs: tuple[object, ...]) -> Iterator[Made]:
        """Look at what a part needs and made."""
        made: list[Any] = []
        yield lambda *things: made.extend(things)
        if name == "draft":
            self.scores = _scores(made[0]) if made and isinstance(made[0], Draft) else {}
        elif name == "target" and isinstance(needs[0], PrefixTree):
            self.cycles.append(_recorded(needs[0], made[0], self.scores))
            self.scores = {}
        elif name == "commit" and self.cycles:
            (path,) = needs
            assert isinstance(path, list)
            self.cycles[-1].path = path


def record(
    steps: Callable[[], Iterator[Any]], tokenizer: Any, prompt: Sequence[int], **about: Any
) -> dict[str, Any]:
    """Return a text, its prompt and its cycles, as JSON holds them.

    Args:
        steps: Writes the text, a response per token.
        tokenizer: The model's.
        prompt: Token ids.
        about: What else is kept with it.
    """
    recorder = Recorder()
    with watching(recorder):
        answer = "".join(response.text for response in steps())
    before = prompt[-1] if prompt else None
    cycles = []
    for cycle in recorder.cycles:
        if cycle.path is None:
            continue
        cycles.append(_shown(cycle, tokenizer, before))
        before = cycle.tokens[cycle.path[-1]]
    return {"prompt": tokenizer.decode(list(prompt)), "text": answer, "cycles": cycles, **about}


def _recorded(
    tree: PrefixTree, logits: mx.array, scores: dict[tuple[int, ...], float]
) -> RecordedCycle:
    tokens, parents = to_host(tree.tokens), to_host(tree.parents)
    after = log_probs(logits)[tree.parents]
    own = to_host(mx.take_along_axis(after, tree.tokens[:, None], axis=-1)[:, 0])
    target = [None, *(_share(value) for value in own[1:])]
    paths: list[tuple[int, ...]] = [()]
    draft: list[float | None] = [None]
    for node in range(1, len(tokens)):
        paths.append((*paths[parents[node]], tokens[node]))
        known, parent = scores.get(paths[node]), scores.get(paths[node][:-1])
        draft.append(None if known is None or parent is None else _share(known - parent))
    return RecordedCycle(tokens, parents, target, draft)


def _scores(draft: Draft) -> dict[tuple[int, ...], float]:
    """Return the scores of a draft's nodes by their paths after the root."""
    tokens, parents = to_host(draft.tokens), to_host(draft.parents)
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tokens)):
        paths.append((*paths[parents[node]], tokens[node]))
    return dict(zip(paths, to_host(draft.scores), strict=True))


def _share(log_share: float) -> float | None:
    """Return a probability; None where its logarithm is none."""
    return round(math.exp(min(0.0, log_share)), 4) if log_share == log_share else None


def _shown(cycle: RecordedCycle, tokenizer: Any, before: int | None) -> dict[str, Any]:
    """Return a cycle with its tokens as texts; a token's text depends on the one before it."""
    texts = [_piece(tokenizer, before, cycle.tokens[0])]
    for node in range(1, len(cycle.tokens)):
        texts.append(_piece(tokenizer, cycle.tokens[cycle.parents[node]], cycle.tokens[node]))
    shown = {"texts": texts, "parents": cycle.parents, "path": cycle.path}
    return shown | {"target": cycle.target, "draft": cycle.draft}


def _piece(tokenizer: Any, before: int | None, token: int) -> str:
    """Return what a token adds to a text; of half a character a sign that stands for it."""
    if before is None:
        return tokenizer.decode([token])
    start, whole = tokenizer.decode([before]), tokenizer.decode([before, token])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode([token])
