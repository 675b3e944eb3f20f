"""A distillation from files to files: parts are opened, the student learns, its folder is made."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_distill import machine
from mlx_distill.arrays import num_parameters
from mlx_distill.checkpoint import load
from mlx_distill.config import flat
from mlx_distill.data.texts import Text
from mlx_distill.distillation.batches import JUDGED_BATCHES, slices
from mlx_distill.distillation.card import Figures, model_card
from mlx_distill.distillation.checkpointing import checkpoint_layers
from mlx_distill.distillation.config import DistillConfig
from mlx_distill.distillation.exporting import adapters_of, compact, export
from mlx_distill.distillation.judgement import judge
from mlx_distill.distillation.memory import Batch, Work, memory_estimate
from mlx_distill.distillation.on_policy import prompt_of
from mlx_distill.distillation.parts import Opening, Parts
from mlx_distill.distillation.teachers import Answers, Teacher, TextTeacher
from mlx_distill.distillation.training import Distilled, distill
from mlx_distill.errors import InputError
from mlx_distill.locks import Busy, locked
from mlx_distill.training.best import kept_step
from mlx_distill.training.checkpoints import checkpoints
from mlx_distill.training.journal import CURVES, LOG, TABLE, draw_curves, write_table
from mlx_distill.training.runs import LOCK, clear_away, partial_folder

WORSE = 0.01  # a share of the figure: what merging and rounding may cost without a word


@dataclass(frozen=True)
class Outcome:
    """What a finished run has come to.

    Args:
        parameters: The student's, adapters included.
        figures: Held out: "before", "trained" where it is another model than the files', "after".
        notes: What the user should know, in sentences.
    """

    parameters: int
    figures: Figures
    notes: list[str]


def train_student(
    config: DistillConfig,
    parts: Parts,
    output: Path,
    opening: Opening,
    *,
    callback: Any = None,
    quiet: bool = False,
) -> Distilled:
    """Train a student in the partial folder of an output; a run that was stopped goes on there.

    Raises:
        InputError: If the loss is not a number, or the folder holds a run with other settings.
            Where no checkpoint was written, nothing is left.
    """
    work = partial_folder(output)
    student, corpus = parts.student, parts.corpus
    if config.grad_checkpoint:
        checkpoint_layers(student.network)
    settings = asdict(config)
    if opening.template_config:
        settings["template_config"] = opening.template_config
    try:
        return distill(
            student.network,
            parts.teacher,
            corpus.texts,
            folder=work,
            losses=config.terms,
            valid=corpus.valid,
            valid_teacher=parts.judging,
            training=config.training,
            batch_size=config.batch_size,
            on_policy=config.rollouts,
            eos_token_ids=sorted(student.tokenizer.eos_token_ids),
            seed=config.seed,
            settings=settings,
            callback=callback,
            quiet=quiet,
        )
    except (InputError, KeyboardInterrupt):
        # What is there may be another run's: the training asks that not before it has read all.
        with suppress(Busy, OSError), locked(work / LOCK):
            if not checkpoints(work):  # nothing to resume
                shutil.rmtree(work, ignore_errors=True)
        raise


def memory_of(config: DistillConfig, parts: Parts) -> str:
    """Return the memory that a run takes, in words.

    Raises:
        InputError: If that is more than the machine has.
    """
    texts, valid, rollouts = parts.corpus.texts, parts.corpus.valid, config.rollouts
    width = max(len(text.tokens) for text in texts)
    written = None
    if rollouts.on_policy:
        # Without draws a chat is continued at its last answer, behind its longest prompt.
        prompts = [prompt_of(text, 0, rollouts.rollout_prompt_tokens) for text in texts]
        longest = max(len(prompt.tokens) for prompt in prompts) + rollouts.rollout_max_tokens
        written = Batch(min(rollouts.rollout_texts, len(texts)), longest)
        width = max(width, longest)
    judged = min(JUDGED_BATCHES * config.batch_size, len(valid))
    work = Work(
        Batch(config.batch_size, width),
        Batch(judged, max(len(text.tokens) for text in valid)) if valid else None,
        written,
        config.grad_checkpoint,
        config.training.accumulate > 1,
    )
    return memory_estimate(parts.student.network, parts.networks, work)


def finish(
    config: DistillConfig, parts: Parts, output: Path, opening: Opening, done: Distilled
) -> Outcome:
    """Write a trained student's folder, judged as it is written; clear the partial one away.

    Raises:
        InputError: If it cannot be written; the checkpoints stay, and ``--resume`` comes back here.
    """
    work = partial_folder(output)
    student, corpus = parts.student, parts.corpus
    trained = _figures_of(student.network, parts, config)
    parameters = num_parameters(student.network)
    own = compact(student.network, student.config, config.export, student.stored)
    if not config.export.keep_adapters:
        parameters = num_parameters(student.network)
    figures: Figures = {"before": done.before}
    write_table(done.log, work / TABLE)
    draw_curves([{"step": 0, "held_out": done.before}, *done.log], work / CURVES, output.name)

    def files(folder: Path) -> dict[str, str | bytes]:
        network, _ = load(
            folder,
            adapter_path=adapters_of(folder),
            trust_remote_code=opening.trust_remote_code,
        )
        after = _figures_of(network, parts, config)
        if after != trained:
            figures["trained"] = trained
        figures["after"] = after
        return _files(config, parts, output.name, opening, work, done, figures, parameters)

    apart = config.adapter if config.export.keep_adapters else None
    export(
        *(output, student.network, own, student.tokenizer, files),
        source=student.source,
        adapter=apart,
    )
    clear_away(work)
    return Outcome(parameters, figures, _notes(config, figures, corpus.valid))


def _figures_of(network: Any, parts: Parts, config: DistillConfig) -> dict[str, float]:
    """Return what the held-out texts say of a network."""
    judging: Teacher = parts.judging or parts.teacher or TextTeacher()
    network.eval()
    return judge(Answers(network, True), judging, slices(parts.corpus.valid, config.batch_size))


def _files(
    config: DistillConfig,
    parts: Parts,
    name: str,
    opening: Opening,
    work: Path,
    done: Distilled,
    figures: Figures,
    parameters: int,
) -> dict[str, str | bytes]:
    """Return what lies beside the student: its settings, its log and its card."""
    template = dict(opening.template_config or {})
    given = {"chat_template_config": json.dumps(template)} if template else {}
    run = {
        "config": asdict(config),
        "template_config": template,
        "seed": config.seed,
        "texts": {
            **parts.corpus.to_dict(),
            "learned_tokens": sum(text.num_learned for text in parts.corpus.texts),
        },
        "steps": done.log[-1]["step"],
        "weights_of_step": kept_step(done.log, config.training),
        "held_out": figures,
        "notes": list(done.notes),
        **machine.provenance(),
    }
    return {
        "config.yaml": yaml.safe_dump(flat(config) | given, sort_keys=False),
        "training.json": json.dumps(run, indent=1) + "\n",
        "README.md": model_card(
            name, config, parts.corpus, done.log, figures, parameters, template, done.notes
        ),
        **{file: (work / file).read_bytes() for file in (LOG, TABLE, CURVES)},
    }


def _notes(config: DistillConfig, figures: Figures, valid: Sequence[Text]) -> list[str]:
    """Return what the figures ask for."""
    key = "kl" if "kl" in figures["after"] else "nats"
    before, after = figures["before"].get(key), figures["after"][key]
    trained = figures.get("trained", figures["after"])[key]
    notes = []
    if after > trained * (1 + WORSE):
        ways = "--export-dtype or --export-bits"
        if config.adapter.fine_tune != "full":
            ways = "--keep-adapters, --export-dequantized"
        notes.append(
            f"merging and rounding for the export cost {after - trained:.4f} {key} "
            f"({trained:.4f} trained, {after:.4f} in the files); see {ways}"
        )
    if before is not None and after > before:
        notes.append(
            f"its {key} is worse than before; a smaller --learning-rate or more --steps may help"
        )
    return notes
