"""A recurrent drafter for a model, from prompts to a folder: the model writes, the drafter learns.

prompts -> the target's answers (a file, used again) -> batches by length -> drafter -> folder
"""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_distill import machine
from mlx_distill.data.prompts import prompt_ids
from mlx_distill.data.report import Report
from mlx_distill.data.tokens import usable_tokenizer
from mlx_distill.distillation.answer_files import WrittenAnswers
from mlx_distill.distillation.answer_writing import (
    answered,
    check_enough,
    origin,
    usable_prompts,
    writer,
)
from mlx_distill.distillation.drafter_card import card
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.drafter_memory import memory_estimate
from mlx_distill.distillation.drafter_plan import plan
from mlx_distill.distillation.drafter_trainer import DrafterTrainer, Log
from mlx_distill.distillation.feature_store import check_disk, stored_row_bytes
from mlx_distill.distillation.own_prompts import as_rows, own_prompts
from mlx_distill.distillation.responses import Response, responses_hash
from mlx_distill.distillation.target_reader import TargetReader
from mlx_distill.drafters.fingerprint import Fingerprint, fingerprint
from mlx_distill.drafters.folders import save_drafter
from mlx_distill.drafters.networks import Network, Shape, change_shape
from mlx_distill.drafters.recurrent import RecurrentDrafterConfig
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import output_path, usable_path, write_whole
from mlx_distill.hashes import weights_hash
from mlx_distill.limits import check_value, listed
from mlx_distill.locks import locked, only_training
from mlx_distill.target.context import text_limit
from mlx_distill.target.target import Target
from mlx_distill.training.checkpoints import checkpoints, step_of
from mlx_distill.training.journal import LOG
from mlx_distill.training.runs import (
    LOCK,
    SETTINGS,
    begin_or_resume,
    check_output,
    check_settings,
    clear_away,
    partial_folder,
)

ANSWERS = "answers"  # the setting that says which: known when the target has written them
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray | mx.array


def train_drafter(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[Prompt] | WrittenAnswers | None,
    output: str | Path,
    config: DrafterTraining | None = None,
    *,
    start: Network | None = None,
    responses: str | Path | None = None,
    features: str | Path | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    report: Report | None = None,
    template_config: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Log:
    """Train a drafter for a model and write its folder; return the log.

    The drafter computes in the model's type. Where the best weights are kept, the best row of the
    log is theirs, by the expected number of accepted tokens of a greedy chain.

    Args:
        model: The target; never changes.
        tokenizer: Its tokenizer.
        prompts: Texts, chats as lists of ``{"role", "content"}`` messages, or token ids, as
            ``read_prompts`` returns them or in arrays; or answers that the model has written
            already; or None: the model writes its user's turns itself, too.
        output: The drafter's folder; must not exist.
        config: How; None takes the defaults.
        start: A drafter to start from, of the configuration's shape, perhaps without its blocks.
        responses: Where the model's answers are kept; None puts them beside the output.
        features: A folder where what the target computes of the answers is kept, in two bytes a
            number, for every epoch and for other trainings on the same answers. Without it, what
            does not fit in memory is computed in every epoch.
        resume: Go on with the unfinished training of this output. Settings, weights and answers
            have to be those that it was begun with.
        about: What settings and card say about data and model beside all that: ``data``, a list of
            names, ``start_from`` and whatever else decides what is learned.
        report: What became of the rows that the prompts were made of.
        template_config: Arguments of the chat template, for prompts that are not token ids.
        quiet: Draw no progress bar.

    Raises:
        InputError: If something does not fit, or the training cannot go on.
    """
    check_value("config", config, DrafterTraining | None)
    tokenizer = usable_tokenizer(tokenizer)
    if not isinstance(start, Network | None):
        raise InputError(f"start must be a drafter's network, got {start!r:.40}")
    _check_about(about)
    output, config = output_path(output), config or DrafterTraining()
    kept = usable_path(features, "the folder of features") if features is not None else None
    work = partial_folder(output)
    check_output(output, resume)
    target = Target.of(model)
    target.require_drafting()
    known = fingerprint(target, tokenizer)
    by = writer(model, tokenizer)
    settings = {"config": asdict(config), "target": known, **(about or {})}
    settings |= {"features": True} if kept else {}
    settings["weights"] = {"target": by["weights_hash"]}
    if start is not None:
        settings["weights"]["start_from"] = weights_hash(start)
    if resume and (work / SETTINGS).exists():  # else it was killed before it wrote any
        check_settings(work / SETTINGS, settings, unknown=(ANSWERS,))
    data = _data(target, tokenizer, prompts, config, template_config, report)
    _check_start(start, config.network(target))
    _check_room(target, config, data, kept)
    if responses is None:
        responses = output.with_name(output.name + ".responses.jsonl")
    path = output_path(responses)
    if not path.parent.is_dir() and path.parent != output.parent:
        raise InputError(f"{path} cannot be written: its folder does not exist")
    with only_training(), locked(work / LOCK, work):
        try:
            if not checkpoints(work):  # else what was learned from stands there
                write_whole(work / SETTINGS, json.dumps(settings, indent=1))
            written = _written(path, model, tokenizer, data, config, by, quiet)
            kinds = data.given and data.given.greedy
            settings[ANSWERS] = responses_hash(written, kinds or ())
            begin_or_resume(work, settings)
            trainer = DrafterTrainer(target, written, config, start, kinds, kept, by)
        except InputError:
            if not resume:  # nothing has been done that could go on
                shutil.rmtree(work)
            raise
        print(plan(trainer), file=sys.stderr)
        log = trainer.run(work, quiet)
        _check_log(work, log)
        trainer.kept(log).update(_with_confidence(trainer))
        _write(output, trainer, settings, known, data.report, log, data.own)
        clear_away(work)
    return log


def _check_about(about: Mapping[str, Any] | None) -> None:
    """Raise InputError if JSON has no form of it, or its data are no names."""
    if about is None:
        return
    try:
        json.dumps({**about})
    except (TypeError, ValueError) as error:
        raise InputError(f"about must hold names and values of JSON: {one_line(error)}") from None
    check_value("the data of about", about.get("data"), tuple[str, ...] | None)


def _check_log(work: Path, log: Log) -> None:
    """Raise InputError if the last step is not in the log of a training that time has ended."""
    last = step_of(checkpoints(work)[-1])
    if not log or log[-1]["step"] != last:
        raise InputError(f"{work / LOG} is damaged: it lacks step {last}, which is done")


@dataclass(frozen=True)
class _Data:
    """What is learned from.

    Args:
        prompts: Token ids.
        given: The answers to them, if they are there.
        own: The prompts' texts, where the target has written them itself.
        report: What became of the rows that all that was made of.
    """

    prompts: list[list[int]]
    given: WrittenAnswers | None
    own: list[str]
    report: Report


def _data(
    target: Target,
    tokenizer: Any,
    prompts: Iterable[Prompt] | WrittenAnswers | None,
    config: DrafterTraining,
    template_config: Mapping[str, Any] | None,
    report: Report | None,
) -> _Data:
    """Return what is learned from, without what the target cannot read.

    Raises:
        InputError: If too little remains, or the answers are another model's.
    """
    if isinstance(prompts, WrittenAnswers):
        report = report or Report(rows=len(prompts.responses), kept=len(prompts.responses))
        prompts.check(target.vocab_size, origin(target.model, tokenizer))
        given = _fitting(target.model, prompts, config, report)
        return _Data([one.prompt for one in given.responses], given, [], report)
    own: list[str] = []
    if prompts is None:
        report = report or Report(noun="prompts")
        own = _own(target, tokenizer, config, template_config, report)
        prompts = own
    given = listed("prompts", prompts)
    report = report or Report(rows=len(given), kept=len(given))
    ids = [
        prompt_ids(tokenizer, prompt, f"prompt {number}", template_config)
        for number, prompt in enumerate(given, start=1)
    ]
    usable = usable_prompts(target.model, ids, config.responses, report)
    check_enough(len(usable), config.held_out, "prompts", report)
    return _Data(usable, None, own, report)


def _written(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    data: _Data,
    config: DrafterTraining,
    by: Fingerprint,
    quiet: bool,
) -> list[Response]:
    """Return the answers: those that were given, or the model's, written now into a file."""
    if data.given:
        return data.given.responses
    with locked(path):
        return answered(path, model, tokenizer, data.prompts, config.responses, by, quiet)


def _check_room(target: Target, config: DrafterTraining, data: _Data, kept: Path | None) -> None:
    """Say how much memory is needed.

    Raises:
        InputError: If the features are to be kept on a disk that is too small.
    """
    if data.given:
        longest, tokens = data.given.longest, data.given.num_tokens
    else:
        longest = longest_text(target.model, data.prompts, config)
        tokens = len(data.prompts) * config.responses.max_tokens
    rows = tokens + sum(min(config.look_back, len(prompt) - 1) for prompt in data.prompts)
    print(memory_estimate(target, config, longest, rows), file=sys.stderr)
    if kept and not kept.exists():  # what is there may be enough
        reader = TargetReader(target, config.taps(target), config.batch_size)
        check_disk(kept, rows * stored_row_bytes(reader))


def _write(
    output: Path,
    trainer: DrafterTrainer,
    settings: dict[str, Any],
    known: dict[str, Any],
    report: Report,
    log: Log,
    own: Sequence[str],
) -> None:
    """Write the drafter's folder, with the prompts that the target has written itself."""
    rows, kept = report.to_dict(), trainer.kept(log)
    made = {**settings, "rows": rows, "log": log, "kept_step": kept["step"]}
    made |= machine.provenance()
    files = {
        "training.json": json.dumps(made, indent=1),
        "README.md": card(
            output.name,
            trainer.network,
            settings,
            trainer.counts(),
            rows,
            log,
            kept,
        ),
    }
    if own:
        files["prompts.jsonl"] = as_rows(own)
    save_drafter(output, trainer.network, known, files, trainer.directions())


def _with_confidence(trainer: DrafterTrainer) -> dict[str, float]:
    """Let the drafter weigh paths by what is fitted for it; return that, and say it."""
    found = trainer.confidence()
    if found is None:
        return {}
    change_shape(trainer.network, sharpness=found.sharpness)
    rates = trainer.choice_rates()
    if rates:
        change_shape(trainer.network, hit_rates=rates)
    print(
        f"confidence of paths: a sharpness of {found.sharpness:g} fits the held-out answers; "
        f"expected calibration error {found.error:.3f}, {found.error_before:.3f} without",
        file=sys.stderr,
    )
    return {"calibration_error": found.error, "calibration_error_before": found.error_before}


def _own(
    target: Target,
    tokenizer: Any,
    config: DrafterTraining,
    template_config: Mapping[str, Any] | None,
    report: Report,
) -> list[str]:
    """Return prompts that the target writes itself; the seed decides which, also when resumed."""
    return own_prompts(
        target.model,
        tokenizer,
        config.own_prompts,
        rows=config.responses.response_batch_size,
        seed=config.responses.response_seed,
        template_config=template_config,
        report=report,
    )


def longest_text(model: nn.Module, prompts: Sequence[list[int]], config: DrafterTraining) -> int:
    """Return the most tokens that a prompt and its answer can have."""
    longest = max(map(len, prompts)) + config.responses.max_tokens
    return min(longest, text_limit(model) or longest)


def _fitting(
    model: nn.Module, given: WrittenAnswers, config: DrafterTraining, report: Report
) -> WrittenAnswers:
    """Return the answers that the model can read; say what was dropped, and whether few remain."""
    limit = text_limit(model)
    if limit is not None:
        given = given.within(limit, report)
    check_enough(len(given.responses), config.held_out, "answers", report)
    return given


def _check_start(start: Network | None, shape: Shape) -> None:
    """Raise InputError unless a drafter can be started from; blocks may be added to it."""
    if start is None:
        return
    without = shape.without_blocks if isinstance(shape, RecurrentDrafterConfig) else shape
    if start.config.unfitted not in (shape, without):
        raise InputError(
            f"the drafter to start from has another shape: {start.config}, not {shape}"
        )
