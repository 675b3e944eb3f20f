"""What a draft costs, against a step of its target: time on this machine, dispatches on any."""

from typing import Any

from mlx_distill.benchmarking.dispatch_study import of_cycle, of_plain_step, of_tree_call
from mlx_distill.calibration.config import CalibrationConfig
from mlx_distill.calibration.measuring import usable_contexts, usable_rows
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.tasks import Reading
from mlx_distill.calibration.timing import Task, time_in_turn
from mlx_distill.drafters.protocol import DraftPlan

CONTEXT = 128  # tokens of the text before
LIMIT_S = 30.0


def draft_costs(pair: Pair, plan: DraftPlan, rounds: int) -> dict[str, Any]:
    """Return the costs of a plain step, of a call that verifies a tree, and of a draft.

    Args:
        pair: A target and its drafter.
        plan: The shape of the draft.
        rounds: How often each is timed, in turn with the others.
    """
    plan = plan.for_support(pair.target.support)
    rows = usable_rows(pair, sorted({1, plan.nodes}))
    (context,) = usable_contexts(pair, CalibrationConfig(rows=rows, contexts=(CONTEXT,)))
    reading = Reading.of(pair, context)
    tasks: dict[str, Task] = {
        "plain_step": reading.call(1),
        "tree_call": reading.call(rows[-1]),
        "draft": reading.draft(plan),
    }
    times = time_in_turn(tasks, rounds, LIMIT_S)
    prompt = pair.tokens(context)
    cycle = of_cycle(pair.model, pair.tokenizer, pair.drafter, prompt, plan, 0.0)
    sent = {
        "plain_step": of_plain_step(pair.model),
        "tree_call": of_tree_call(pair.model, rows[-1]),
        "draft": cycle["draft"],
    }
    step, draft = times["plain_step"].median_s, times["draft"].median_s
    return {
        "context": context,
        "nodes": rows[-1],
        "draft_length": plan.draft_length,
        "time_ms": {name: 1000 * one.median_s for name, one in times.items()},
        "spread": {name: one.spread for name, one in times.items()},
        "dispatches": sent,
        # Of a draft's step, as shares of the target's.
        "step_time_share": draft / plan.draft_length / step,
        "step_dispatch_share": sent["draft"] / plan.draft_length / sent["plain_step"],
    }
