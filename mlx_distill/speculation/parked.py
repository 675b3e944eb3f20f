"""A parked text: one plain step after the other, as mlx-lm's own loop makes them.

    device   step k         | step k+1              | step k+2 ...
    host     build step k+1 | read k, hand it out, build k+2 | ...

While it is known that nothing will be drafted (``Rests``), the planner is not asked, no tree is
made and nothing is walked. The drafter is still told of every token, which it looks at when it
drafts again. So it goes, too, while a drafter that looks at the text alone (``Listens``) finds
nothing there.
"""

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

import mlx.core as mx
from jaxtyping import Int
from mlx_lm.generate import generation_stream

from mlx_distill.arrays import to_number
from mlx_distill.blas.openblas import let_draft
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.verification import follow
from mlx_distill.drafters.protocol import Features, Listens, Rests
from mlx_distill.kernels.sampler import DrawTokens, chosen_draw
from mlx_distill.speculation.caching import PromptCache
from mlx_distill.speculation.cycle import Cycle, RootReport, failed_after
from mlx_distill.speculation.drafted_text import DecodedToken, Decoding
from mlx_distill.speculation.phases import is_watched
from mlx_distill.speculation.stopwatch import Stopwatch
from mlx_distill.target.tree_call import RootCall

Reads: TypeAlias = Callable[[mx.array, PromptCache], RootCall]

# Fewer are not worth it; after so many the planner is asked again, whether or not a drafter woke.
LEAST, MOST_SILENT = 2, 64


class Step(NamedTuple):
    """A plain step that is on its way.

    Args:
        root: The token that is read.
        call: The target's word on it.
        report: What is drawn behind it.
    """

    root: Int[mx.array, " 1"]
    call: RootCall
    report: RootReport


def steps_to_rest(decoding: Decoding, cycle: Cycle) -> int:
    """Return how many plain steps follow a cycle, whatever becomes of them; 0 if none need to.

    They go to caches that forget by an offset, and end before those are quantised.
    """
    planner, steps = decoding.planner, 0
    plain = isinstance(cycle.call, RootCall) and cycle.is_certain
    if not plain or is_watched():
        return 0
    if _listener(decoding) is not None:
        steps = MOST_SILENT
    elif isinstance(planner, Rests):
        steps = planner.rest(decoding.text, decoding.outcome)
    if decoding.max_tokens is not None:
        steps = min(steps, decoding.max_tokens - cycle.start - 1)
    before = decoding.prompt_tokens + cycle.start - 1
    if steps < LEAST or decoding.cache.quantizes_within(before, steps + 2):
        return 0
    return steps


def resting(
    decoding: Decoding, cycle: Cycle, steps: int, stopwatch: Stopwatch
) -> Generator[DecodedToken, None, Cycle]:
    """Yield so many tokens, the first of them a cycle's; return the cycle that goes on.

    A drafter that was silent ends it as soon as it may have something to draft.
    """
    assert isinstance(cycle.call, RootCall)
    assert isinstance(cycle.report, RootReport)
    assert decoding.state is not None
    step = Step(cycle.tree.tokens, cycle.call, cycle.report)
    listener = _listener(decoding)
    read, draw = decoding.target.stepper(decoding.drafter.taps), chosen_draw()
    place, end = cycle.start, cycle.start + steps
    while place < end and not (listener and listener.wakes(step.root)):
        call, report = step.call, step.report
        decoding.state.accept(step.root, Features(call.hidden, None, call.taps))
        step = _launch(decoding, read, draw, report.drawn, place + 1)
        if report.failed.item():
            raise failed_after(place)
        place += 1
        token = int(to_number(report.drawn))
        decoding.counters.add_plain()
        decoding.ledger.hand_out_behind(call, token)
        with stopwatch.away():
            yield DecodedToken(token, call.logits, 0, False)
    if place == cycle.start:
        return cycle
    if isinstance(decoding.planner, Rests):
        decoding.planner.rested(decoding.text, place - cycle.start, stopwatch.lap())
    tree = PrefixTree.root(step.root)
    walk = follow(tree, step.report.drawn)
    return Cycle(tree, step.call, place, cycle.history, step.report, walk)


def _listener(decoding: Decoding) -> Listens | None:
    """Return what says when a drafter that had nothing to draft may have something again."""
    state = decoding.state
    return state if decoding.is_silent and isinstance(state, Listens) else None


def _launch(
    decoding: Decoding, read: Reads, draw: DrawTokens, root: Int[mx.array, " 1"], place: int
) -> Step:
    """Send a token to the target, and draw the text's token of a place behind it."""
    let_draft(False)
    with mx.stream(generation_stream):
        call = read(root, decoding.caches)
        noise = decoding.rows(place, 1)
        logits = decoding.target.as_drawn(call.logits)
        drawn, greatest, _ = draw(logits, decoding.sampling, noise)
        report = RootReport(drawn, mx.isnan(greatest), None)
        mx.async_eval(report.drawn, report.failed)
    return Step(root, call, report)
