"""The planner of a pair: from the calibration that is kept, else from a quick one."""

import os
import sys
import time
import weakref
from functools import partial

from mlx_distill.blas import openblas
from mlx_distill.calibration.crowding import crowding
from mlx_distill.calibration.measuring import calibrate, quick_config
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.store import (
    doubt,
    drafter_hash,
    find,
    find_kernels,
    identity,
    is_loaded,
    keep,
)
from mlx_distill.calibration.timing import LOADED
from mlx_distill.drafters.protocol import Drafter, DraftPlan, FixedPlanner, Planner
from mlx_distill.kernels.choice import trust
from mlx_distill.kernels.probe import trusted
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.costs import Costs
from mlx_distill.speculation.planning import AdaptivePlanner

# Set to 0, nothing is measured that was not asked for, and no calibration is looked for.
SWITCH = "MLX_DISTILL_CALIBRATE"


def is_on() -> bool:
    """Return whether drafts are planned from measurements unless something else is asked for."""
    return os.environ.get(SWITCH, "1") != "0"


def known_costs(pair: Pair) -> Costs:
    """Return what decoding costs; at the first use of a pair it is measured, and that is said.

    So it is again on a quiet machine where that was contradicted, or there was no time for drafts.
    """
    known, weights = identity(pair), drafter_hash(pair.drafter)
    costs = find(known, weights)
    if costs is None or (is_loaded(costs) and crowding() <= LOADED):
        print(
            f"mlx_distill: measuring this machine, up to 20 seconds ({SWITCH}=0 leaves it "
            "out; python -m mlx_distill.calibrate measures more)",
            file=sys.stderr,
        )
        since = time.perf_counter()
        calibration = calibrate(pair, quick_config(pair), since=since)
        keep(known, calibration, weights)
        if not calibration.knows_drafting:
            doubt(known)
        costs = calibration.costs
    else:
        trust(trusted(find_kernels(known)))
    openblas.prefer(costs.threads)
    return costs


def planner_of(pair: Pair, sampled: bool) -> Planner:
    """Return the planner of all texts of a pair, so that each learns from those before it.

    Args:
        pair: A model and its drafter.
        sampled: Whether tokens are drawn, and not the likeliest.
    """
    if not is_on():
        return FixedPlanner(DraftPlan())
    key = id(pair.model), pair.cache, pair.exact_rows, sampled
    try:
        planners = _planners.setdefault(pair.drafter, {})
    except TypeError:  # a drafter that cannot be a key
        return _planner(pair, sampled)
    if key not in planners or planners[key][0]() is not pair.model:
        planners[key] = weakref.ref(pair.model), _planner(pair, sampled)
    return planners[key][1]


def _planner(pair: Pair, sampled: bool) -> AdaptivePlanner:
    return planner_by(known_costs(pair), pair, sampled)


def planner_by(costs: Costs, pair: Pair, sampled: bool) -> AdaptivePlanner:
    """Return a planner that goes by the costs of a pair, and doubts them if it has to."""
    return AdaptivePlanner(
        costs.sampled() if sampled else costs, doubt=partial(doubt, identity(pair))
    )


_planners: weakref.WeakKeyDictionary[
    Drafter, dict[tuple[int, CacheConfig, bool, bool], tuple[weakref.ref, AdaptivePlanner]]
] = weakref.WeakKeyDictionary()
