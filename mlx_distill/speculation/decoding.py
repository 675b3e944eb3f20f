"""The decoding loop: draft, verify, walk, commit.

    device   draft k         | verify k, walk                | draft k+1        | verify k+1 ...
    host     commit, build k | hand out k-1, build draft k+1 | read k, commit, build k+1 | ...

One host read per cycle fetches what was accepted; everything else is lazy. (Trees of whole beams
are packed on the host, and logits processors are applied there token by token: those read more.)
The call of the target is launched before the tokens of the cycle before it are handed out, so that
the device works while the caller prints; then the next draft, which needs only what the device
knows, so that the device has it to do while the host reads, commits and builds the next call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache

from mlx_distill.arrays import to_host, to_number
from mlx_distill.core.prefix_tree import BeamLevels, PrefixTree
from mlx_distill.core.sampling import Sampling, TextNoise, sample
from mlx_distill.core.verification import Walk, follow
from mlx_distill.drafters.protocol import Drafter, DraftPlan
from mlx_distill.errors import InputError, not_numbers
from mlx_distill.speculation.statistics import DraftCounters
from mlx_distill.target.target import Target, TreeCall
from mlx_distill.target.tree_cache import cached_tokens

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class CacheConfig:
    """The cache of keys and values.

    Args:
        max_kv_size: Longest context that is kept; older tokens are dropped.
        kv_bits: Quantise the cache to so many bits.
        kv_group_size: Group size of that quantisation.
        quantized_kv_start: Quantise from so many tokens on.
        prefill_step_size: Tokens of the prompt that are read at once.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    prefill_step_size: int = 2048

    def __post_init__(self) -> None:
        if self.prefill_step_size < 1:
            raise InputError(f"prefill_step_size must be at least 1, got {self.prefill_step_size}")
        if self.max_kv_size is not None and self.max_kv_size < 8:
            raise InputError(f"max_kv_size must be at least 8, got {self.max_kv_size}")
        if self.kv_bits not in (None, 2, 3, 4, 5, 6, 8):
            raise InputError(f"kv_bits must be 2, 3, 4, 5, 6 or 8, got {self.kv_bits}")
        if self.kv_group_size not in (32, 64, 128):
            raise InputError(f"kv_group_size must be 32, 64 or 128, got {self.kv_group_size}")
        if self.kv_bits is not None and self.max_kv_size is not None:
            raise InputError(
                "kv_bits and max_kv_size exclude each other: mlx-lm's rotating cache "
                "cannot be quantised"
            )

    def quantize(self, caches: list[Any]) -> None:
        """Quantise the caches that have grown long enough, in place."""
        try:
            maybe_quantize_kv_cache(
                caches, self.quantized_kv_start, self.kv_group_size, self.kv_bits
            )
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"the cache cannot be quantised: {error}") from None

    def quantizes_within(self, start: int, num_tokens: int) -> bool:
        """Return whether a cache of ``start`` tokens is quantised within the next ones.

        Plain decoding switches between two tokens; a tree must not reach over that border.
        """
        border = self.quantized_kv_start
        return self.kv_bits is not None and start < border <= start + num_tokens


@dataclass(frozen=True)
class Emitted:
    """One token of the text.

    Args:
        token: Its id.
        logits: What the token was drawn from, in row ``row``: not normalised, but processed. The
            rows are neither taken nor normalised here, since hardly anybody looks at them.
        row: None if these are the log-probabilities themselves.
        from_draft: Whether it was drafted.
    """

    token: int
    logits: Float[mx.array, "..."]
    row: int | None
    from_draft: bool


@dataclass
class Decoding:
    """What a decoding needs besides the prompt.

    Args:
        target: Verifies.
        drafter: Drafts.
        plan: The shape of the drafts; a target that takes chains only gets chains.
        sampling: How tokens are drawn.
        noise: The text's random numbers; None at temperature 0.
        cache: How keys and values are kept.
        caches: The prompt cache; it may hold earlier turns.
        logits_processors: As mlx-lm's: of the tokens so far and the logits of the next one.
        counters: Counts what happens.
    """

    target: Target
    drafter: Drafter
    plan: DraftPlan
    sampling: Sampling
    noise: TextNoise | None
    cache: CacheConfig
    caches: list[Any]
    logits_processors: Sequence[LogitsProcessor] = ()
    counters: DraftCounters = field(default_factory=DraftCounters)

    def __post_init__(self) -> None:
        self.plan = self.plan.for_support(self.target.support)

    def rows(self, start: int, count: int) -> Float[mx.array, "N V"] | None:
        """Return the noise of ``count`` tokens from the text's token ``start`` on."""
        return None if self.noise is None else self.noise.rows(start, count)

    def process(
        self, history: Int[mx.array, " T"], logits: Float[mx.array, "1 V"]
    ) -> Float[mx.array, "1 V"]:
        """Return the logits after the processors."""
        for processor in self.logits_processors:
            logits = processor(history, logits)
        return logits

    def draft(
        self,
        hidden: Float[mx.array, " D"],
        root: Int[mx.array, " 1"],
        noise: Float[mx.array, "L V"] | None,
    ) -> PrefixTree | BeamLevels | None:
        """Return continuations of the root, on their way; None if the plan has no room for any.

        A best-first tree is on its way, too: the device makes it while the host builds the call of
        the target. Whole beams have to be read first.
        """
        plan = self.plan
        if plan.tree == "best-first" and plan.nodes == 1:
            return None
        levels = self.drafter.draft(hidden, root, plan, self.sampling, noise)
        if plan.tree == "beam":
            mx.async_eval(levels.tokens, levels.parents, levels.scores)
            return levels
        tree = levels.best_first(root, plan.nodes)
        mx.async_eval(tree.tokens, tree.parents, tree.mask, tree.depths)
        return tree

    def tree(self, root: Int[mx.array, " 1"], draft: PrefixTree | BeamLevels | None) -> PrefixTree:
        """Return the tree to verify."""
        start = cached_tokens(self.caches)
        if draft is None or self.cache.quantizes_within(start, self.plan.draft_length + 1):
            return PrefixTree.root(root)
        if isinstance(draft, BeamLevels):
            return PrefixTree.from_beams(to_host(draft.beams(root)))
        return draft


@dataclass
class Cycle:
    """A tree that the target verifies.

    Args:
        tree: The tree.
        call: The target's word on it.
        report: Per node its parent, whether it was accepted, what was drawn there, and whether its
            logits are no numbers. None if logits processors have to walk on the host.
        history: The text up to the root, for the processors.
        walk: Where the draws led; None as the report is.
        noise: From the root's draw on; None at temperature 0.
        root: The root of the next tree; None until that is drafted.
        draft: The draft of the next tree.
    """

    tree: PrefixTree
    call: TreeCall
    report: Int[mx.array, "4 N"] | None
    history: Int[mx.array, " T"]
    walk: Walk | None = None
    noise: Float[mx.array, "M V"] | None = None
    root: Int[mx.array, " 1"] | None = None
    draft: PrefixTree | BeamLevels | None = None


@dataclass(frozen=True)
class Outcome:
    """What the host reads of a cycle.

    Args:
        path: The accepted nodes, root first.
        tokens: What was drawn at each of them: the text that the cycle adds.
        rows: For each of the tokens the logits, and in which row of them it was drawn.
        parents: Of the tree's nodes.
    """

    path: list[int]
    tokens: list[int]
    rows: list[tuple[mx.array, int]]
    parents: list[int]


def decode(decoding: Decoding, prompt: Int[mx.array, " T"]) -> Iterator[Emitted]:
    """Yield the tokens that the target writes after a prompt, without end.

    The caller stops by closing the iterator. The cache then holds the prompt and every token that
    was handed out, the last one only if it was drafted.

    Raises:
        InputError: If the target's logits are not numbers.
    """
    with mx.stream(generation_stream):
        logits, hidden = prefill(decoding, prompt)
        failed = mx.isnan(logits).any(keepdims=True)[0].astype(mx.int32)
        logits = decoding.process(prompt, logits)
        root = sample(logits, decoding.sampling, decoding.rows(0, 1))
        report = mx.concatenate([root, failed])
        mx.async_eval(report)
        draft = decoding.draft(hidden, root, decoding.rows(1, decoding.plan.draft_length))
    token, failed = to_host(report)
    if failed:
        raise _not_numbers(0)
    num_tokens = 1
    previous, outcome, handed_out = None, None, 0
    cycle = launch(decoding, root, draft, prompt, num_tokens)
    try:
        yield Emitted(token, logits, 0, False)
        draft_next(decoding, cycle)
        while True:
            outcome = read(decoding, cycle, num_tokens)
            num_tokens += len(outcome.tokens)
            with mx.stream(generation_stream):
                cycle.call.commit(outcome.path)
                decoding.cache.quantize(decoding.caches)
            previous, cycle, handed_out = cycle, None, 0
            decoding.counters.add(outcome.parents, len(outcome.path) - 1)
            previous.call.rebase(decoding.caches)
            assert previous.root is not None
            cycle = launch(decoding, previous.root, previous.draft, previous.history, num_tokens)
            for token, at in zip(outcome.tokens, outcome.rows, strict=True):
                handed_out += 1
                yield Emitted(token, *at, handed_out < len(outcome.tokens))
            draft_next(decoding, cycle)
    finally:
        with mx.stream(generation_stream):
            if cycle is not None:
                cycle.call.rewind(0)
            if previous is not None and outcome is not None and handed_out < len(outcome.path):
                previous.call.rewind(handed_out + 1)


def prefill(
    decoding: Decoding, prompt: Int[mx.array, " T"]
) -> tuple[Float[mx.array, "1 V"], Float[mx.array, " D"]]:
    """Read a prompt into the cache, in chunks; return the last token's logits and hidden state."""
    size = decoding.cache.prefill_step_size
    rest = prompt.size - 1
    for start in range(0, rest, size):
        decoding.target.forward(prompt[start : min(start + size, rest)], decoding.caches)
        decoding.cache.quantize(decoding.caches)
        mx.eval([cache.state for cache in decoding.caches])
        mx.clear_cache()
    logits, hidden = decoding.target.forward(prompt[-1:], decoding.caches)
    decoding.cache.quantize(decoding.caches)
    return logits, hidden[-1]


def launch(
    decoding: Decoding,
    root: Int[mx.array, " 1"],
    draft: PrefixTree | BeamLevels | None,
    history: Int[mx.array, " T"],
    num_tokens: int,
) -> Cycle:
    """Send a tree to the target and walk it, all on the device.

    ``num_tokens`` counts the text's tokens up to the root. With logits processors the walk is the
    host's, so it waits for ``read``.
    """
    with mx.stream(generation_stream):
        tree = decoding.tree(root, draft)
        depth = decoding.plan.draft_length
        call = decoding.target.verify(tree.tokens, tree.mask, tree.depths, depth, decoding.caches)
        if decoding.logits_processors:
            mx.async_eval(call.logits, call.hidden)
            return Cycle(tree, call, None, mx.concatenate([history, root]))
        # A node at depth d draws token num_tokens + d; the next draft begins behind the last one.
        noise = decoding.rows(num_tokens, 2 * depth + 1)
        at_nodes = None if noise is None else noise[tree.depths]
        drawn = sample(call.logits, decoding.sampling, at_nodes)
        walk = follow(tree, drawn)
        failed = mx.isnan(call.logits).any(axis=-1)
        rows = (tree.parents, walk.accepted, drawn, failed)
        report = mx.stack([row.astype(mx.int32) for row in rows])
        mx.async_eval(report)
        return Cycle(tree, call, report, history, walk, noise)


def draft_next(decoding: Decoding, cycle: Cycle) -> None:
    """Send the draft that follows a cycle after it; where the host walks, that drafts."""
    if cycle.walk is None:
        return
    with mx.stream(generation_stream):
        walk, noise = cycle.walk, cycle.noise
        if noise is not None:
            places = mx.arange(1, decoding.plan.draft_length + 1)
            noise = noise[cycle.tree.depths[walk.last] + places]
        cycle.root = walk.next_token[None]
        cycle.draft = decoding.draft(cycle.call.hidden[walk.last], cycle.root, noise)


def read(decoding: Decoding, cycle: Cycle, num_tokens: int) -> Outcome:
    """Wait for a cycle and return what it adds to the text.

    Raises:
        InputError: If the target's logits are not numbers on the path.
    """
    if cycle.report is None:
        return _walk_on_host(decoding, cycle, num_tokens)
    parents, accepted, drawn, failed = to_host(cycle.report)
    # Parents have smaller indices than their children, so the path is already in order.
    path = [node for node, on_path in enumerate(accepted) if on_path]
    for length, node in enumerate(path):
        if failed[node]:
            raise _not_numbers(num_tokens + length)
    rows = [(cycle.call.logits, node) for node in path]
    return Outcome(path, [drawn[node] for node in path], rows, parents)


def _walk_on_host(decoding: Decoding, cycle: Cycle, num_tokens: int) -> Outcome:
    """Walk a tree node by node, with the logits processors applied to the path's own tokens.

    A processor is called once per token of the text, in order, exactly as plain decoding calls it:
    those that count or parse can rely on it.
    """
    tree, call = cycle.tree, cycle.call
    tokens: list[int] = to_host(tree.tokens)
    parents: list[int] = to_host(tree.parents)
    children = {(parents[node], tokens[node]): node for node in range(1, len(tokens))}
    path, drawn, rows = [0], [], []
    with mx.stream(generation_stream):
        while True:
            logits = call.logits[path[-1]][None]
            if mx.isnan(logits).any().item():
                raise _not_numbers(num_tokens + len(drawn))
            rows.append(decoding.process(cycle.history, logits))
            noise = decoding.rows(num_tokens + len(drawn), 1)
            token = sample(rows[-1], decoding.sampling, noise)
            drawn.append(int(to_number(token)))
            child = children.get((path[-1], drawn[-1]))
            if child is None:
                break
            path.append(child)
            cycle.history = mx.concatenate([cycle.history, token])
        cycle.root = token
        noise = decoding.rows(num_tokens + len(drawn), decoding.plan.draft_length)
        cycle.draft = decoding.draft(call.hidden[path[-1]], token, noise)
    return Outcome(path, drawn, [(row, 0) for row in rows], parents)


def _not_numbers(num_tokens: int) -> InputError:
    return not_numbers(f"after {num_tokens} tokens of its answer")
