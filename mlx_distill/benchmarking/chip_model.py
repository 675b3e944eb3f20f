"""A model of a chip that is not here, from what others have published of it. Not a measurement.

A cycle of drafting on it takes the target's call, the drafter's reading of its weights, and the
dispatches of the draft and of the rest:

    cycle(shape) = plain V(nodes) + length (drafter / bandwidth + dispatches) + rest dispatches

V comes from published sweeps: their tokens per call and per second give the time of their cycles,
by the rows of the call. How much of such a cycle was the target's call is not published, so there
are two curves. In the cautious one all of it was; in the hopeful one what the smallest call took
beyond a plain step was drafting, at every shape. The truth lies between.
"""

import csv
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_distill.benchmarking.published import PUBLISHED
from mlx_distill.benchmarking.traces import TracedText
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.speculation.costs import Costs

WIDTHS, LENGTHS = (1, 2, 4, 8), (1, 2, 3, 4, 6, 8)
CONTEXT = 200  # about that of the published texts


@dataclass(frozen=True)
class PublishedCurve:
    """What a target's calls take on a chip.

    Args:
        chip: As published.
        model: As published.
        plain_s: Of a plain step.
        cycles_s: Of a whole published cycle, by the rows of its call; ascending.
        sources: Where that was published.
    """

    chip: str
    model: str
    plain_s: float
    cycles_s: dict[int, float]
    sources: tuple[str, ...]

    def call_s(self, rows: int, hopeful: bool) -> float:
        """Return the seconds of a call, by one of the two readings."""
        if rows == 1:
            return self.plain_s
        beyond = next(iter(self.cycles_s.values())) - self.plain_s if hopeful else 0.0
        return max(self.plain_s, self.cycles_s[rows] - max(0.0, beyond))


@dataclass(frozen=True)
class Chip:
    """What is assumed of a chip, and of the drafter that runs on it.

    Args:
        bandwidth_bytes_per_s: What reading weights reaches.
        dispatch_s: Of one dispatch.
        drafter_bytes: That a drafter reads for every drafted token.
        dispatches_per_token: Of a draft, for every drafted token.
        rest_dispatches: Of the rest of a cycle, beside the draft and the call.
    """

    bandwidth_bytes_per_s: float
    dispatch_s: float
    drafter_bytes: float
    dispatches_per_token: float
    rest_dispatches: float

    def costs(self, curve: PublishedCurve, hopeful: bool) -> Costs:
        """Return what decoding would cost there."""
        rows = (1, *curve.cycles_s)
        calls = tuple(curve.call_s(count, hopeful) for count in rows)
        token_s = self.drafter_bytes / self.bandwidth_bytes_per_s
        token_s += self.dispatches_per_token * self.dispatch_s
        draft = tuple(length * token_s for length in LENGTHS)
        rest_s = self.rest_dispatches * self.dispatch_s
        drafts = tuple(draft for _ in WIDTHS)
        return Costs((CONTEXT,), rows, (calls,), WIDTHS, LENGTHS, drafts, rest_s)


@dataclass(frozen=True)
class Predicted:
    """What a shape of draft would come to.

    Args:
        plan: The shape.
        tokens_per_cycle: Of the traces.
        cycle_s: Of a cycle.
        speedup: Over plain decoding.
    """

    plan: DraftPlan
    tokens_per_cycle: float
    cycle_s: float
    speedup: float


def predict(costs: Costs, traces: Sequence[TracedText], plan: DraftPlan, context: int) -> Predicted:
    """Return what a shape would come to: tokens from traces, seconds from costs."""
    places = [len(trace.places) for trace in traces]
    cycles = [n / t.tokens_per_cycle(plan) for n, t in zip(places, traces, strict=True)]
    tokens = sum(places) / sum(cycles)
    cycle_s = costs.cycle(plan, plan.nodes, context)
    return Predicted(plan, tokens, cycle_s, tokens * costs.plain(context) / cycle_s)


def best(costs: Costs, traces: Sequence[TracedText]) -> Predicted:
    """Return the shape with the most tokens per second; its speed-up may be below 1: then park."""
    return max(
        (predict(costs, traces, plan, CONTEXT) for plan in _shapes(costs)),
        key=lambda one: one.speedup,
    )


def _shapes(costs: Costs) -> Iterator[DraftPlan]:
    for width, length, nodes in itertools.product(WIDTHS, LENGTHS, costs.rows[1:]):
        if length < nodes <= 1 + width * length:
            yield DraftPlan(width, length, nodes)


def published_curves(chip: str, dtype: str = "float16") -> list[PublishedCurve]:
    """Return the curves of a chip's targets, from greedy sweeps of recurrent drafters."""
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in csv.DictReader(PUBLISHED.read_text(encoding="utf-8").splitlines()):
        swept = row["beam_width"] and row["tokens_per_s"]
        if (row["chip"], row["dtype"], row["mode"]) == (chip, dtype, "greedy") and swept:
            rows[row["model"]].append(row)
    return [_curve(chip, model, found) for model, found in rows.items()]


def _curve(chip: str, model: str, rows: Sequence[dict[str, str]]) -> PublishedCurve:
    """Return a target's curve: medians over the shapes whose calls have as many rows."""
    cycles, plain = defaultdict(list), []
    for row in rows:
        per_s = float(row["tokens_per_s"])
        size = int(row["beam_width"]) * int(row["beam_length"])
        cycles[size].append(float(row["tokens_per_call"]) / per_s)
        plain.append(float(row["speedup"]) / per_s)
    medians = {size: statistics.median(cycles[size]) for size in sorted(cycles)}
    sources = tuple(dict.fromkeys(row["source"] for row in rows))
    return PublishedCurve(chip, model, statistics.median(plain), medians, sources)
