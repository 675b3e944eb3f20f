"""Distil the bundled stories-14m into a student of less than a quarter of its parameters.

    python examples/distill_stories.py --data stories/

Every recipe sees the same texts in the same order, and takes as many steps of the same optimizer:

    plain         random weights, the texts alone: nothing of the teacher
    plain-kl      random weights, KL(teacher || student)
    layer         the teacher's first layer, embedding and head to start from; the texts alone
    response      that start, KL(teacher || student)
    feature       + cosine of the last layers' outputs
    relation      + similarities between tokens, in the last layers
    on-policy     half of the batches are written by the student, and judged by the teacher
    teacher-text  that start, hard labels on text that the teacher wrote
    cached        that start, the teacher's top 64 tokens, from disk
    cached-draws  32 of them, and 32 draws from the others

Each run is kept in ``--runs``, so that a study that was stopped goes on; the table is made of all
that is there. ``--keep RUN`` also exports a student.
"""

import argparse
import json
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import mlx_distill  # loads a fast BLAS on Linux, before anything else loads mlx
from mlx_distill import InputError, cli, machine
from mlx_distill.arrays import num_values
from mlx_distill.checkpoint import bundled
from mlx_distill.data.encoding import read_texts
from mlx_distill.data.selection import fit
from mlx_distill.data.teacher_cache import TeacherCache, write_cache
from mlx_distill.data.texts import Text
from mlx_distill.distillation.exporting import ExportConfig, compact, export
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.distillation.responses import ResponseConfig, read_responses, write_responses
from mlx_distill.distillation.students import from_config, from_layers, read_config
from mlx_distill.distillation.teachers import Answers, CachedTeacher, LiveTeacher
from mlx_distill.evaluation.metrics import report
from mlx_distill.evaluation.texts import evaluate
from mlx_distill.files import read_json, write_whole
from mlx_distill.hashes import tokenizer_hash, weights_hash
from mlx_distill.limits import Count, check_value

LOSSES = {
    "plain": ["hard"],
    "plain-kl": ["forward_kl"],
    "layer": ["hard"],
    "response": ["forward_kl"],
    "feature": ["forward_kl", "hidden_cosine:weight=0.5,layers=last"],
    "relation": ["forward_kl", "similarity_preserving:weight=100,layers=last"],
    "on-policy": ["forward_kl"],
    "teacher-text": ["hard"],
    "cached": ["sparse_kl"],
    "cached-draws": ["sparse_kl"],
}
# The best of some learning rates, each, on training texts that were not learned (see --tune).
RATES = {"layer": 2.5e-4, "teacher-text": 2.5e-4}
RATE = 1e-3  # of all others
# Students that learn the texts alone: from random weights, and from the teacher's layer.
BASELINES = ("plain", "layer")
# What all runs of a table have in common; rates may differ from recipe to recipe.
SHARED = ("data", "steps", "tune", "batch_size", "texts", "max_length", "valid_texts")


@dataclass
class Study:
    """What all recipes share.

    Args:
        teacher: Teaches.
        tokenizer: The teacher's and the student's.
        config: The teacher's configuration.
        texts: To learn.
        valid: Held out.
        arguments: Of the command.
    """

    teacher: Any
    tokenizer: Any
    config: dict[str, Any]
    texts: list[Text]
    valid: list[Text]
    arguments: argparse.Namespace

    def run(self, recipe: str, seed: int) -> dict[str, Any]:
        """Train and judge one student."""
        arguments = self.arguments
        student, config = from_layers(self.teacher, self.config, [0])
        if recipe.startswith("plain"):
            student = from_config(config, seed)
        start = time.perf_counter()
        done = self.train(student, recipe, seed)
        seconds = time.perf_counter() - start
        models = {"teacher": self.teacher, "student": student}
        found = report(evaluate(models, self.valid, "teacher", 16), "teacher", seed=seed)
        if f"{recipe}-{seed}" == arguments.keep:
            self.keep(student, config, found)
        return {
            "recipe": recipe,
            "seed": seed,
            "seconds": seconds,
            "parameters": num_values(student.parameters()),
            "teacher_parameters": num_values(self.teacher.parameters()),
            "found": found,
            "best": min(
                (row["held_out"] | {"step": row["step"]} for row in done.log if "held_out" in row),
                key=lambda found: found["nats"],
            ),
            "config": _settings(arguments),
            "losses": LOSSES[recipe],
            **machine.provenance(),
        }

    def train(self, student: Any, recipe: str, seed: int) -> mlx_distill.Distilled:
        """Train a student, from where it was stopped; return what came of it."""
        arguments = self.arguments
        work = arguments.runs / f"{recipe}-{seed}.partial"
        texts, teacher = self.texts, self.teacher
        if recipe == "teacher-text":
            texts, teacher = self.written(), None
        elif recipe.startswith("cached"):
            teacher = CachedTeacher(self.cache(draws=recipe == "cached-draws"))
        rollouts = OnPolicyConfig(
            on_policy=0.5, rollout_prompt_tokens=8, rollout_max_tokens=arguments.max_length - 8
        )
        done = mlx_distill.distill(
            student,
            None if LOSSES[recipe] == ["hard"] else teacher,
            texts,
            folder=work,
            losses=LOSSES[recipe],
            training=mlx_distill.TrainingConfig(
                steps=arguments.steps,
                learning_rate=_rate(recipe, arguments.rate),
                evaluate_every=max(1, min(arguments.steps // 4, 125)),
                checkpoint_every=80,
            ),
            valid=self.valid,
            valid_teacher=LiveTeacher([self.teacher]),
            batch_size=arguments.batch_size,
            on_policy=rollouts if recipe == "on-policy" else None,
            eos_token_ids=sorted(self.tokenizer.eos_token_ids),
            seed=seed,
        )
        if not done.finished:
            raise KeyboardInterrupt
        shutil.rmtree(work)
        return done

    def keep(self, student: Any, config: dict[str, Any], found: dict[str, Any]) -> None:
        """Export a student beside the runs."""
        settings = compact(student, config, ExportConfig("float16"))
        files = {"run.json": json.dumps(found, indent=1) + "\n"}
        folder = self.arguments.runs / self.arguments.keep
        export(folder, student, settings, self.tokenizer, files)

    def written(self) -> list[Text]:
        """Return as many texts, begun like those of the data and written by the teacher."""
        prompts = [text.tokens[:8] for text in self.texts]
        config = ResponseConfig(max_tokens=self.arguments.max_length - 8, temperatures=(1.0,))
        path = self.arguments.runs / "written.jsonl"
        known = {"weights_hash": weights_hash(self.teacher)}
        stops = self.tokenizer.eos_token_ids
        for count in write_responses(path, self.teacher, stops, prompts, config, known):
            print(f"the teacher wrote {count} of {len(prompts)} texts", file=sys.stderr)
        return [Text(one.prompt + one.response) for one in read_responses(path)]

    def cache(self, draws: bool) -> TeacherCache:
        """Return the teacher's answers to the texts, on disk."""
        folder = self.arguments.runs / ("draws" if draws else "cache")
        known = tokenizer_hash(self.tokenizer)
        header = {
            "tokenizer_hash": known,
            "weights_hash": weights_hash(self.teacher),
            "vocab_size": self.config["vocab_size"],
        }
        tail = "draws" if draws else "bucket"
        for count in write_cache(
            folder, Answers(self.teacher, texts=True), self.texts, header, tail=tail
        ):
            print(f"cached {count} of {len(self.texts)} texts", file=sys.stderr)
        return TeacherCache.open(folder, known, self.texts)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipes that are not there yet, and print the table; return the exit status."""
    arguments = _parser().parse_args(argv)
    known = _check(arguments)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    path = bundled("stories-14m")
    teacher, tokenizer = mlx_distill.load(path)
    texts, valid = _texts(arguments, tokenizer)
    study = Study(teacher, tokenizer, read_config(path), texts, valid, arguments)
    for recipe, seed in _asked(arguments):
        if (recipe, seed) not in known:
            file = arguments.runs / f"{recipe}-{seed}.json"
            write_whole(file, json.dumps(study.run(recipe, seed), indent=1) + "\n")
    runs = list(_known(arguments.runs).values())
    rows = summary(runs)
    show(rows)
    if arguments.json:
        result = {"summary": rows, "runs": runs}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _check(arguments: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the runs that are there.

    Raises:
        InputError: If a flag cannot be used, or a run was made otherwise than these would be.
    """
    for name in ("steps", "batch_size", "texts", "max_length", "valid_texts"):
        check_value(name, getattr(arguments, name), Count)
    if not any(arguments.data.glob("train*.jsonl")):
        raise InputError(f"{arguments.data} holds no train*.jsonl")
    if arguments.json and not arguments.json.parent.is_dir():
        raise InputError(f"{arguments.json} cannot be written: its folder does not exist")
    known, asked = _known(arguments.runs), _asked(arguments)
    for (recipe, seed), run in known.items():
        begun, now = run["config"], _settings(arguments)
        other = [name for name in SHARED if begun.get(name) != now[name]]
        rates = _rate(recipe, begun.get("rate")), _rate(recipe, arguments.rate)
        if other or ((recipe, seed) in asked and rates[0] != rates[1]):
            raise InputError(
                f"{arguments.runs} holds {recipe}-{seed} with another "
                f"{', '.join(other) or 'rate'}; name another --runs"
            )
    if arguments.keep:
        _check_kept(arguments)
    return known


def _check_kept(arguments: argparse.Namespace) -> None:
    """Raise InputError if the student to keep is none that is trained now, or that was kept."""
    keep = arguments.keep
    if keep not in {f"{recipe}-{seed}" for recipe, seed in _asked(arguments)}:
        raise InputError(f"--keep takes one of the runs that are asked for, got {keep}")
    file = arguments.runs / f"{keep}.json"
    if file.exists() and not (arguments.runs / keep).exists():
        raise InputError(f"{keep} was trained without --keep; remove {file} to train it again")


def _asked(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the recipes and seeds that are to be there."""
    pairs = [(recipe, seed) for seed in arguments.seeds for recipe in arguments.recipes]
    return list(dict.fromkeys(pairs))


def _known(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the runs of a folder by recipe and seed."""
    found = {}
    for recipe in LOSSES:
        for file in folder.glob(f"{recipe}-*.json"):
            seed = file.stem.removeprefix(f"{recipe}-")
            if re.fullmatch(r"-?\d+", seed):
                found[recipe, int(seed)] = read_json(file)
    return dict(sorted(found.items()))


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as JSON holds them; of folders and files the names."""
    return {
        key: value.name if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
    }


def _rate(recipe: str, asked: float | None) -> float:
    """Return a recipe's learning rate: the one that is asked for, or its best."""
    return RATES.get(recipe, RATE) if asked is None else asked


def _texts(arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[Text], list[Text]]:
    """Return the texts to learn, and those to judge by; no text is both."""
    texts = [
        text
        for file in sorted(arguments.data.glob("train*.jsonl"))
        for text in read_texts(file, tokenizer)
    ]
    if arguments.tune:
        count = arguments.valid_texts
        texts, valid = texts[:-count], texts[-count:]
        if not texts:
            raise InputError(f"--tune judges by {count} training texts, there are no more")
    else:
        valid = read_texts(arguments.data / "valid.jsonl", tokenizer)[: arguments.valid_texts]
    return fit(texts[: arguments.texts], arguments.max_length)[0], fit(valid, 192)[0]


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per recipe: means over seeds, with the seeds' 95 % t interval.

    A recipe's last step is compared with the best step of a student of the same seed that learned
    the texts alone: with one of random weights, and with one of the same start.
    """
    rows = []
    for recipe in LOSSES:
        mine = [run for run in runs if run["recipe"] == recipe]
        if not mine:
            continue
        row = {
            "recipe": recipe,
            "seeds": len(mine),
            "nats": _interval([_value(run, "student", "nats_per_token") for run in mine]),
            "kl": _interval([_value(run, "student", "kl") for run in mine]),
            "agreement": _interval([_value(run, "student", "agreement") for run in mine]),
            "best_nats": _interval([run["best"]["nats"] for run in mine]),
            "best_kl": _interval([run["best"]["kl"] for run in mine]),
            "seconds": statistics.mean(run["seconds"] for run in mine),
            "teacher_nats": _value(mine[0], "teacher", "nats_per_token"),
        }
        for baseline in BASELINES:
            best = {run["seed"]: run["best"] for run in runs if run["recipe"] == baseline}
            gaps = [_gap_closed(run, best[run["seed"]]) for run in mine if run["seed"] in best]
            if gaps and recipe not in BASELINES:
                closed, cut = zip(*gaps, strict=True)
                row |= {
                    f"gap_closed_{baseline}": _interval(closed),
                    f"kl_cut_{baseline}": _interval(cut),
                }
        rows.append(row)
    return rows


def _gap_closed(run: dict[str, Any], best: dict[str, float]) -> tuple[float, float]:
    """Return the shares of a baseline's distance to the teacher that are gone: nats, and KL."""
    nats, teacher = (_value(run, name, "nats_per_token") for name in ("student", "teacher"))
    closed = (best["nats"] - nats) / (best["nats"] - teacher)
    return closed, 1 - _value(run, "student", "kl") / best["kl"]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"Teacher: {rows[0]['teacher_nats']:.3f} nats per token" if rows else "")
    names = ["recipe", "seeds", "nats/token", "best step", "KL", "agreement"]
    names += [f"{name}, {one}" for one in BASELINES for name in ("gap closed", "KL cut")]
    for name in (*names, "s"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["recipe"],
            str(row["seeds"]),
            *(_cell(row[name], ".3f") for name in ("nats", "best_nats", "kl", "agreement")),
            *(
                _cell(row.get(f"{name}_{one}"), ".0%")
                for one in BASELINES
                for name in ("gap_closed", "kl_cut")
            ),
            f"{row['seconds']:.0f}",
        )
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 190)  # a pipe has no width of its own
    console.print(table)
    console.print(
        "Means over seeds; 95 % t intervals over seeds behind ±. All on held-out texts. Gaps "
        "are those of the baseline's best step, closed by the recipe's last."
    )


def _value(run: dict[str, Any], model: str, name: str) -> float:
    return run["found"][model][name]["value"]


def _interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean of a few values and half the width of its 95 % t interval."""
    count = len(values)
    half = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count) if count > 1 else 0.0
    return {"mean": statistics.mean(values), "half_width": half}


def t_quantile(freedom: int) -> float:
    """Return Student's t with 2.5 % above it.

    Source:
        Abramowitz and Stegun 1964, 26.7.5, from 5 degrees of freedom on, where it is right to
        three thousandths.
    """
    few = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    if freedom in few:
        return few[freedom]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _cell(value: dict[str, float] | None, form: str) -> str:
    if value is None:
        return ""
    half = f" ±{value['half_width']:{form}}" if value["half_width"] else ""
    return f"{value['mean']:{form}}{half}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of train*.jsonl, valid.jsonl"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("stories-runs"), help="where runs are kept"
    )
    parser.add_argument("--recipes", nargs="+", choices=LOSSES, default=["plain", "response"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, help="learning rate (default: each recipe's best)")
    parser.add_argument(
        "--tune", action="store_true", help="judge on training texts, to choose a rate"
    )
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--texts", type=int, default=1000, help="texts to learn from")
    parser.add_argument("--max-length", type=int, default=64, help="of a text to learn, in tokens")
    parser.add_argument("--valid-texts", type=int, default=48)
    parser.add_argument("--keep", metavar="RUN", help="export this run's student, e.g. response-0")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
