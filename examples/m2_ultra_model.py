"""What drafting would come to on an M2 Ultra: a model, never a measurement.

    python examples/m2_ultra_model.py                     the bundled pair's acceptance
    python examples/m2_ultra_model.py --model M --drafter D --data held-out.jsonl
    python examples/m2_ultra_model.py --traces traces.json --no-validation

The model is tried first where it can be tried: the pair's acceptance is traced, this machine is
calibrated, and what the two predict for several shapes of draft is put beside what those shapes
reach here, in turns, since a machine's speed changes by the minute. Then the same traces are taken
to the chip: 800 GB/s, the cost of a dispatch as it is assumed (``--dispatch-us``), and curves V(T)
that published sweeps on it give (see ``mlx_distill.benchmarking.chip_model``). Those sweeps are of
other drafters, so the acceptance is that of the traced pair, and a cautious and a hopeful reading
of them is given.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_distill  # loads a fast BLAS on Linux, before anything else loads mlx
from mlx_distill import DraftPlan, InputError, cli

# isort: split
from mlx_distill import machine
from mlx_distill.benchmarking.arms import Bench, Sample
from mlx_distill.benchmarking.chip_model import CONTEXT, Chip, best, predict, published_curves
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.figures import summary
from mlx_distill.benchmarking.traces import TracedText, record_trace
from mlx_distill.calibration.config import CalibrationConfig
from mlx_distill.calibration.measuring import calibrate
from mlx_distill.calibration.pair import Pair
from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import in_turn, read_asked
from mlx_distill.files import write_whole
from mlx_distill.parsing import parse_json
from mlx_distill.speculation.costs import Costs

PROMPTS = Path(mlx_distill.__file__).parent / "data" / "story_openings.jsonl"
# The shapes that are tried here: a chain, the default, and a larger tree.
SHAPES = (DraftPlan(1, 2, 3), DraftPlan(2, 3, 5), DraftPlan(), DraftPlan(4, 6, 16))
AGREES, TURNS = 0.10, 3
# What says how a pair is traced.
TRACED = (
    "model",
    "adapter_path",
    "chat_template_config",
    "trust_remote_code",
    "drafter",
    "data",
    "num_prompts",
    "max_tokens",
)
MODEL = "MODEL, not a measurement"
SLOWEST_S = 1.0  # a published plain step beyond that was not held in the memory


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Try the model here, then take it to the chip; return the exit status."""
    arguments = _parser().parse_args(argv)
    output = cli.new_file(arguments.output)
    instead = "--traces is instead of a pair"
    cli.refuse_unused(_parser(), argv, (arguments.traces, TRACED, instead))
    _check(arguments)
    result: dict[str, Any] = {"what": MODEL, "config": cli.settings(arguments)}
    if arguments.traces:
        traces = _read(Path(arguments.traces), arguments.temp)
    else:
        bench, prompts = _open(arguments)
        traces = _trace(bench, prompts, arguments)
        if arguments.validation:
            result["validation"] = _validate(bench, prompts, traces)
    result["chip"] = _predict(traces, arguments)
    if output:
        write_whole(output, json.dumps(result | machine.provenance(), indent=1) + "\n")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.traces and arguments.validation:
        raise InputError("traces from a file cannot be tried here; add --no-validation")
    for name in (
        "dispatch_us",
        "bandwidth_gb_s",
        "drafter_gb",
        "draft_dispatches",
        "rest_dispatches",
    ):
        value, least = getattr(arguments, name), 0 if name != "bandwidth_gb_s" else 1e-3
        if not (math.isfinite(value) and value >= least):
            raise InputError(f"{name} must be a number of at least {least:g}, got {value:g}")


def _read(file: Path, temperature: float) -> list[TracedText]:
    """Return the traces of a file that were drawn at a temperature."""
    try:
        rows = parse_json(file.read_text(encoding="utf-8"))
        found = [TracedText(row["places"]) for row in rows if row["temperature"] == temperature]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} holds no traces: {type(error).__name__}: {error}") from None
    if not found:
        raise InputError(f"{file} holds no traces at temperature {temperature:g}")
    return found


def _open(arguments: argparse.Namespace) -> tuple[Bench, list[list[int]]]:
    if arguments.model and not arguments.drafter:
        raise InputError("a model of your own needs a drafter; name one with --drafter")
    config = BenchmarkConfig(num_prompts=arguments.num_prompts, max_tokens=arguments.max_tokens)
    law = Sampling(arguments.temp)
    model, tokenizer = cli.load_model(arguments)
    drafter = arguments.drafter or bundled("stories-14m-redrafter")
    bench = Bench(
        model,
        tokenizer,
        mlx_distill.load_drafter(drafter, model, tokenizer),
        None,
        law,
        config,
    )
    asked = in_turn(read_asked(arguments.data or PROMPTS, tokenizer))[: config.num_prompts]
    return bench, [one.ids for one in asked]


def _trace(
    bench: Bench, prompts: Sequence[list[int]], arguments: argparse.Namespace
) -> list[TracedText]:
    """Return the traces of the texts that the benchmark writes, with its seeds."""
    pair = bench.model, bench.tokenizer
    found = []
    for number, prompt in enumerate(prompts):
        law, limit = arguments.temp, arguments.max_tokens
        seed = bench.config.seed + number
        trace = record_trace(pair, bench.drafter, prompt, law, limit, seed)
        if trace["places"]:
            found.append(TracedText(trace["places"]))
    if not found:
        raise InputError("every answer ended with its first token, so nothing was drafted")
    return found


def _validate(
    bench: Bench, prompts: Sequence[list[int]], traces: Sequence[TracedText]
) -> list[dict[str, Any]]:
    """Print and return what is predicted of this machine beside what is measured on it."""
    context = len(prompts[0]) + bench.config.max_tokens // 2
    config = CalibrationConfig(
        rows=(1, 2, 3, 5, 8, 16),
        contexts=(context,),
        widths=(1, 2, 4),
        lengths=(2, 3, 4, 6),
        rounds=3,
    )
    pair = Pair(bench.model, bench.tokenizer, bench.drafter)
    costs: list[Costs] = []
    samples: dict[DraftPlan, dict[str, list[Sample]]] = {plan: {} for plan in SHAPES}
    for turn in range(min(TURNS, len(prompts))):
        costs.append(_costs(pair, config, bench))
        for plan, so_far in samples.items():
            for arm, found in bench.run(prompts[turn::TURNS], plan, _shape(plan)).items():
                so_far.setdefault(arm, []).extend(found)
    print("This machine, predicted from its calibration and the traces, and measured:")
    rows = []
    for plan in SHAPES:
        measured = summary(samples[plan])[-1]
        told = [predict(one, traces, plan, context) for one in costs]
        predicted = statistics.mean(one.speedup for one in told)
        speedup = measured["speedup"]["median"]
        print(
            f"  {_shape(plan):<22} speed-up {predicted:.2f} predicted, {speedup:.2f} measured "
            f"({predicted / speedup - 1:+.0%}); tokens per call {told[0].tokens_per_cycle:.2f}, "
            f"{measured['tokens_per_call']:.2f}"
        )
        rows.append({"shape": _shape(plan), "predicted": predicted, "measured": speedup})
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    verdict = "as they should" if worst <= AGREES else "more than 10 %: do not rely on what follows"
    print(
        f"They differ by at most {worst:.1%}, {verdict}. Times of the same work differed by "
        f"{max(one.spread for one in costs):.0%}."
    )
    return rows


def _costs(pair: Pair, config: CalibrationConfig, bench: Bench) -> Costs:
    """Return what decoding costs on this machine now."""
    costs = calibrate(pair, config).costs
    return costs.sampled() if bench.sampling.temperature else costs


def _predict(traces: Sequence[TracedText], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return what the model says of the chip."""
    print(f"\nM2 Ultra, {MODEL}; acceptance of the traces, temperature {arguments.temp:g}:")
    rows = []
    for curve in published_curves("m2-ultra"):
        if curve.plain_s > SLOWEST_S:
            continue
        chip = Chip(
            bandwidth_bytes_per_s=1e9 * arguments.bandwidth_gb_s,
            dispatch_s=1e-6 * arguments.dispatch_us,
            drafter_bytes=1e9 * arguments.drafter_gb,
            dispatches_per_token=arguments.draft_dispatches / 4,
            rest_dispatches=arguments.rest_dispatches,
        )
        print(f"  {curve.model}: plain {1e3 * curve.plain_s:.1f} ms per token, V(T) from")
        print("".join(f"    {source}\n" for source in curve.sources), end="")
        for hopeful in (False, True):
            costs = chip.costs(curve, hopeful)
            reading = "hopeful" if hopeful else "cautious"
            found = {"best": best(costs, traces)}
            found["default"] = predict(costs, traces, DraftPlan(), CONTEXT)
            for name, one in found.items():
                parked = "; below 1 the planner parks" if one.speedup < 1 else ""
                print(
                    f"    {reading:<8} {name:<7} {_shape(one.plan):<22} {one.speedup:.2f} x, "
                    f"{one.tokens_per_cycle / one.cycle_s:.0f} tokens/s, "
                    f"{one.tokens_per_cycle:.2f} tokens per cycle of {1e3 * one.cycle_s:.1f} ms"
                    f"{parked}"
                )
                shape = {"model": curve.model, "reading": reading, "shape": _shape(one.plan)}
                rows.append(shape | {"which": name, "speedup": one.speedup})
    return rows


def _shape(plan: DraftPlan) -> str:
    return f"{plan.beam_width} x {plan.draft_length}, {plan.nodes} nodes"


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=(__doc__ or "").splitlines()[0])
    cli.add_model_flags(parser)
    cli.add_drafter_flag(parser)
    parser.add_argument("--data", type=cli.path, help="JSONL of prompts (default: story openings)")
    parser.add_argument("--traces", type=cli.path, help="JSON of traces, instead of a pair")
    parser.add_argument("--output", type=cli.path, help="write the results to this JSON file")
    parser.add_argument("--temp", type=float, default=0.0, help="temperature (0)")
    parser.add_argument("--num-prompts", type=int, default=8, help="texts that are traced (8)")
    parser.add_argument("--max-tokens", type=int, default=100, help="of each text (100)")
    parser.add_argument("--validation", action=argparse.BooleanOptionalAction, default=True)
    for name, value, told in (
        ("bandwidth-gb-s", 800.0, "of the chip's memory, GB per second"),
        ("dispatch-us", 4.0, "microseconds of a dispatch, assumed"),
        ("draft-dispatches", 40.0, "of a draft of 4 tokens, as benchmark --dispatches counts"),
        ("rest-dispatches", 60.0, "of the rest of a cycle, counted in the same way"),
        ("drafter-gb", 0.86, "that the drafter reads per token; this is a 7B's in float16"),
    ):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{told} ({value:g})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
