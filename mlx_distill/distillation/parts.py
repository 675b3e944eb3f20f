"""All that takes part in a distillation, opened and checked against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx import nn

from mlx_distill.checkpoint import load, load_tokenizer, local_folder
from mlx_distill.data.corpus import Corpus, check_corpus, read_corpus
from mlx_distill.data.teacher_cache import TeacherCache
from mlx_distill.data.texts import Text
from mlx_distill.distillation.adapters import merge_adapters
from mlx_distill.distillation.config import DistillConfig
from mlx_distill.distillation.exporting import stored_type
from mlx_distill.distillation.given import readers
from mlx_distill.distillation.on_policy import answered, with_room
from mlx_distill.distillation.students import from_config, from_layers, read_config
from mlx_distill.distillation.teachers import (
    CachedTeacher,
    LiveTeacher,
    RetokenizedTeacher,
    Teacher,
    TextTeacher,
)
from mlx_distill.errors import InputError
from mlx_distill.files import usable_path
from mlx_distill.hashes import tokenizer_hash
from mlx_distill.target.context import context_length, text_limit

OTHER_TOKENIZER = (
    "the teacher's tokenizer is not the student's, so their tokens cannot be compared one by one; "
    "compare sorted probabilities with --loss sorted_l1 (ULD), or learn from the teacher's text "
    "alone: --loss hard, on data that it wrote"
)


@dataclass(frozen=True)
class Opening:
    """How models and chats are opened, whichever they are.

    Args:
        trust_remote_code: Whether a repository may run code of its own.
        template_config: Further arguments of the chat template.
    """

    trust_remote_code: bool = False
    template_config: Mapping[str, Any] | None = None

    def load(self, path: str | Path, adapter_path: str | None = None) -> tuple[nn.Module, Any]:
        """Return a model and its tokenizer."""
        trust = self.trust_remote_code
        return load(path, adapter_path=adapter_path, trust_remote_code=trust)


@dataclass(frozen=True)
class Student:
    """Who learns.

    Args:
        network: The model.
        config: Its configuration, for the export.
        tokenizer: Its tokenizer.
        source: The folder that the tokenizer is from.
        stored: The type of its weights in their files, None if it has none.
    """

    network: nn.Module
    config: dict[str, Any]
    tokenizer: Any
    source: Path | None
    stored: str | None


@dataclass(frozen=True)
class Parts:
    """What takes part in a distillation.

    Args:
        student: Learns.
        networks: Live teachers.
        teacher: Teaches; None if there is only text.
        judging: Judges held-out texts; None where the teacher does.
        corpus: What is learned, what is held out, and what became of the rows.
    """

    student: Student
    networks: list[nn.Module]
    teacher: Teacher | None
    judging: Teacher | None
    corpus: Corpus


def open_parts(config: DistillConfig, opening: Opening) -> Parts:
    """Return what a configuration names, loaded and fitting together.

    Raises:
        InputError: If something is missing or damaged, or does not fit another part.
    """
    check_corpus(config.data, config.valid)
    loaded = [opening.load(path, config.teacher_adapter_path) for path in config.teacher]
    networks = [model for model, _ in loaded]
    student = _student(config, loaded, opening)
    config.export.check(student.network)
    known = tokenizer_hash(student.tokenizer)
    others = [other for _, other in loaded if tokenizer_hash(other) != known]
    _check_comparable(config, len(loaded), bool(others))
    # Where the student's tokenizer has no template, that of another teacher may be meant.
    meant = student.tokenizer.has_chat_template or not any(o.has_chat_template for o in others)
    reading = config.reading(opening.template_config if meant else None)
    corpus = read_corpus(config.data, config.valid, student.tokenizer, reading, config.sizes)
    _check_contexts([student.network, *networks], [*corpus.texts, *corpus.valid])
    for network in networks:
        quantize(network, config.teacher_bits)
    config.adapter.apply(student.network, config.seed)
    teacher = judging = None
    if others:
        teacher = RetokenizedTeacher(
            networks[0], student.tokenizer, loaded[0][1], opening.template_config
        )
    elif networks:
        weights = config.teacher_weights or None
        teacher = LiveTeacher(networks, True, weights, config.teacher_mean)
    # The last of them reads the same tokens, and knows more, where there is a live teacher.
    reading_same = readers(student.network, teacher)
    ends = set(student.tokenizer.eos_token_ids)
    limit = text_limit(*reading_same)
    judged = (corpus.valid, reading_same[-1], ends, config.rollouts, limit, corpus.valid_report)
    learn = with_room(corpus.texts, limit, corpus.report)
    if not learn:
        raise InputError(f"nothing is left to learn: {corpus.report.reasons()}")
    corpus = replace(corpus, texts=learn, valid=answered(*judged))
    if config.use_cache:
        judging = teacher or TextTeacher()
        cache = TeacherCache.open(usable_path(config.use_cache, "the cache"), known, corpus.texts)
        teacher = CachedTeacher(cache, corpus.texts)
    return Parts(student, networks, teacher, judging, corpus)


def quantize(network: nn.Module, bits: int | None) -> None:
    """Quantise in place what can be, in groups of 64 as mlx-lm does.

    Raises:
        InputError: If it is quantised already: it would stay as it is.
    """
    if bits is None:
        return
    if any("scales" in module for module in network.modules()):
        raise InputError("a teacher is quantised already; leave teacher_bits away")

    def fits(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module["weight"].shape[-1] % 64 == 0

    nn.quantize(network, bits=bits, class_predicate=fits)


def _student(
    config: DistillConfig, loaded: list[tuple[nn.Module, Any]], opening: Opening
) -> Student:
    """Return who learns: a model that is there, one of a teacher's layers, or a new one."""
    if config.student:
        model, tokenizer = opening.load(config.student, config.adapter_path)
        merge_adapters(model, config.export.export_dequantized)
        folder = local_folder(config.student)
        return Student(model, read_config(folder), tokenizer, folder, stored_type(folder))
    if not (config.student_layers or config.student_config):
        raise InputError(
            "there is no student; name one with --student, --student-config or --student-layers"
        )
    if config.student_layers and not loaded:
        raise InputError("a student of the teacher's layers needs a teacher")
    tokenizer, source = _tokenizer(config, loaded, opening)
    if config.student_layers:
        folder = local_folder(config.teacher[0])
        merge_adapters(loaded[0][0])
        student, own = from_layers(loaded[0][0], read_config(folder), config.student_layers)
        return Student(student, own, tokenizer, source, stored_type(folder))
    own = read_config(usable_path(config.student_config or "", "the student's config"))
    return Student(from_config(own, config.seed), own, tokenizer, source, None)


def _tokenizer(
    config: DistillConfig, loaded: list[tuple[nn.Module, Any]], opening: Opening
) -> tuple[Any, Path]:
    """Return a new student's tokenizer, and the folder that it is from."""
    if config.tokenizer:
        folder = local_folder(config.tokenizer)
        return load_tokenizer(folder, opening.trust_remote_code), folder
    if not loaded:
        raise InputError("a new student without a teacher needs a tokenizer; use --tokenizer")
    return loaded[0][1], local_folder(config.teacher[0])


def _check_comparable(config: DistillConfig, num_teachers: int, others: bool) -> None:
    """Raise InputError if distributions over different tokens would be compared one by one."""
    uld = all(term.name in ("hard", "sorted_l1") for term in config.terms)
    compared = any(term.name != "hard" for term in config.terms)
    if others and compared and (not uld or num_teachers > 1):
        raise InputError(OTHER_TOKENIZER)


def _check_contexts(networks: Sequence[nn.Module], texts: Sequence[Text]) -> None:
    """Raise InputError if a text is longer than a model was made for."""
    longest = max(len(text.tokens) for text in texts)
    contexts = [context for network in networks if (context := context_length(network))]
    if contexts and longest > min(contexts):
        raise InputError(
            f"the longest text has {longest} tokens, a model's context is {min(contexts)}; "
            "use a smaller --max-length"
        )
