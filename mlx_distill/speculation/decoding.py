"""The decoding loop: draft, verify, walk, commit.

    device   draft k         | verify k, walk                | draft k+1        | verify k+1 ...
    host     commit, build k | hand out k-1, build draft k+1 | read k, commit, build k+1 | ...

One host read per cycle fetches what was accepted; everything else is lazy. (Trees of whole beams
are packed on the host, and logits processors are applied there token by token: those read more.)
The call of the target is launched before the tokens of the cycle before it are handed out, so that
the device works while the caller prints; then the next draft, which needs only what the device
knows, so that the device has it to do while the host reads, commits and builds the next call.
"""

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Int
from mlx_lm.generate import generation_stream

from mlx_distill.arrays import to_host
from mlx_distill.core.sampling import sample
from mlx_distill.drafters.protocol import (
    Closes,
    Drafter,
    DraftPlan,
    Features,
    LooksBack,
    Outcome,
)
from mlx_distill.speculation.cycle import (
    Accepted,
    Cycle,
    draft_next,
    failed_after,
    launch,
    no_numbers,
    read,
)
from mlx_distill.speculation.drafted_text import DecodedToken, DecodedTokens, Decoding
from mlx_distill.speculation.parked import resting, steps_to_rest
from mlx_distill.speculation.phases import phase
from mlx_distill.speculation.stopwatch import Stopwatch
from mlx_distill.target.layer_cache import cached_tokens
from mlx_distill.target.tree_call import TreeCall

# A drafter with taps that does not say more is shown so many of the prompt's last tokens.
LOOK_BACK = 256


def decode(decoding: Decoding, prompt: Int[mx.array, " T"]) -> DecodedTokens:
    """Yield the tokens that the target writes after a prompt, as many as are asked for.

    The caller stops earlier by closing the iterator. A cache that is kept then holds the prompt and
    every token that was handed out; if it ends while the prompt is read, what it held before.

    Raises:
        InputError: If the target's logits are not numbers.
    """
    ledger, stopwatch = decoding.ledger, Stopwatch()
    try:
        first, root, features = begin(decoding, prompt)
        plan = None if decoding.ends_with(1) else decoding.plan()
        # Where nothing is drafted, the next step is on its way before the first token is handed
        # out, as in mlx-lm; else the caller need not wait for what will be drafted.
        early = plan is None and not decoding.ends_with(1)
        cycle = launch(decoding, root, None, prompt, 1) if early else None
        ledger.hand_out(first.token, 0, in_cache=False)
        yield first
        if not decoding.ends_with(1):
            with mx.stream(generation_stream):
                decoding.state = decoding.drafter.open(prompt, features)
            cycle = cycle or _first_cycle(decoding, prompt, root, plan)
        while cycle is not None:
            if steps := steps_to_rest(decoding, cycle):
                cycle = yield from resting(decoding, cycle, steps, stopwatch)
            if not decoding.ends_with(cycle.start + 1):
                draft_next(decoding, cycle)
            # Where nothing was drafted, the device need not wait until the draw is read.
            certain = cycle.is_certain
            following = _go_on(decoding, cycle, [0]) if certain else None
            accepted = read(decoding, cycle)
            count(decoding, cycle, accepted, stopwatch.lap())
            if not certain:
                following = _go_on(decoding, cycle, accepted.path)
            cycle, last = following, len(accepted.tokens)
            for number, token in enumerate(accepted.tokens, start=1):
                # A drafted token lies in the cache behind the root; the last one does not yet.
                ledger.hand_out(token, min(number + 1, last), in_cache=number < last)
                with stopwatch.away():
                    yield DecodedToken(token, *accepted.rows[number - 1], number < last)
    finally:
        try:
            if isinstance(decoding.state, Closes):
                decoding.state.close()
        finally:
            if decoding.keep_caches:
                try:
                    _settle(decoding)
                except KeyboardInterrupt:  # perhaps before it had begun; it may be repeated
                    _settle(decoding)
                    raise


def _settle(decoding: Decoding) -> None:
    with mx.stream(generation_stream):
        decoding.ledger.settle()


def begin(
    decoding: Decoding, prompt: Int[mx.array, " T"]
) -> tuple[DecodedToken, mx.array, Features]:
    """Read the prompt; return the first token, the same as a root, and the features behind it.

    Nothing is drafted yet: that would keep the caller waiting for the first token.
    """
    with mx.stream(generation_stream):
        logits, features = prefill(decoding, prompt)
        note_prompt(decoding, prompt)
        first = draw_first(decoding, prompt, logits)
    return first.read(), first.root, features


def note_prompt(decoding: Decoding, prompt: Int[mx.array, " T"]) -> None:
    """Take note that a prompt is read."""
    decoding.ledger.prompt_is_read()
    # Recurrent layers do not say how many they have read.
    decoding.prompt_tokens = max(cached_tokens(decoding.caches), prompt.size)


@dataclass(frozen=True)
class FirstDraw:
    """The first token of an answer, on its way.

    Args:
        logits: What it is drawn from.
        root: It.
        report: It, and whether the logits are no numbers.
        processed: Whether logits processors have been at the logits.
    """

    logits: Float[mx.array, "1 V"]
    root: Int[mx.array, " 1"]
    report: Int[mx.array, " 2"]
    processed: bool

    def read(self) -> DecodedToken:
        """Wait for the token.

        Raises:
            InputError: If the target's logits are not numbers.
        """
        token, failed = to_host(self.report)
        if failed:
            raise failed_after(0, self.processed)
        return DecodedToken(token, self.logits, 0, False)


def draw_first(
    decoding: Decoding, prompt: Int[mx.array, " T"], logits: Float[mx.array, "1 V"]
) -> FirstDraw:
    """Draw the first token of an answer."""
    logits = decoding.process(prompt, logits)
    failed = no_numbers(logits)[None].astype(mx.int32)
    root = sample(logits, decoding.sampling, decoding.rows(0, 1))
    report = mx.concatenate([root, failed])
    mx.async_eval(report)
    return FirstDraw(logits, root, report, bool(decoding.logits_processors))


def _first_cycle(
    decoding: Decoding,
    prompt: Int[mx.array, " T"],
    root: Int[mx.array, " 1"],
    plan: DraftPlan | None,
) -> Cycle:
    """Launch the cycle whose root is the first token."""
    with mx.stream(generation_stream):
        draft = decoding.draft(root, plan, lambda length: decoding.rows(1, length))
    return launch(decoding, root, draft, prompt, 1)


def prefill(
    decoding: Decoding, prompt: Int[mx.array, " T"]
) -> tuple[Float[mx.array, "1 V"], Features]:
    """Read a prompt into the cache, in chunks.

    Return the last token's logits, and the features of the last tokens.
    """
    size, rest = decoding.cache.prefill_step_size, prompt.size - 1
    features, wanted = None, look_back(decoding.drafter)
    for start in range(0, rest, size):
        _, chunk = _read(decoding, prompt[start : min(start + size, rest)])
        if wanted > 1:
            features = chunk if features is None else features.then(chunk, wanted)
            mx.eval(features.states, features.taps)
        mx.eval([cache.state for cache in decoding.caches])
        mx.clear_cache()
    logits, last = _read(decoding, prompt[-1:])
    return logits, last if features is None else features.then(last, wanted)


def look_back(drafter: Drafter) -> int:
    """Return how many of a prompt's last tokens a drafter is shown the features of."""
    if isinstance(drafter, LooksBack):
        return drafter.look_back
    return LOOK_BACK if drafter.taps else 1


def _read(
    decoding: Decoding, tokens: Int[mx.array, " T"]
) -> tuple[Float[mx.array, "T V"], Features]:
    """Read tokens into the cache; return their logits and features."""
    taps = decoding.drafter.taps
    logits, hidden, tapped = decoding.target.observe(tokens, decoding.caches, taps)
    decoding.cache.quantize(decoding.caches)
    return logits, Features(hidden, None, tapped)


def _go_on(decoding: Decoding, cycle: Cycle, path: list[int]) -> Cycle | None:
    """Keep the accepted path in the cache, and launch what follows, if anything is to follow."""
    with mx.stream(generation_stream), phase("commit", path) as made:
        assert isinstance(cycle.call, TreeCall)
        decoding.ledger.commit(cycle.call, path)
        made(decoding.caches)
    num_tokens = cycle.start + len(path)
    if decoding.ends_with(num_tokens):
        return None
    assert cycle.root is not None
    return launch(decoding, cycle.root, cycle.draft, cycle.history, num_tokens)


def count(
    decoding: Decoding, cycle: Cycle, accepted: Accepted, seconds: float | None = None
) -> None:
    """Take note of what became of a tree, and of the time since the last one was read."""
    num_accepted = len(accepted.path) - 1
    decoding.counters.add(accepted.parents, num_accepted)
    before = decoding.prompt_tokens + cycle.start - 1
    path = tuple(accepted.path)
    decoding.outcome = Outcome(
        before, tuple(accepted.parents), num_accepted, path, tuple(accepted.ranks), seconds
    )
