r"""Every drafter of a model on the same prompts, by class: tokens per call, and speed.

    python examples/compare_drafters.py --output stories-drafters.json
    python examples/compare_drafters.py --model DIR --data question.jsonl --output drafters.json \
        --drafters ngram my-drafter ngram+my-drafter auto+my-drafter --draft-models small-model

Tokens per call are those of trees of 8 nodes on the answers that mlx-lm writes: no clock has a part
in them. The speed is that of decoding as `generate` does it, in tokens per second after the first
token, as a share of mlx-lm's on the same prompt; all take turns prompt by prompt, and nothing else
should run. What stands for a drafter is what ``load_drafter`` takes.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx_distill  # loads a fast BLAS on Linux, before anything else loads mlx
from mlx_distill import DraftPlan, cli, load_drafter, machine, stream_generate

# isort: split
import mlx_lm
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from mlx_distill.benchmarking.arms import PLAIN, Sample, measure, settled
from mlx_distill.benchmarking.benchmark import usable
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.calibration.pair import Pair
from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import GREEDY
from mlx_distill.data.prompts import Asked, in_turn, read_asked
from mlx_distill.data.report import Report
from mlx_distill.distillation.responses import Response
from mlx_distill.drafters.auto import AutoDrafter
from mlx_distill.evaluation.drafts import ALL, class_name, judge_drafts
from mlx_distill.files import write_whole
from mlx_distill.target.target import Target

OPENINGS = Path(mlx_distill.__file__).parent / "data" / "story_openings.jsonl"
TREE = DraftPlan(beam_width=4, draft_length=4, nodes=8)


@dataclass
class Arm:
    """A way to write.

    Args:
        name: It.
        drafter: Drafts; None for mlx-lm.
        samples: Of every prompt.
        worth: Tokens and calls of trees, by class.
    """

    name: str
    drafter: Any
    samples: list[Sample] = field(default_factory=list)
    worth: dict[str, tuple[int, int]] = field(default_factory=dict)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return the exit status."""
    arguments = _parser().parse_args(argv)
    output, settings = cli.new_file(arguments.output), cli.settings(arguments)
    model, tokenizer = cli.load_model(arguments)
    config = BenchmarkConfig(num_prompts=arguments.num_prompts, max_tokens=arguments.max_tokens)
    asked = read_asked(arguments.data or OPENINGS, tokenizer)
    asked = usable(model, in_turn(asked), config, Report(noun="prompts"))
    plain = Arm(PLAIN, None)
    arms = _arms(arguments, model, tokenizer)
    _write(model, tokenizer, [plain, *arms] if arguments.speed else [plain], asked, config)
    answers = [
        Response(one.ids, sample.tokens) for one, sample in zip(asked, plain.samples, strict=True)
    ]
    for arm in tqdm(arms, unit="drafter", leave=False):
        if not isinstance(arm.drafter, AutoDrafter):
            _judge(arm, Target.of(model), answers, asked)
    result = {
        "prompts": len(asked),
        "rows": [_row(arm, plain, asked) for arm in arms],
        "config": settings,
        **machine.provenance(),
    }
    _show(result)
    if output:
        write_whole(output, json.dumps(result, indent=1) + "\n")
    return 0


def _arms(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> list[Arm]:
    """Return the drafters that are compared."""
    default = arguments.model is None
    small = str(bundled("stories-14m-redrafter"))
    names = arguments.drafters or (["ngram", small, f"ngram+{small}"] if default else ["ngram"])
    models = arguments.draft_models or ([str(bundled("stories-4m"))] if default else [])
    arms = [Arm(_short(name), load_drafter(name, model, tokenizer)) for name in names]
    for name in models:
        arguments.draft_model = name
        drafter = cli.drafter_of(cli.load_draft_model(arguments, tokenizer), model, None)
        arms.append(Arm(f"draft model {_short(name)}", drafter))
    return _told_apart(arms)


def _told_apart(arms: list[Arm]) -> list[Arm]:
    """Return arms of which those that are called like others have numbers behind their names."""
    seen = Counter[str]()
    for arm in arms:
        seen[arm.name] += 1
        arm.name += f" ({seen[arm.name]})" if seen[arm.name] > 1 else ""
    return arms


def _short(name: str) -> str:
    """Return a drafter's name without folders."""
    return "+".join(Path(part).name for part in name.split("+"))


def _write(
    model: Any, tokenizer: Any, arms: list[Arm], asked: list[Asked], config: BenchmarkConfig
) -> None:
    """Let every arm answer every prompt, in turn, after one that does not count."""

    def plain(prompt: list[int], seed: int) -> Iterator[Any]:
        return mlx_lm.stream_generate(model, tokenizer, prompt, config.max_tokens)

    def drafted(drafter: Any, prompt: list[int], seed: int) -> Iterator[Any]:
        most = config.max_tokens
        return stream_generate(
            model, tokenizer, prompt, drafter=drafter, max_tokens=most, seed=seed
        )

    for arm in arms:
        decode = plain if arm.drafter is None else partial(drafted, arm.drafter)
        measure(decode, asked[0].ids, 0)
        if isinstance(arm.drafter, AutoDrafter):
            prompts = [one.ids for one in asked]
            pair = Pair(model, tokenizer, arm.drafter)
            print(settled(pair, GREEDY, prompts, config.max_tokens).sentence(), file=sys.stderr)
    order = list(arms)
    for one in tqdm(asked, unit="prompt", leave=False):
        order.append(order.pop(0))
        for arm in order:
            decode = plain if arm.drafter is None else partial(drafted, arm.drafter)
            arm.samples.append(measure(decode, one.ids, 0))


def _judge(arm: Arm, target: Target, answers: list[Response], asked: list[Asked]) -> None:
    """Count what trees are worth on the answers."""
    kinds = [one.kind or "" for one in asked]
    judged = judge_drafts(arm.drafter, target, answers, {"tree": TREE}, kinds)
    for kind, worth in judged.worth["tree"].items():
        arm.worth[class_name(kind)] = worth.tokens, worth.calls


def _row(arm: Arm, plain: Arm, asked: list[Asked]) -> dict[str, Any]:
    """Return the figures of an arm by class."""
    classes: dict[str, Any] = {}
    kinds = [class_name(one.kind or "") for one in asked]
    for kind in dict.fromkeys([ALL, *kinds]):
        tokens, calls = arm.worth.get(kind, (0, 0))
        ratios = [
            mine.tokens_per_s / other.tokens_per_s
            for mine, other, own in zip(arm.samples, plain.samples, kinds, strict=False)
            if kind in (ALL, own) and len(mine.tokens) > 1
        ]
        classes[kind] = {
            "tokens_per_call": tokens / calls if calls else None,
            "calls": calls,
            "speedup": statistics.median(ratios) if ratios else None,
            "speedups": ratios,
        }
    # Without --speed an arm writes nothing that could be equal.
    pairs = zip(arm.samples, plain.samples, strict=True) if arm.samples else None
    equal = None if pairs is None else sum(mine.tokens == other.tokens for mine, other in pairs)
    return {"drafter": arm.name, "classes": classes, "equal_texts": equal}


def _show(result: dict[str, Any]) -> None:
    """Print a table of tokens per call, and speed behind it."""
    table = Table(title="Tokens per call of 8 nodes (speed / mlx-lm's)", title_justify="left")
    table.add_column("drafter")
    for kind in result["rows"][0]["classes"]:
        table.add_column(escape(kind), justify="right")
    for row in result["rows"]:
        table.add_row(escape(row["drafter"]), *map(_cell, row["classes"].values()))
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 140)
    console.print(table)


def _cell(found: dict[str, Any]) -> str:
    tokens, speed = found["tokens_per_call"], found["speedup"]
    shown = "-" if tokens is None else f"{tokens:.2f}"
    return shown if speed is None else f"{shown} ({speed:.2f})"


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Compare drafters of one model on the same prompts.")
    cli.add_model_flags(parser)
    parser.add_argument(
        "--drafters",
        nargs="+",
        metavar="NAME",
        help="folders, ngram, ngram+FOLDER, auto+FOLDER (default: n-grams; with the bundled model "
        "its drafter and both, too)",
    )
    parser.add_argument(
        "--draft-models",
        nargs="+",
        metavar="DIR",
        help="small models that draft (default: none; stories-4m with the bundled model)",
    )
    parser.add_argument(
        "--data", type=cli.path, help="JSONL of prompts (default: story openings of our own)"
    )
    parser.add_argument("--num-prompts", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--speed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the speed, too (default: yes)",
    )
    parser.add_argument("--output", type=cli.path, help="write the figures to this JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
