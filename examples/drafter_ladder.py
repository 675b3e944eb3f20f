"""What each part of a recurrent drafter brings: all rungs trained on the same answers, and judged.

    python examples/drafter_ladder.py --data prompts.jsonl --judge held-out.jsonl --output ladder
    python examples/drafter_ladder.py --model M --answers a.npz --judge spec.npz --output ladder

Every rung takes as many steps over the same starts of the same answers, from the same seed:

    R0           the published form: state from zero, head from random weights, KL
    R1           + gated cell, state started from the context, head started from the target's
    R2           + what layers inside the target returned
    R3           + a block of attention over the context
    R3x2         + a second one
    R2-lk        R2 with the loss that mixes in the share of rejected tokens
    R2-self      R2 whose drafts go on with its own samples in the last quarter of the training
    R2-8, R2-6, R2-4   R2 with weights of so many bits

A run that was stopped goes on with the same command: rungs that are there are not trained again,
and a half-trained one is resumed. What the target computes of the answers is kept beside the
rungs, once for all that read the same of it. The table is written as JSON and as markdown, and
drawn.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_distill  # loads a fast BLAS on Linux, before anything else loads mlx
from mlx_distill import InputError, TrainingConfig, cli, machine
from mlx_distill.calibration.pair import Pair
from mlx_distill.checkpoint import bundled
from mlx_distill.data.prompts import read_prompts
from mlx_distill.data.sources import check_sources
from mlx_distill.distillation.answer_files import WrittenAnswers, read_answers
from mlx_distill.distillation.answer_writing import origin
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.drafter_training import train_drafter
from mlx_distill.distillation.responses import ResponseConfig
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.evaluation.judging import JudgingConfig, Material, check_material, judge_drafter
from mlx_distill.files import output_path, read_json, write_whole
from mlx_distill.limits import Count, check_value
from mlx_distill.locks import locked
from mlx_distill.target.target import Target
from mlx_distill.training.runs import SETTINGS, check_settings, partial_folder

# What a rung's training does otherwise than the default, which is R2.
RUNGS: dict[str, dict[str, Any]] = {
    "R0": {
        "cell": "elman",
        "context_state": False,
        "head_from_target": False,
        "tap_layers": (-1,),
    },
    "R1": {"tap_layers": (-1,)},
    "R2": {},
    "R3": {"context_blocks": 1},
    "R3x2": {"context_blocks": 2},
    "R2-lk": {"loss": "lk"},
    "R2-self": {"self_unroll": 0.25},
}
# Rungs that are others with weights of so many bits.
PACKED = {"R2-8": ("R2", 8), "R2-6": ("R2", 6), "R2-4": ("R2", 4)}
# Columns of the table: a shape of drafts, and a temperature.
COLUMNS = [(name, "0") for name in ("chain of 4", "4 nodes", "8 nodes", "16 nodes")]
COLUMNS += [("8 nodes", "1"), ("16 nodes", "1")]

FREE = ("output", "rungs", "quiet")  # settings that a ladder may go on with otherwise


@dataclass
class Ladder:
    """What all rungs share.

    Args:
        folder: Holds them.
        model: The target.
        tokenizer: Its tokenizer.
        learned: What they learn: prompts that the target answers, or its answers.
        material: What they are judged on.
        arguments: Of the command.
    """

    folder: Path
    model: Any
    tokenizer: Any
    learned: list[list[int]] | WrittenAnswers
    material: Material
    arguments: argparse.Namespace

    def rung(self, name: str) -> dict[str, Any]:
        """Return what is known of a rung; train and judge it if that has not been done."""
        file = self.folder / f"{name}.json"
        if file.exists():
            return read_json(file)
        source, bits = PACKED.get(name, (name, None))
        if bits is None:
            self.trained(name)
        elif not (self.folder / name).exists():
            mlx_distill.quantize_drafter(self.trained(source), self.folder / name, bits)
        drafter = load_drafter(self.folder / name, self.model, self.tokenizer)
        pair = Pair(self.model, self.tokenizer, drafter)
        judging = JudgingConfig(
            chains=4, nodes=(4, 8, 16), rounds=0, answer_tokens=self.arguments.answer_tokens
        )
        made = read_json(self.folder / name / "training.json")
        found = {
            "rung": name,
            "bits": bits,
            "file_bytes": (self.folder / name / "model.safetensors").stat().st_size,
            "log": made["log"],
            "config": made["config"],
            **judge_drafter(pair, self.material, judging, quiet=self.arguments.quiet),
            **machine.provenance(),
        }
        write_whole(file, json.dumps(found, indent=1) + "\n")
        return found

    def trained(self, name: str) -> Path:
        """Return a rung's folder; train it, or go on with its training, if it is not there."""
        folder = self.folder / name
        if folder.exists():
            return folder
        arguments = self.arguments
        training = TrainingConfig(
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            evaluate_every=max(1, arguments.steps // 8),
            checkpoint_every=max(1, arguments.steps // 8),
            max_minutes=arguments.max_minutes,
        )
        answers = ResponseConfig(max_tokens=arguments.answer_tokens)
        config = DrafterTraining(
            starts=arguments.starts,
            held_out=arguments.held_out,
            responses=answers,
            training=training,
            **RUNGS[name],
        )
        read = "taps" + "".join(f"-{layer}" for layer in config.tap_layers or ("default",))
        read += "-and-context" if config.context_blocks else ""
        print(f"{name}: {RUNGS[name] or 'the default'}", file=sys.stderr)
        train_drafter(
            self.model,
            self.tokenizer,
            self.learned,
            folder,
            config,
            responses=self.folder / "answers.jsonl",
            features=self.folder / "features" / read,
            resume=partial_folder(folder).exists(),
            about={"data": [Path(arguments.data or arguments.answers).name]},
            quiet=arguments.quiet,
        )
        return folder


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train and judge the rungs that are not there; write the table; return the exit status."""
    arguments = _parser().parse_args(argv)
    if bool(arguments.data) == bool(arguments.answers):
        raise InputError("name either --data, prompts that the model answers, or --answers")
    check_value("max_prompts", arguments.max_prompts, Count | None)
    check_value("judge_texts", arguments.judge_texts, Count)
    folder = output_path(arguments.output)
    if arguments.data:
        check_sources([arguments.data])
    check_material(arguments.judge)  # before anything is loaded
    given = read_answers(arguments.answers) if arguments.answers else None
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "running", folder):
        _keep_settings(folder, arguments)
        ladder = _ladder(folder, arguments, given)
        rungs = [ladder.rung(name) for name in arguments.rungs]
    write_whole(folder / "ladder.json", json.dumps({"rungs": rungs}, indent=1) + "\n")
    write_whole(folder / "ladder.md", table(rungs))
    draw(rungs, folder / "ladder.png")
    print(table(rungs), end="")
    return 0


def _ladder(folder: Path, arguments: argparse.Namespace, given: WrittenAnswers | None) -> Ladder:
    """Return the target, what is learned and what is judged."""
    model, tokenizer = mlx_distill.load(arguments.model or bundled("stories-14m"))
    count = arguments.max_prompts
    if given is not None:
        given.check(Target.of(model).vocab_size, origin(model, tokenizer))
        learned = given.only(range(len(given.responses))[:count])
    else:
        learned = read_prompts(arguments.data, tokenizer)[:count]
    drafterless = Pair(model, tokenizer, mlx_distill.NGramDrafter())
    material = Material.read(arguments.judge, drafterless, arguments.judge_texts)
    return Ladder(folder, model, tokenizer, learned, material, arguments)


def _keep_settings(folder: Path, arguments: argparse.Namespace) -> None:
    """Note what the rungs are made with; refuse to add rungs that are made with anything else."""
    kept = {key: value for key, value in cli.settings(arguments).items() if key not in FREE}
    kept["answers"] = arguments.answers  # with its folder: others may have one of that name
    if (folder / SETTINGS).exists():
        check_settings(folder / SETTINGS, kept)
    write_whole(folder / SETTINGS, json.dumps(kept, indent=1) + "\n")


def table(rungs: Sequence[dict[str, Any]]) -> str:
    """Return the rungs as a table in markdown."""
    heads = ["rung", "steps", "file, MB", "held-out, first token"]
    heads += [f"{shape}, T = {temperature}" for shape, temperature in COLUMNS]
    lines = [heads, ["---"] * len(heads)]
    for rung in rungs:
        last = rung["log"][-1]
        cells = [rung["rung"], f"{last['step']:,}", f"{rung['file_bytes'] / 1e6:.1f}"]
        cells.append("".join(f"{share:.3f}" for share in last["acceptance_greedy"][:1]) or "-")
        cells += [f"{tokens_per_call(rung, *column):.3f}" for column in COLUMNS]
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tokens_per_call(rung: dict[str, Any], shape: str, temperature: str) -> float:
    """Return what a call brings, on all prompts together."""
    return rung["temperatures"][temperature]["shapes"][shape]["all"]["tokens_per_call"]


def draw(rungs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw tokens per call of every rung, and how they came to it, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = [rung["rung"] for rung in rungs]
    for shift, temperature in ((-0.2, "0"), (0.2, "1")):
        found = [tokens_per_call(rung, "8 nodes", temperature) for rung in rungs]
        places = [place + shift for place in range(len(rungs))]
        bars = left.bar(places, found, 0.38, label=f"T = {temperature}")
        left.bar_label(bars, fmt="%.2f", fontsize=7)
    left.set_xticks(range(len(rungs)), names)
    left.set(ylabel="tokens per call, 8 nodes", ylim=(1, None))
    left.legend()
    for rung in rungs:
        if rung["bits"] is None:
            judged = [row for row in rung["log"] if row["acceptance_greedy"]]  # else too short
            steps = [row["step"] for row in judged]
            first = [row["acceptance_greedy"][0] for row in judged]
            right.plot(steps, first, marker=".", label=rung["rung"])
    right.set(xlabel="step", ylabel="held-out acceptance of the first drafted token")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=(__doc__ or "").splitlines()[0])
    names = [*RUNGS, *PACKED]
    add = parser.add_argument
    add("--model", type=cli.path, help="the target (default: the bundled stories-14m)")
    add("--data", type=cli.path, help="JSONL of prompts, which the target answers")
    add("--answers", type=cli.path, metavar="NPZ", help="answers that the target has written")
    add("--judge", type=cli.path, required=True, help="held-out prompts, or answers to them")
    add("--output", type=cli.path, required=True, help="folder of the rungs and the table")
    add("--rungs", nargs="+", choices=names, default=names, help="which (default: all)")
    add("--steps", type=int, default=400, help="of every training (default: 400)")
    add("--max-minutes", type=float, help="of every training (default: as long as it takes)")
    add("--starts", type=int, default=1024, help="drafts per step (default: 1024)")
    add("--learning-rate", type=float, default=1e-3, help="at its peak (default: 1e-3)")
    add("--max-prompts", type=int, help="learn from the first so many (default: all)")
    add("--answer-tokens", type=int, default=128, help="of answers to --data (default: 128)")
    add("--held-out", type=int, default=16, help="answers that are not learned (default: 16)")
    add("--judge-texts", type=int, default=48, help="texts to judge on (default: 48)")
    add("--quiet", action="store_true", help="draw no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())
