"""``distill``: a student, its teachers and data in; a trained student and its log out."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx import nn
from mlx.utils import tree_flatten
from tqdm import tqdm

from mlx_distill.compat import complete
from mlx_distill.data.teacher_cache import texts_hash
from mlx_distill.data.texts import Text
from mlx_distill.distillation.adapters import has_adapters
from mlx_distill.distillation.batches import Data, batch_of, batches, seeded, slices
from mlx_distill.distillation.distiller import Distiller, Examples, Taught
from mlx_distill.distillation.given import Given, readable
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.distillation.teachers import CachedTeacher, LiveTeacher, Teacher, TextTeacher
from mlx_distill.distillation.terms import LossTerm, drowned
from mlx_distill.errors import InputError
from mlx_distill.files import arrays_hash, usable_path
from mlx_distill.hashes import weights_hash
from mlx_distill.limits import Count, Seed, check_value, listed, plain
from mlx_distill.locks import locked, only_training
from mlx_distill.training.checkpoints import checkpoints, step_of
from mlx_distill.training.config import ADAPTERS, NEW, PRETRAINED, TrainingConfig
from mlx_distill.training.journal import Journal
from mlx_distill.training.loop import Progress, stopping, train
from mlx_distill.training.runs import LOCK, begin_or_resume


@dataclass(frozen=True)
class Distilled:
    """What a training has come to.

    Args:
        before: What was held out said of the student that was handed in.
        log: A row per step: the loss, its parts, and on some steps what was held out.
        notes: What the user should know, in sentences.
        finished: False if Ctrl-C ended it; calling again with the same folder, and the student as
            it was at first, goes on.
    """

    before: dict[str, float]
    log: list[dict[str, Any]]
    notes: list[str]
    finished: bool


def distill(
    student: nn.Module,
    teachers: nn.Module | Sequence[nn.Module] | Teacher | None,
    data: Data,
    *,
    folder: str | Path,
    losses: str | LossTerm | Sequence[str | LossTerm] = ("forward_kl",),
    valid: Data | None = None,
    valid_teacher: nn.Module | Teacher | None = None,
    training: TrainingConfig | None = None,
    trained: str | None = None,
    batch_size: int = 8,
    weights: Sequence[float] | None = None,
    mean: str = "probs",
    on_policy: OnPolicyConfig | None = None,
    eos_token_ids: Sequence[int] = (),
    augment: Callable[[Examples, int], Examples] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    callback: Any = None,
    quiet: bool = False,
) -> Distilled:
    """Train a student, in place, on what teachers say about data.

    A run that was killed goes on from the last checkpoint in ``folder`` when it is called again
    with the same arguments, and ends with the same bits; one that has ended returns its result. The
    student has to be what it was at first, not what the run has made of it so far.

    Args:
        student: A language model of mlx-lm, or any network from inputs to logits (B, C).
        teachers: One network, several, a ``Teacher`` (a cache, for example), or None: then the data
            are all there is, and only hard labels can be learned.
        data: Texts, or examples of a classifier.
        folder: Checkpoints and the log.
        losses: A term or several of a weighted sum, as ``"forward_kl:weight=0.9,temperature=2"``.
        valid: Held out, of the same kind; None judges nothing.
        valid_teacher: Judges there instead; for a cache, which knows its own texts only.
        training: Steps, learning rate and so on; None for the defaults.
        trained: What the learning rate follows from where ``training`` has none: "new weights",
            "chosen layers", "pretrained weights" or "adapters". None: adapters where there are
            some, else new weights of a classifier and pretrained ones of a language model.
        batch_size: Texts or examples per batch.
        weights: Of several teachers; None for equal ones.
        mean: Of several teachers: "probs" or "logits".
        on_policy: Lets the student write a share of the batches.
        eos_token_ids: What ends a text that the student writes.
        augment: Changes a batch of examples before anybody sees it; it is given the batch's number,
            on which alone its randomness may depend.
        seed: Of the order of the data, and of everything that is drawn.
        settings: What must be the same for a run to go on, as JSON, beside the student, the
            teachers and the data, held out or not; None takes the arguments.
        callback: An mlx-lm ``TrainingCallback``.
        quiet: Draw no progress bar.

    Raises:
        InputError: If the parts do not fit each other, the loss is not a number, or ``folder``
            holds a run with other settings.
    """
    folder, terms = usable_path(folder, "the folder"), _terms(losses)
    data, valid = _data("data", data), None if valid is None else _data("valid", valid)
    seed, batch_size = plain(seed), plain(batch_size)
    eos_token_ids = plain(listed("eos_token_ids", eos_token_ids))
    for name, value, hint in (
        ("seed", seed, Seed),
        ("eos_token_ids", eos_token_ids, tuple[int, ...]),
        ("training", training, TrainingConfig | None),
        ("on_policy", on_policy, OnPolicyConfig | None),
    ):
        check_value(name, value, hint)
    _check_data(data, valid)
    _check_student(student)
    texts = not isinstance(data, Examples)
    training = (training or TrainingConfig()).resolved(trained or _trained(student, texts))
    teacher = _teacher(teachers, texts, weights, mean)
    if valid_teacher is not None:
        valid_teacher = _teacher(valid_teacher, texts, None, mean)
    _check(batch_size, valid, training, teacher, on_policy)
    given = readable(student, teacher, data, valid, on_policy, set(eos_token_ids))
    parts = _parts(student, teacher, given, valid_teacher)
    if settings:
        settings = {**settings, "given": parts}  # names of its own may be the same
    else:
        chosen = _chosen(terms, training, batch_size, on_policy, eos_token_ids, seed)
        settings = {**chosen, **parts}
    with only_training(), locked(folder / LOCK, folder):
        begin_or_resume(folder, settings)
        data, limit = given.data, given.limit
        done = checkpoints(folder)
        learned = step_of(done[-1]) * training.accumulate if done else 0
        batch_at = batches(
            *(student, data, batch_size, on_policy, eos_token_ids, folder, augment, seed, limit),
            learned=learned,
        )
        distiller = _distiller(student, teacher, terms, given, seed)
        done = _run(
            distiller,
            lambda number: distiller.teach(seeded(batch_at(number), number, seed)),
            _judge(distiller, given, batch_size, valid_teacher),
            training,
            folder,
            callback,
            quiet,
        )
        return replace(done, notes=[*given.notes, *done.notes])


def _distiller(
    student: nn.Module, teacher: Teacher, terms: Sequence[LossTerm], given: Given, seed: int
) -> Distiller:
    """Return what computes the losses of a student, after a look at the data."""
    data = given.data
    size = data.labels.size if isinstance(data, Examples) else len(data)
    first = batch_of(data, range(min(2, size)), given.limit)
    distiller = Distiller(student, teacher, terms, first, size, seed)
    for examples in (data, given.valid):
        if isinstance(examples, Examples):
            distiller.check_labels(examples)
    return distiller


def _judge(
    distiller: Distiller, given: Given, batch_size: int, teacher: Teacher | None
) -> Callable[[], dict[str, float]]:
    """Return what evaluates a student on the held-out data; without any it says nothing."""
    valid = given.valid
    if valid is None:
        return dict
    if isinstance(distiller.teacher, CachedTeacher):  # it knows its own texts only
        teacher = teacher or TextTeacher()
    return lambda: distiller.evaluate(slices(valid, batch_size, given.limit), teacher)


def _run(
    distiller: Distiller,
    batch_at: Callable[[int], Taught],
    evaluate: Callable[[], dict[str, float]],
    training: TrainingConfig,
    folder: Path,
    callback: Any,
    quiet: bool,
) -> Distilled:
    """Train what a distiller trains, from the last checkpoint on, and judge it before."""
    student = distiller.network.student
    before = evaluate()
    done = checkpoints(folder)
    journal = Journal(folder, step_of(done[-1]) if done else 0, callback, distiller.names)
    student.train()
    with stopping("finishing this step, then saving; Ctrl-C again ends at once") as stop:
        loss, network = distiller.loss, distiller.network
        steps = train(network, loss, batch_at, evaluate, training, folder, stop)
        finished = _follow(steps, journal, distiller, training.steps, quiet)
    student.eval()
    notes = [*distiller.notes, *drowned(distiller.shares(journal.rows[0]))]
    return Distilled(before, journal.rows, notes, finished)


def _data(name: str, data: Any) -> Data:
    """Return examples, or the list of texts that is given.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(data, Examples):
        return data
    texts = listed(name, data)
    for one in texts:
        if not isinstance(one, Text):
            raise InputError(f"{name} must hold texts, as read_texts returns, got {one!r:.40}")
    return texts


def _check_student(student: Any) -> None:
    """Raise InputError if it is no network, or nothing of it can be trained."""
    if not isinstance(student, nn.Module):
        raise InputError(f"the student must be a network, as load returns, got {student!r:.40}")
    complete(student)
    if not tree_flatten(student.trainable_parameters()):
        raise InputError("the student has nothing to train: all of its weights are frozen")


def _check(
    batch_size: int,
    valid: Data | None,
    training: TrainingConfig,
    teacher: Teacher,
    on_policy: OnPolicyConfig | None,
) -> None:
    check_value("batch_size", batch_size, Count)
    if valid is None and (training.patience or training.keep_best):
        raise InputError("patience and keep_best need held-out data, by which to judge")
    if isinstance(teacher, CachedTeacher) and on_policy is not None and on_policy.on_policy > 0:
        raise InputError("a cache does not know what the student will write; use a teacher")


def _check_data(data: Data, valid: Data | None) -> None:
    """Raise InputError if there is nothing to learn, or nothing to judge by, or no such thing."""
    examples = isinstance(data, Examples)
    if valid is not None and isinstance(valid, Examples) != examples:
        raise InputError(f"valid must hold {'examples' if examples else 'texts'}, as the data do")
    for name, given in (("data", data), ("valid", valid)):
        if isinstance(given, Examples):
            if not (given.mask > 0).any().item():
                raise InputError(f"no example of {name} has a weight above 0")
        elif given is not None and not given:
            raise InputError("there are no texts" if name == "data" else "valid holds no texts")


def _hash(data: Data) -> str:
    if isinstance(data, Examples):
        return arrays_hash([data.inputs, data.labels, data.mask])
    return texts_hash(data)


def _terms(losses: str | LossTerm | Sequence[str | LossTerm]) -> list[LossTerm]:
    alone = isinstance(losses, str | LossTerm)
    return [_term(one) for one in ([losses] if alone else listed("losses", losses))]


def _term(loss: Any) -> LossTerm:
    if not isinstance(loss, str | LossTerm):
        raise InputError(f"a loss must be a text such as forward_kl:weight=0.9, got {loss!r:.40}")
    return LossTerm.parse(loss) if isinstance(loss, str) else loss


def _trained(student: nn.Module, texts: bool) -> str:
    """Return what is trained, as far as one can see."""
    return ADAPTERS if has_adapters(student) else PRETRAINED if texts else NEW


def _follow(
    steps: Iterator[Progress], journal: Journal, distiller: Distiller, total: int, quiet: bool
) -> bool:
    """Draw the bar and keep the log; return whether the training came to its end."""
    stopped = False
    done = journal.rows[-1]["step"] if journal.rows else 0
    with tqdm(total=total, initial=done, unit="step", disable=quiet, file=sys.stderr) as bar:
        for progress in steps:
            journal.add(progress)
            stopped = progress.stopped and not progress.ended
            bar.update()
            if progress.step == 1 and not quiet:
                terms = distiller.shares(progress.parts).items()
                said = ", ".join(f"{name} {share:.1%}" for name, share in terms)
                tqdm.write(f"loss {progress.loss:.4f} at first: {said}", file=sys.stderr)
            parts = " ".join(f"{name} {value:.3f}" for name, value in progress.parts.items())
            bar.set_description(parts or f"loss {progress.loss:.3f}")
            if progress.evaluation:
                found = " ".join(f"{k} {v:.3f}" for k, v in progress.evaluation.items())
                bar.set_postfix_str(f"held out: {found}")
    return not stopped


def _teacher(teachers: Any, texts: bool, weights: Sequence[float] | None, mean: str) -> Teacher:
    if teachers is None:
        return TextTeacher()
    if isinstance(teachers, nn.Module):
        teachers = [teachers]
    if isinstance(teachers, list | tuple):
        for one in teachers:
            _check_network(one)
        return LiveTeacher(teachers, texts, weights, mean)
    if not isinstance(teachers, Teacher):
        _check_network(teachers)
    return teachers


def _check_network(teacher: Any) -> None:
    if not isinstance(teacher, nn.Module):
        raise InputError(f"a teacher must be a network, as load returns, got {teacher!r:.40}")


def _chosen(
    terms: Sequence[LossTerm],
    training: TrainingConfig,
    batch_size: int,
    on_policy: OnPolicyConfig | None,
    eos_token_ids: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Return how a student is trained."""
    return {
        "losses": [str(term) for term in terms],
        "training": asdict(training),
        "batch_size": batch_size,
        "on_policy": None if on_policy is None else asdict(on_policy),
        "eos_token_ids": sorted(eos_token_ids),
        "seed": seed,
    }


def _parts(
    student: nn.Module, teacher: Teacher, given: Given, judging: Teacher | None
) -> dict[str, Any]:
    """Return what tells a student, its teachers and the data from others."""
    arrays: dict[str, Any] = dict(tree_flatten(student.trainable_parameters()))
    return {
        "teachers": _told(teacher),
        "data": _hash(given.data),
        "student": {name: list(array.shape) for name, array in arrays.items()},
        "student_weights": weights_hash(student),
        "valid": None if given.valid is None else _hash(given.valid),
        "valid_teacher": None if judging is None else _told(judging),
    }


def _told(teacher: Teacher) -> Any:
    """Return what tells a teacher from others, as JSON."""
    if isinstance(teacher, LiveTeacher):
        networks = [weights_hash(answers.network) for answers in teacher.answers]
        return {"networks": networks, "weights": teacher.weights, "mean": teacher.mean}
    if isinstance(teacher, CachedTeacher):
        return {"cache": teacher.cache.content_hash}
    return type(teacher).__name__
