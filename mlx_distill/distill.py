"""Distil a teacher into a student: a small language model learns a large one's distributions.

    python -m mlx_distill.distill --teacher T --student-config small.json --data texts --output DIR

Every option is a flag or, under the same name with underscores, a key of the YAML file that
``--config`` names; a flag wins. What was used is written beside the result. A run that was stopped
goes on with ``--resume``.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import mlx.core as mx
import yaml
from mlx import nn
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from mlx_distill import cli
from mlx_distill.arrays import num_values
from mlx_distill.checkpoint import load, local_folder, tokenizer_hash, weights_hash
from mlx_distill.config import add_flags, check_seed, from_file, from_flags
from mlx_distill.data.completions import CompletionFilter, completion_texts, read_completions
from mlx_distill.data.records import write_whole
from mlx_distill.data.teacher_cache import TAILS, TeacherCache, texts_hash, write_cache
from mlx_distill.data.texts import LONG, Text, fit, local_file, pack, read_texts
from mlx_distill.distillation.features import checkpoint_layers
from mlx_distill.distillation.memory import memory_estimate
from mlx_distill.distillation.objective import CACHED, RESPONSE, LossTerm
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.distillation.students import (
    DTYPES,
    AdapterConfig,
    export,
    from_config,
    from_layers,
    merge_adapters,
    read_config,
)
from mlx_distill.distillation.teachers import (
    CachedTeacher,
    LiveTeacher,
    RetokenizedTeacher,
    Teacher,
    TextTeacher,
)
from mlx_distill.distillation.training import Distilled, distill
from mlx_distill.errors import InputError, one_line
from mlx_distill.target.target import context_length
from mlx_distill.training.journal import CURVES, LOG, TABLE, draw_curves, write_table
from mlx_distill.training.loop import TrainingConfig, checkpoints
from mlx_distill.training.runs import SETTINGS, check_output, check_settings, partial_folder

OTHER_TOKENIZER = (
    "the teacher's tokenizer is not the student's, so their tokens cannot be compared one by one; "
    "compare sorted probabilities with --loss sorted_l1 (ULD), or learn from the teacher's text "
    "alone: --loss hard, on data that it wrote"
)


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides what a distillation makes; kept with the result.

    Args:
        teacher: Folders or hub repositories; several make an ensemble. None: text only.
        teacher_weights: Weights of several teachers.
        teacher_mean: What of several teachers is averaged: probs or logits.
        teacher_bits: Quantise the teachers to so many bits.
        use_cache: Learn from this teacher cache instead of a live teacher.
        cache_k: Tokens per position that a new cache keeps.
        cache_tail: What a new cache keeps of all other tokens: bucket, their mass, or draws, which
            take the place of half of the most probable ones.
        student: The student's folder or hub repository.
        student_config: Make the student from this config.json, with random weights.
        student_layers: Make the student from these layers of the teacher.
        tokenizer: Folder of a new student's tokenizer (default: the teacher's).
        data: JSONL file, folder with train.jsonl and valid.jsonl, or hub dataset; several are
            joined.
        valid: Held-out texts (default: valid.jsonl of a folder, else the last --held-out texts).
        held_out: Texts that are held out if there is no file of them.
        data_layout: texts for mlx-lm's layouts, completions for a teacher's stored answers.
        learn_prompts: Also learn the prompts.
        max_texts: Use the first so many texts.
        max_length: The longest text, in tokens.
        long: Longer texts are cut, dropped, or refused: cut, drop or refuse.
        pack: Join texts into rows of max_length tokens, so that nothing is padded.
        loss: Terms of the weighted sum, as forward_kl:weight=0.9,temperature=2 (default:
            forward_kl; sparse_kl of a cache; hard without a teacher).
        batch_size: Texts per batch.
        grad_checkpoint: Compute activations twice instead of keeping them.
        seed: Of first weights, order and draws.
        export_dtype: Of the exported weights: float16, bfloat16 or float32.
        export_bits: Quantise the exported student to so many bits.
        adapter: Which parameters are trained.
        rollouts: What the student writes itself.
        filter: Which stored completions are learned.
        training: Steps, learning rate and so on.
    """

    teacher: tuple[str, ...] = ()
    teacher_weights: tuple[float, ...] = ()
    teacher_mean: str = "probs"
    teacher_bits: int | None = None
    use_cache: str | None = None
    cache_k: int = 64
    cache_tail: str = "bucket"
    student: str | None = None
    student_config: str | None = None
    student_layers: tuple[int, ...] = ()
    tokenizer: str | None = None
    data: tuple[str, ...] = ()
    valid: str | None = None
    held_out: int = 64
    data_layout: str = "texts"
    learn_prompts: bool = False
    max_texts: int | None = None
    max_length: int = 512
    long: str = "cut"
    pack: bool = False
    loss: tuple[str, ...] = ()
    batch_size: int = 8
    grad_checkpoint: bool = False
    seed: int = 0
    export_dtype: str = "float16"
    export_bits: int | None = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    rollouts: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    filter: CompletionFilter = field(default_factory=CompletionFilter)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if not self.loss:
            known = "sparse_kl" if self.use_cache else "forward_kl" if self.teacher else "hard"
            object.__setattr__(self, "loss", (known,))
        for name in ("batch_size", "held_out", "cache_k"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length < 2:
            raise InputError(f"max_length must be at least 2, got {self.max_length}")
        if self.max_texts is not None and self.max_texts < 1:
            raise InputError(f"max_texts must be at least 1, got {self.max_texts}")
        for name, known in (
            ("long", LONG),
            ("data_layout", ("texts", "completions")),
            ("teacher_mean", ("probs", "logits")),
            ("export_dtype", tuple(DTYPES)),
            ("cache_tail", TAILS),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)}")
        for name in ("teacher_bits", "export_bits"):
            if getattr(self, name) not in (None, 2, 3, 4, 5, 6, 8):
                raise InputError(f"{name} must be 2, 3, 4, 5, 6 or 8, got {getattr(self, name)}")
        check_seed("seed", self.seed)
        if not self.data:
            raise InputError("there is no data; name it with --data")
        ways = [bool(self.student), bool(self.student_config), bool(self.student_layers)]
        if sum(ways) > 1:
            raise InputError("student, student_config and student_layers exclude each other")
        if self.use_cache and self.rollouts.on_policy:
            raise InputError("a cache does not know what the student will write; use a teacher")
        for term in self.terms:
            if term.name != "hard" and not self.teacher and not self.use_cache:
                raise InputError(
                    f"{term.name} needs a teacher; name one with --teacher, or use --loss hard"
                )
            if self.use_cache and term.name in RESPONSE and term.name not in CACHED:
                raise InputError(
                    f"{term.name} needs all of the teacher's logits, and a cache has the top ones; "
                    "use sparse_kl"
                )

    @property
    def terms(self) -> list[LossTerm]:
        """The objective."""
        return [LossTerm.parse(text) for text in self.loss]


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Distil as the arguments say; return the exit status."""
    arguments = _parse(argv)
    config = _config(arguments)
    mx.set_cache_limit(2**30)  # freed arrays of one shape would pile up beside the next one's
    if arguments.cache_teacher:
        return _cache(config, Path(arguments.cache_teacher), arguments)
    if arguments.output is None:
        raise InputError("name the student's folder with --output")
    output = Path(arguments.output)
    work = partial_folder(output)
    check_output(output, arguments.resume)
    parts = _open(config, arguments)
    texts, valid = parts.texts, parts.valid
    settings = json.loads(json.dumps(asdict(config) | {"texts_hash": texts_hash(texts)}))
    if arguments.resume:
        check_settings(work / SETTINGS, settings)
    print(
        memory_estimate(
            parts.student,
            parts.networks,
            config.batch_size,
            max(len(text.tokens) for text in texts),
            config.grad_checkpoint,
        ),
        file=sys.stderr,
    )
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / SETTINGS, json.dumps(settings, indent=1) + "\n")
    if config.grad_checkpoint:
        checkpoint_layers(parts.student)
    try:
        done = distill(
            parts.student,
            parts.teacher,
            texts,
            folder=work,
            losses=config.terms,
            valid=valid,
            valid_teacher=parts.valid_teacher,
            training=config.training,
            batch_size=config.batch_size,
            on_policy=config.rollouts,
            eos_token_ids=sorted(parts.tokenizer.eos_token_ids),
            seed=config.seed,
            callback=_callback(arguments, config, work),
            quiet=arguments.quiet,
        )
    except InputError:
        if not checkpoints(work):  # nothing to resume
            shutil.rmtree(work)
        raise
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    if not done.finished:
        print(
            f"stopped after step {done.log[-1]['step']} of {config.training.steps}; "
            "the same command with --resume goes on",
            file=sys.stderr,
        )
        return 130
    _finish(output, work, config, parts, done)
    return 0


@dataclass
class Parts:
    """What takes part in a distillation.

    Args:
        student: Learns.
        student_config: Its configuration, for the export.
        tokenizer: The student's.
        networks: Live teachers.
        teacher: Teaches; None if there is only text.
        valid_teacher: Judges held-out texts; None where the teacher does.
        texts: To learn.
        valid: Held out.
        counts: What was done to the texts.
    """

    student: nn.Module
    student_config: dict[str, Any]
    tokenizer: Any
    networks: list[nn.Module]
    teacher: Teacher | None
    valid_teacher: Teacher | None
    texts: list[Text]
    valid: list[Text]
    counts: dict[str, int]


def _open(config: DistillConfig, arguments: argparse.Namespace) -> Parts:
    """Load everything, and check that it fits together."""
    options = cli.code_options(arguments.trust_remote_code)
    loaded = [load(path, **options) for path in config.teacher]
    networks = [model for model, _ in loaded]
    student, student_config, tokenizer = _student(config, loaded, options)
    known = tokenizer_hash(tokenizer)
    others = [other for _, other in loaded if tokenizer_hash(other) != known]
    uld = all(term.name in ("hard", "sorted_l1") for term in config.terms)
    compared = any(term.name != "hard" for term in config.terms)
    if others and compared and (not uld or len(loaded) > 1):
        raise InputError(OTHER_TOKENIZER)
    texts, valid, counts = _texts(config, tokenizer)
    _check_contexts([student, *networks], [*texts, *valid])
    for network in networks:
        _quantize(network, config.teacher_bits)
    config.adapter.apply(student, config.seed)
    teacher: Teacher | None = None
    valid_teacher: Teacher | None = None
    if networks:
        weights = config.teacher_weights or None
        teacher = LiveTeacher(networks, True, weights, config.teacher_mean)
        if others:
            teacher = RetokenizedTeacher(networks[0], tokenizer, loaded[0][1])
    if config.use_cache:
        valid_teacher = teacher
        cache = TeacherCache.open(Path(config.use_cache), known, texts)
        teacher = CachedTeacher(cache, texts)
        valid_teacher = valid_teacher or TextTeacher()
    return Parts(
        student,
        student_config,
        tokenizer,
        networks,
        teacher,
        valid_teacher,
        texts,
        valid,
        counts,
    )


def _quantize(network: nn.Module, bits: int | None) -> None:
    """Quantise what can be, in groups of 64 as mlx-lm does."""
    if bits is None:
        return

    def fits(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module["weight"].shape[-1] % 64 == 0

    nn.quantize(network, bits=bits, class_predicate=fits)


def _student(
    config: DistillConfig, loaded: list[tuple[nn.Module, Any]], options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any], Any]:
    """Return the student, its configuration and its tokenizer."""
    if config.student:
        model, tokenizer = load(config.student, **options)
        return model, read_config(local_folder(config.student)), tokenizer
    tokenizer = next((known for _, known in loaded), None)
    if config.tokenizer:
        tokenizer = _tokenizer(config.tokenizer)
    if config.student_layers:
        if not loaded:
            raise InputError("a student of the teacher's layers needs a teacher")
        own = read_config(local_folder(config.teacher[0]))
        student, own = from_layers(loaded[0][0], own, config.student_layers)
        return student, own, tokenizer
    if not config.student_config:
        raise InputError(
            "there is no student; name one with --student, --student-config or --student-layers"
        )
    if tokenizer is None:
        raise InputError("a new student without a teacher needs a tokenizer; use --tokenizer")
    own = read_config(Path(config.student_config))
    return from_config(own, config.seed), own, tokenizer


def _check_contexts(networks: Sequence[nn.Module], texts: Sequence[Text]) -> None:
    """Raise InputError if a text is longer than a model was made for."""
    longest = max(len(text.tokens) for text in texts)
    contexts = [context for network in networks if (context := context_length(network))]
    if contexts and longest > min(contexts):
        raise InputError(
            f"the longest text has {longest} tokens, a model's context is {min(contexts)}; "
            "use a smaller --max-length"
        )


def _tokenizer(path: str) -> Any:
    try:
        return load_tokenizer(local_folder(path))
    except Exception as error:  # whatever the tokenizer's own code meets
        raise InputError(f"the tokenizer {path} cannot be loaded: {one_line(error)}") from None


def _texts(config: DistillConfig, tokenizer: Any) -> tuple[list[Text], list[Text], dict[str, int]]:
    """Return the texts to learn, those held out, and what was done to them."""
    texts = [text for source in config.data for text in _read(source, "train", config, tokenizer)]
    valid = _valid(config, tokenizer)
    if valid is None:
        if len(texts) <= config.held_out:
            raise InputError(f"{len(texts)} texts are too few: {config.held_out} are held out")
        texts, valid = texts[: -config.held_out], texts[-config.held_out :]
    texts = texts[: config.max_texts]
    texts, counts = fit(texts, config.max_length, config.long)
    valid, _ = fit(valid, config.max_length, "cut")
    if counts["too_long"]:
        done = {"cut": "cut", "drop": "dropped"}[config.long]
        print(
            f"{counts['too_long']} of {counts['texts']} texts are longer than "
            f"{config.max_length} tokens: {done}",
            file=sys.stderr,
        )
    return pack(texts, config.max_length) if config.pack else texts, valid, counts


def _valid(config: DistillConfig, tokenizer: Any) -> list[Text] | None:
    """Return the held-out texts of a file of their own, None if there is none."""
    if config.valid:
        return _read(config.valid, "valid", config, tokenizer)[: config.held_out]
    first = Path(next(iter(config.data))).expanduser()
    if (first / "valid.jsonl").exists():
        return _read(first, "valid", config, tokenizer)[: config.held_out]
    return None


def _read(source: str | Path, split: str, config: DistillConfig, tokenizer: Any) -> list[Text]:
    """Return the texts of a source, in the layout that is said; of completions, tell what went."""
    if config.data_layout == "texts":
        return read_texts(source, tokenizer, learn_prompts=config.learn_prompts, split=split)
    completions, report = read_completions(local_file(source, split), config.filter)
    print("\n".join(report.lines()), file=sys.stderr)
    return completion_texts(completions, tokenizer, config.learn_prompts)


def _cache(config: DistillConfig, folder: Path, arguments: argparse.Namespace) -> int:
    """Write what the teacher says about the data to disk."""
    if len(config.teacher) != 1:
        raise InputError("a cache holds one teacher's answers; name it with --teacher")
    teacher, tokenizer = load(config.teacher[0], **cli.code_options(arguments.trust_remote_code))
    _quantize(teacher, config.teacher_bits)
    texts, _, _ = _texts(config, tokenizer)
    vocab_size = teacher(mx.array([[1]])).shape[-1]
    header = {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "weights_hash": weights_hash(teacher),
        "vocab_size": vocab_size,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = write_cache(
        folder,
        teacher,
        texts,
        header,
        config.cache_k,
        batch_size=config.batch_size,
        tail=config.cache_tail,
    )
    with tqdm(total=len(texts), unit="text", disable=arguments.quiet) as bar:
        for count in written:
            bar.update(count - bar.n)
    cache = TeacherCache.open(folder, header["tokenizer_hash"], texts)
    print(f"{folder}: {len(texts)} texts, {cache.bytes_per_token:.0f} bytes per token")
    return 0


def _finish(output: Path, work: Path, config: DistillConfig, parts: Parts, done: Distilled) -> None:
    """Export the student with its log, settings and card, and clear the work away."""
    merge_adapters(parts.student)
    parameters = num_values(parts.student.parameters())
    write_table(done.log, work / TABLE)
    draw_curves(done.log, work / CURVES, output.name)
    run = {
        "config": asdict(config),
        "seed": config.seed,
        "texts": parts.counts,
        "held_out": done.log[-1].get("held_out"),
        "versions": cli.versions(),
        "machine": cli.machine(),
        "commit": cli.commit(),
    }
    files = {
        "config.yaml": yaml.safe_dump(_flat(config), sort_keys=False),
        "training.json": json.dumps(run, indent=1) + "\n",
        LOG: "".join(json.dumps(row) + "\n" for row in done.log),
        "README.md": _card(output.name, config, run, parameters),
        **{name: (work / name).read_bytes() for name in (TABLE, CURVES)},
    }
    export(
        output,
        parts.student,
        parts.student_config,
        parts.tokenizer,
        files,
        config.export_dtype,
        config.export_bits,
    )
    shutil.rmtree(work)
    found = " ".join(f"{name} {value:.4f}" for name, value in run["held_out"].items())
    print(f"{output}: {parameters:,} parameters; held out: {found}")


def _card(name: str, config: DistillConfig, run: dict[str, Any], parameters: int) -> str:
    """Return the model card: what the student is, how it was made, what was measured."""
    teachers = ", ".join(Path(path).name for path in config.teacher) or "stored text only"
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in run["held_out"].items())
    losses = ", ".join(str(term) for term in config.terms)
    return f"""# {name}
A language model of {parameters:,} parameters, distilled with `python -m mlx_distill.distill`.

* Teacher: {teachers}
* Loss: {losses}
* Data: {", ".join(Path(path).name for path in config.data)}, {run["texts"]["texts"]:,} texts; \
{config.training.steps:,} steps of {config.batch_size * config.training.accumulate} texts

Held out, per token (`nats`: negative log-probability of the text; `kl`: KL(teacher || student); \
`agreement`: of the most probable tokens):

| | |
|---|---|
{rows}

Settings: `config.yaml`, `training.json`; log: `log.jsonl`, `log.csv`, `curves.png`. The licence \
is that of the teacher and of the data.
"""


def _callback(arguments: argparse.Namespace, config: DistillConfig, folder: Path) -> Any:
    """Return mlx-lm's callback for the services that ``--report-to`` names."""
    try:
        return get_reporting_callbacks(
            arguments.report_to,
            project_name=arguments.project_name or "mlx-distill",
            log_dir=str(folder),
            config=asdict(config),  # pyright: ignore
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"--report-to: {one_line(error)}") from None


PARTS: dict[str, type] = {
    "adapter": AdapterConfig,
    "rollouts": OnPolicyConfig,
    "filter": CompletionFilter,
    "training": TrainingConfig,
}


def _config(arguments: argparse.Namespace) -> DistillConfig:
    """Return the configuration that flags and file describe."""
    parts = {name: from_flags(kind, arguments) for name, kind in PARTS.items()}
    return from_flags(DistillConfig, arguments, **parts)


def _flat(config: Any) -> dict[str, Any]:
    """Return a configuration as ``--config`` reads it."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            values |= _flat(value)
        else:
            values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; those of a configuration file are defaults."""
    parser = _parser()
    first, _ = parser.parse_known_args(argv)
    if first.config:
        parser.set_defaults(**_read_yaml(Path(first.config), _kinds(parser)))
    return parser.parse_args(argv)


def _read_yaml(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration file.

    Args:
        path: The file.
        kinds: The types of what it may hold, by name.

    Raises:
        InputError: If it cannot be read, or a key or a value is none of ours.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"the config {path} cannot be read: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"the config {path} does not hold names and values")
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"the config {path} has an unknown field {name}")
        if name == "loss":
            terms = value if isinstance(value, list) else [value]
            value = [str(LossTerm.of(term)) if isinstance(term, dict) else term for term in terms]
        try:
            values[name] = from_file(kinds[name], value)
        except TypeError as error:
            raise InputError(f"the config {path}: {name} is {error}") from None
    return values


def _kinds(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the types of all options, by name."""
    defaults = vars(parser.parse_args([]))
    kinds = {name: bool if value is False else str | None for name, value in defaults.items()}
    for config in (DistillConfig, *PARTS.values()):
        kinds |= {k: v for k, v in get_type_hints(config).items() if k in kinds}
    del kinds["config"]
    return kinds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_distill.distill",
        description="Teach a small language model what a large one knows.",
    )
    parser.add_argument("--config", help="a YAML file of these options; flags win over it")
    parser.add_argument("--output", help="the student's folder; must not exist")
    parser.add_argument(
        "--cache-teacher", metavar="DIR", help="only write what the teacher says about the data"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the unfinished run of this output"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model's repository run its own code"
    )
    parser.add_argument("--report-to", help="mlx-lm's reporting: wandb, swanlab, or both")
    parser.add_argument("--project-name", help="of the reports")
    parser.add_argument("--quiet", action="store_true", help="draw no progress bar")
    add_flags(parser, DistillConfig)
    for kind in PARTS.values():
        add_flags(parser, kind)
    return parser


class _CallableModule(ModuleType):
    """Importing this module puts it where the package has its function ``distill``; be both."""

    def __call__(self, *args: Any, **options: Any) -> Distilled:
        return distill(*args, **options)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
