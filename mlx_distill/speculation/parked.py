"""A parked text: one plain step after the other, as mlx-lm's own loop makes them.

    device   step k         | step k+1              | step k+2 ...
    host     build step k+1 | read k, hand it out, build k+2 | ...

While it is known that nothing will be drafted (``Rests``), the planner is not asked, no tree is
made and nothing is walked. The drafter is still told of every token, which it looks at when it
drafts again.
"""

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

import mlx.core as mx
from jaxtyping import Int
from mlx_lm.generate import generation_stream

from mlx_distill.arrays import to_number
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.verification import follow
from mlx_distill.drafters.protocol import Features, Rests
from mlx_distill.kernels.sampler import draw_tokens
from mlx_distill.openblas import let_draft
from mlx_distill.speculation.caching import PromptCache
from mlx_distill.speculation.cycle import Cycle, RootReport, failed_after
from mlx_distill.speculation.drafted_text import DecodedToken, Decoding
from mlx_distill.speculation.phases import is_watched
from mlx_distill.speculation.stopwatch import Stopwatch
from mlx_distill.target.tree_call import RootCall

Reads: TypeAlias = Callable[[mx.array, PromptCache], RootCall]

# Fewer are not worth it.
LEAST = 2


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
    planner = decoding.planner
    plain = isinstance(cycle.call, RootCall) and cycle.is_certain
    if not (plain and isinstance(planner, Rests)) or is_watched():
        return 0
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
    """Yield so many tokens, the first of them a cycle's; return the cycle that goes on."""
    assert isinstance(cycle.call, RootCall)
    assert isinstance(cycle.report, RootReport)
    assert isinstance(decoding.planner, Rests)
    assert decoding.state is not None
    step = Step(cycle.tree.tokens, cycle.call, cycle.report)
    end = cycle.start + steps
    read = decoding.target.stepper(decoding.drafter.taps)
    for place in range(cycle.start, end):
        call, report = step.call, step.report
        decoding.state.accept(step.root, Features(call.hidden, None, call.taps))
        step = _launch(decoding, read, report.drawn, place + 1)
        if report.failed.item():
            raise failed_after(place)
        token = int(to_number(report.drawn))
        decoding.counters.add_plain()
        decoding.ledger.hand_out_behind(call, token)
        with stopwatch.away():
            yield DecodedToken(token, call.logits, 0, False)
    decoding.planner.rested(decoding.text, steps, stopwatch.lap())
    tree = PrefixTree.root(step.root)
    walk = follow(tree, step.report.drawn)
    return Cycle(tree, step.call, end, cycle.history, step.report, walk)


def _launch(decoding: Decoding, read: Reads, root: Int[mx.array, " 1"], place: int) -> Step:
    """Send a token to the target, and draw the text's token of a place behind it."""
    let_draft(False)
    with mx.stream(generation_stream):
        call = read(root, decoding.caches)
        noise = decoding.rows(place, 1)
        logits = decoding.target.as_drawn(call.logits)
        drawn, greatest, _ = draw_tokens(logits, decoding.sampling, noise)
        report = RootReport(drawn, mx.isnan(greatest), None)
        mx.async_eval(report.drawn, report.failed)
    return Step(root, call, report)
