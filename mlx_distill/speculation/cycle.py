"""One cycle of the decoding loop: launch a tree, draft what follows it, read what it came to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import mlx.core as mx
from jaxtyping import Bool, Float, Int
from mlx_lm.generate import generation_stream

from mlx_distill.arrays import to_host, to_number
from mlx_distill.core.block_verification import NO_TOKEN, judge
from mlx_distill.core.draft import Draft
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.sampling import sample
from mlx_distill.core.verification import Walk, follow
from mlx_distill.drafters.protocol import Features, seen_in_rows
from mlx_distill.errors import InputError, not_numbers
from mlx_distill.kernels.sampler import draw_tokens
from mlx_distill.kernels.walk import Walked, along
from mlx_distill.kernels.walk import walk as walk_along
from mlx_distill.speculation.drafted_text import Decoding
from mlx_distill.speculation.phases import phase
from mlx_distill.target.tree_call import Computed, TreeCall


@runtime_checkable
class Report(Protocol):
    """What is read of a cycle, where it is not one array."""

    def rows(self) -> list[list[int]]:
        """Return the rows that the report of a tree has; this waits for them."""
        ...


@dataclass(frozen=True)
class RootReport:
    """What is read of a root alone: what ``Cycle.report`` says, each part as it was computed.

    Args:
        drawn: The token that was drawn.
        failed: Whether its logits are no numbers.
        certain: Whether the draw is certain; None where it always is.
    """

    drawn: Int[mx.array, " 1"]
    failed: Bool[mx.array, " 1"]
    certain: Bool[mx.array, " 1"] | None

    @property
    def arrays(self) -> list[mx.array]:
        """The parts."""
        return [x for x in (self.drawn, self.failed, self.certain) if x is not None]

    def rows(self) -> list[list[int]]:
        """Return the rows that the report of a tree has; this waits once, for all of them."""
        drawn, *others = self.arrays
        return [[0], [1], to_host(drawn), *([int(bool(x.item()))] for x in others)]


@dataclass
class Cycle:
    """A tree that the target verifies.

    Args:
        tree: The tree.
        call: The target's word on it.
        start: How many tokens the text had up to the root, the root included.
        history: The text up to the root, for the processors.
        report: Per node its parent, whether it was accepted, what was drawn there, whether its
            logits are no numbers; with filters, whether its draw is certain; of a best-first tree,
            its rank. None if logits processors have to walk on the host.
        walk: Where the draws led; None as the report is.
        root: The root of the next tree; None until that is drafted.
        draft: The draft of the next tree.
        in_doubt: Whether the draws may have to be made again, when they are read.
    """

    tree: PrefixTree
    call: TreeCall | Computed
    start: int
    history: Int[mx.array, " T"]
    report: Int[mx.array, "R N"] | Report | None = None
    walk: Walk | Walked | None = None
    root: Int[mx.array, " 1"] | None = None
    draft: PrefixTree | Draft | None = None
    in_doubt: bool = False

    @property
    def is_root(self) -> bool:
        """Whether nothing was drafted."""
        return self.tree.max_depth == 0

    @property
    def is_certain(self) -> bool:
        """Whether the text goes on from here as the device knows it, whatever was drawn."""
        return self.is_root and self.walk is not None and not self.in_doubt


@dataclass(frozen=True)
class Accepted:
    """What the host reads of a cycle.

    Args:
        path: The accepted nodes, root first.
        tokens: What was drawn at each of them: the text that the cycle adds.
        rows: For each of the tokens the logits, and in which row of them it was drawn.
        parents: Of the tree's nodes.
        ranks: How many nodes are likelier than each; empty if the draft does not say.
    """

    path: list[int]
    tokens: list[int]
    rows: list[tuple[mx.array, int]]
    parents: list[int]
    ranks: Sequence[int] = ()


def launch(
    decoding: Decoding,
    root: Int[mx.array, " 1"],
    draft: PrefixTree | Draft | None,
    history: Int[mx.array, " T"],
    num_tokens: int,
) -> Cycle:
    """Send a tree to the target and walk it, all on the device.

    ``num_tokens`` counts the text's tokens up to the root. With logits processors the walk is the
    host's, so it waits for ``read``.
    """
    with mx.stream(generation_stream):
        tree = decoding.tree(root, draft, decoding.prompt_tokens + num_tokens - 1)
        with phase("target", tree) as made:
            call = decoding.target.verify(tree, decoding.caches, decoding.drafter.taps)
            made(call.logits, call.hidden, call.taps)
        return walked(decoding, Cycle(tree, call, num_tokens, history))


def walked(decoding: Decoding, cycle: Cycle) -> Cycle:
    """Walk a cycle's tree on the device; where logits processors walk, the host waits for it."""
    call = cycle.call
    if decoding.logits_processors:
        mx.async_eval(call.logits, call.hidden)
        cycle.history = mx.concatenate([cycle.history, cycle.tree.tokens[:1]])
        return cycle
    as_block = cycle.tree.laws is not None
    noise, places = (None, None) if as_block else _noise(decoding, cycle)
    with phase("walk", noise) as made:
        if as_block:
            _judge(decoding, cycle)
        else:
            logits = decoding.target.as_drawn(call.logits)
            _walk(cycle, *draw_tokens(logits, decoding.sampling, noise, places))
        walk = cycle.walk
        assert walk is not None
        seen = walk.seen if isinstance(walk, Walked) else None
        made(cycle.report, walk.accepted, walk.last, walk.next_token, seen)
    return cycle


def _judge(decoding: Decoding, cycle: Cycle, exactly: bool = False) -> None:
    """Walk a chain that was drawn from its drafter's law as far as block verification goes."""
    tree, once = cycle.tree, decoding.once
    assert tree.laws is not None
    assert once is not None
    logits = decoding.target.as_drawn(cycle.call.logits)
    length, token, certain = judge(logits, tree.laws, tree.tokens, decoding.sampling, once, exactly)
    # Behind the accepted ones there is nothing that could be drawn: the token may be one of these.
    left = replace(tree, tokens=mx.where(tree.depths <= length, tree.tokens, NO_TOKEN))
    following = mx.concatenate([tree.tokens[1:], token])
    drawn = mx.where(tree.depths < length, following, token)
    sure = None if certain is None else mx.broadcast_to(certain, drawn.shape)
    _walk(cycle, drawn, logits.max(axis=-1), sure, left)


def _noise(decoding: Decoding, cycle: Cycle) -> tuple[mx.array | None, mx.array | None]:
    """Return rows of noise, and which of them each node takes; None if each takes its own.

    A node at depth d draws the text's token ``start`` + d.
    """
    noise = decoding.rows(cycle.start, cycle.tree.max_depth + 1)
    return noise, None if noise is None or cycle.is_root else cycle.tree.depths


def _walk(
    cycle: Cycle,
    drawn: mx.array,
    greatest: mx.array,
    certain: mx.array | None = None,
    tree: PrefixTree | None = None,
) -> None:
    """Follow the draws through a cycle's tree, on the device; the report is on its way then."""
    tree = tree or cycle.tree
    cycle.in_doubt = certain is not None
    if cycle.is_root:
        cycle.walk = follow(cycle.tree, drawn)
        cycle.report = RootReport(drawn, mx.isnan(greatest), certain)
        mx.async_eval(cycle.report.arrays)
        return
    seen = seen_in_rows(cycle.call.hidden, cycle.call.taps)
    cycle.walk = walk_along(tree, drawn, greatest, certain, seen)
    cycle.report = cycle.walk.report
    mx.async_eval(cycle.report)


def _walk_again(decoding: Decoding, cycle: Cycle) -> None:
    """Draw with filters that look at all tokens, and draft what follows then."""
    assert cycle.walk is not None
    if cycle.root is not None:
        assert decoding.state is not None
        decoding.state.rewind(int(to_number(cycle.walk.accepted.sum())))
    with mx.stream(generation_stream):
        if cycle.tree.laws is not None:
            _judge(decoding, cycle, exactly=True)
        else:
            noise, places = _noise(decoding, cycle)
            noise = noise if noise is None or places is None else noise[places]
            logits = decoding.target.as_drawn(cycle.call.logits)
            _walk(cycle, sample(logits, decoding.sampling, noise), logits.max(axis=-1))
    draft_next(decoding, cycle)


def draft_next(decoding: Decoding, cycle: Cycle) -> None:
    """Send the draft that follows a cycle after it; where the host walks, that drafts."""
    if cycle.walk is None:
        return
    with mx.stream(generation_stream):
        noise = accept_next(decoding, cycle)
        assert cycle.root is not None
        cycle.draft = decoding.draft(cycle.root, decoding.plan(), noise)


def accept_next(decoding: Decoding, cycle: Cycle) -> Callable[[int], mx.array | None]:
    """Let a drafter know what a cycle makes text, and the cycle what the next one's root is.

    Return the noise of the first so many tokens behind that root.
    """
    walk, tree = cycle.walk, cycle.tree
    assert walk is not None
    assert decoding.state is not None
    if isinstance(walk, Walked):
        text, depth = walk.text, walk.depth
    elif cycle.is_root:
        text, depth = tree.tokens, tree.depths
    else:
        text, depth = along(tree, walk)

    def noise(length: int) -> mx.array | None:
        if cycle.is_root:
            return decoding.rows(cycle.start + 1, length)
        rows = decoding.rows(cycle.start, tree.max_depth + 1 + length)
        return None if rows is None else rows[depth + mx.arange(1, length + 1)]

    last = None if cycle.is_root else walk
    decoding.state.accept(text, Features(cycle.call.hidden, last, cycle.call.taps))
    cycle.root = walk.next_token[None]
    return noise


def read(decoding: Decoding, cycle: Cycle) -> Accepted:
    """Wait for a cycle and return what it adds to the text.

    Raises:
        InputError: If the target's logits are not numbers on the path.
    """
    if cycle.report is None:
        return _walk_on_host(decoding, cycle)
    with phase("read"):
        report = cycle.report
        rows = to_host(report) if isinstance(report, mx.array) else report.rows()
    parents, accepted, drawn, failed, *others = rows
    certain = others.pop(0) if cycle.in_doubt else accepted
    if not all(sure for sure, kept in zip(certain, accepted, strict=True) if kept):
        _walk_again(decoding, cycle)
        return read(decoding, cycle)
    # Parents have smaller indices than their children, so the path is already in order.
    path = [node for node, on_path in enumerate(accepted) if on_path]
    for length, node in enumerate(path):
        if failed[node]:
            raise failed_after(cycle.start + length)
    rows = [(cycle.call.logits, node) for node in path]
    return Accepted(path, [drawn[node] for node in path], rows, parents, *others)


def _walk_on_host(decoding: Decoding, cycle: Cycle) -> Accepted:
    """Walk a tree node by node, with the logits processors applied to the path's own tokens.

    A processor is called once per token of the text, in order, exactly as plain decoding calls it:
    those that count or parse can rely on it.
    """
    tree, call, start = cycle.tree, cycle.call, cycle.start
    tokens: list[int] = to_host(tree.tokens)
    parents: list[int] = to_host(tree.parents)
    children = {(parents[node], tokens[node]): node for node in range(1, len(tokens))}
    path, drawn, rows = [0], [], []
    with mx.stream(generation_stream):
        while True:
            logits = call.logits[path[-1]][None]
            rows.append(decoding.process(cycle.history, logits))
            if to_number(no_numbers(rows[-1])):
                raise failed_after(start + len(drawn), processed=True)
            token = _draw(decoding, rows[-1], start + len(drawn))
            drawn.append(int(to_number(token)))
            child = children.get((path[-1], drawn[-1]))
            if child is None:
                break
            path.append(child)
            cycle.history = mx.concatenate([cycle.history, token])
        assert decoding.state is not None
        nodes = mx.array(path)
        seen = Features(call.hidden[nodes], None, tuple(x[nodes] for x in call.taps))
        decoding.state.accept(tree.tokens[nodes], seen)
        cycle.root = token
        after = start + len(drawn)
        cycle.draft = decoding.draft(
            token, decoding.plan(), lambda length: decoding.rows(after, length)
        )
    return Accepted(path, drawn, [(row, 0) for row in rows], parents)


def _draw(decoding: Decoding, logits: Float[mx.array, "1 V"], place: int) -> mx.array:
    """Return the token of a place in the text; this may wait for its logits."""
    noise = decoding.rows(place, 1)
    token, _, certain = draw_tokens(logits, decoding.sampling, noise)
    if certain is None or to_number(certain.all()):
        return token
    return sample(logits, decoding.sampling, noise)


def no_numbers(logits: Float[mx.array, "... V"]) -> Bool[mx.array, ""]:
    """Return whether no token can be drawn: one is NaN or infinitely likely, or all are barred."""
    return ~mx.isfinite(logits.max())


def failed_after(num_tokens: int, processed: bool = False) -> InputError:
    """Return the error of logits that no token can be drawn from.

    Args:
        num_tokens: Of the answer, before that.
        processed: Whether logits processors have been at them.
    """
    if processed:
        return InputError(
            f"no token can be drawn after {num_tokens} tokens of the answer: the logits processors "
            "bar all of them, or make of the model's logits what are not numbers"
        )
    return not_numbers(f"after {num_tokens} tokens of its answer")
