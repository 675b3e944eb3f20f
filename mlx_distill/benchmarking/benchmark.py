"""A whole benchmark: a pair, its prompts and what is asked of it to one result."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from mlx import nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from mlx_distill.benchmarking.arms import OURS, PLAIN, Bench, Sample
from mlx_distill.benchmarking.comparison import first_difference
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.figures import (
    by_class,
    equal_texts,
    mean_by_depth,
    summary,
    timed,
)
from mlx_distill.benchmarking.profile import profile, run_profile
from mlx_distill.benchmarking.studies import growth, long_run, overhead, sharing, sweep, trees
from mlx_distill.calibration.automatic import is_on, known_costs
from mlx_distill.calibration.pair import Pair
from mlx_distill.data.prompts import Asked
from mlx_distill.data.report import Report
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.errors import InputError
from mlx_distill.target.context import text_limit


@dataclass(frozen=True)
class Studies:
    """What is measured beside the arms.

    Args:
        sharing: What shared prefixes save.
        long_run: Tokens that are written for the memory; None for none.
        growth: The longest context at which speed and memory are measured; None for none.
        trees: Texts that are kept with the trees that they were written with.
        page: What a page shows beside: a profile, and what calls cost.
    """

    sharing: bool = False
    long_run: int | None = None
    growth: int | None = None
    trees: int = 0
    page: bool = False


def run(
    bench: Bench, asked: Sequence[Asked], plan: DraftPlan | None, studies: Studies
) -> dict[str, Any]:
    """Return what a benchmark found: figures per arm, and of every study.

    Args:
        bench: The pair and what is asked of it.
        asked: The prompts; all leave room for an answer, see ``usable``.
        plan: The shape of the drafts; None leaves it to what was measured of this machine. Parts
            of a cycle, memory and sweep are measured with the default shape then.
        studies: What is measured beside.

    Raises:
        InputError: If nothing was written that could be timed.
    """
    config, shape = bench.config, plan or DraftPlan()
    prompts = [one.ids for one in asked]
    samples = bench.run(prompts, plan, "benchmark")
    arms = summary(samples)
    # What ends with its first token cannot be timed.
    lasting = list(compress(prompts, timed(samples)))
    greedy = bench.sampling.temperature == 0
    result: dict[str, Any] = {
        "arms": arms,
        "equal_texts": equal_texts(samples) if greedy else None,
        "differences": differences(bench, prompts, samples, plan) if greedy else [],
        "acceptance_by_depth": mean_by_depth(samples[OURS]),
        "classes": by_class(samples, [one.kind for one in asked]),
        "overhead": overhead(bench, lasting[: config.timed_prompts], shape),
        "dtype": str(bench.dtype).rpartition(".")[2],
    }
    if studies.sharing:
        result["sharing"] = sharing(bench, lasting[:4])
    if studies.long_run:
        result["long_run"] = long_run(bench, prompts, shape, studies.long_run)
    if config.sweep_prompts:
        result["sweep"] = sweep(bench, lasting[: config.sweep_prompts], shape)
    if studies.growth:
        result["growth"] = growth(bench, prompts, plan, studies.growth)
    if studies.trees:
        result["trees"] = trees(bench, asked, plan, studies.trees)
    if studies.page:
        result |= _for_page(bench, lasting[: config.timed_prompts], shape)
    return result


def _for_page(bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan) -> dict[str, Any]:
    """Return what a page shows beside: a profile, and what calls cost unless that is left out."""
    found: dict[str, Any] = {
        "profile": profile(bench, prompts, plan, run_profile(bench, prompts, plan))
    }
    if is_on():
        pair = Pair(bench.model, bench.tokenizer, bench.drafter)
        found["calibration"] = known_costs(pair).to_dict()
    return found


def differences(
    bench: Bench,
    prompts: Sequence[list[int]],
    samples: dict[str, list[Sample]],
    plan: DraftPlan | None,
) -> list[dict[str, Any]]:
    """Return where drafted greedy texts part from mlx-lm's, which is decoded once more for that."""
    plain, found = bench.arms(plan)[PLAIN], []
    pairs = zip(samples[PLAIN], samples[OURS], strict=True)
    for number, (theirs, ours) in enumerate(pairs):
        if theirs.tokens != ours.tokens:
            one = first_difference(plain(prompts[number], bench.config.seed), ours.tokens)
            if one is not None:
                found.append({"prompt": number, "token": one.place, "margin": one.margin})
    return found


def usable(
    model: nn.Module,
    prompts: Sequence[Asked],
    config: BenchmarkConfig,
    report: Report,
) -> list[Asked]:
    """Return the first prompts whose answers fit into what a model can read; others are counted.

    Raises:
        InputError: If there are too few.
    """
    limit, max_tokens = text_limit(model), config.max_tokens
    fitting = []
    for number, prompt in enumerate(prompts, start=1):
        if limit is not None and len(prompt.ids) + max_tokens > limit:
            reason = f"prompt without room for {max_tokens} tokens in the model's {limit}"
            report.drop(reason, f"prompt {number}")
        else:
            fitting.append(prompt)
    report.kept = len(fitting)
    wanted = config.num_prompts
    if len(fitting) < wanted:
        lost = f" ({report.reasons()})" if report.dropped else ""
        raise InputError(f"{wanted} prompts were asked for, there are {len(fitting)}{lost}")
    return fitting[:wanted]


def check_draft_model(model: nn.Module, draft_model: nn.Module | None) -> None:
    """Raise InputError if mlx-lm's own drafting cannot take back what it drafts."""
    for one in (model, draft_model) if draft_model is not None else ():
        if not can_trim_prompt_cache(make_prompt_cache(one)):
            raise InputError("mlx-lm's own drafting needs caches that can be trimmed")
