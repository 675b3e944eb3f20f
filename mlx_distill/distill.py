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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import mlx.core as mx
import yaml
from mlx import nn
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from mlx_distill import cli, machine
from mlx_distill.arrays import num_parameters
from mlx_distill.checkpoint import load, local_folder
from mlx_distill.config import add_flags, flat, from_flags, read_yaml
from mlx_distill.data.corpus import Corpus, check_corpus, read_corpus
from mlx_distill.data.teacher_cache import TeacherCache, texts_hash, write_cache
from mlx_distill.data.texts import Text
from mlx_distill.distillation.checkpointing import checkpoint_layers
from mlx_distill.distillation.config import PARTS, DistillConfig
from mlx_distill.distillation.judgement import judge
from mlx_distill.distillation.memory import memory_estimate
from mlx_distill.distillation.objective import LossTerm
from mlx_distill.distillation.students import (
    compact,
    export,
    from_config,
    from_layers,
    read_config,
)
from mlx_distill.distillation.teachers import (
    Answers,
    CachedTeacher,
    LiveTeacher,
    RetokenizedTeacher,
    Teacher,
    TextTeacher,
)
from mlx_distill.distillation.training import Distilled, distill, slices
from mlx_distill.errors import InputError, one_line
from mlx_distill.hashes import tokenizer_hash, weights_hash
from mlx_distill.target.context import context_length
from mlx_distill.target.reading import vocab_width
from mlx_distill.training.checkpoints import checkpoints
from mlx_distill.training.journal import CURVES, LOG, TABLE, draw_curves, write_table
from mlx_distill.training.runs import check_output, partial_folder

OTHER_TOKENIZER = (
    "the teacher's tokenizer is not the student's, so their tokens cannot be compared one by one; "
    "compare sorted probabilities with --loss sorted_l1 (ULD), or learn from the teacher's text "
    "alone: --loss hard, on data that it wrote"
)


# Where a student comes with weights, a drafter's 1e-3 would wash much of them out at first.
LEARNING_RATE = 2.5e-4


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
            settings=asdict(config) | {"texts_hash": texts_hash(texts)},
            callback=_callback(arguments, config, work),
            quiet=arguments.quiet,
        )
    except (InputError, KeyboardInterrupt):
        if not checkpoints(work):  # nothing to resume
            shutil.rmtree(work, ignore_errors=True)
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
        corpus: What became of the rows.
    """

    student: nn.Module
    student_config: dict[str, Any]
    tokenizer: Any
    networks: list[nn.Module]
    teacher: Teacher | None
    valid_teacher: Teacher | None
    texts: list[Text]
    valid: list[Text]
    corpus: Corpus


def _open(config: DistillConfig, arguments: argparse.Namespace) -> Parts:
    """Load everything, and check that it fits together."""
    check_corpus(config.data, config.valid)
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
    corpus = _texts(config, tokenizer)
    texts, valid = corpus.texts, corpus.valid
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
        corpus,
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


def _texts(config: DistillConfig, tokenizer: Any) -> Corpus:
    """Return the texts to learn and those held out; tell what became of the rows."""
    corpus = read_corpus(config.data, config.valid, tokenizer, config.reading, config.sizes)
    print("\n".join(corpus.lines()), file=sys.stderr)
    return corpus


def _cache(config: DistillConfig, folder: Path, arguments: argparse.Namespace) -> int:
    """Write what the teacher says about the data to disk."""
    if len(config.teacher) != 1:
        raise InputError("a cache holds one teacher's answers; name it with --teacher")
    check_corpus(config.data, config.valid)
    teacher, tokenizer = load(config.teacher[0], **cli.code_options(arguments.trust_remote_code))
    _quantize(teacher, config.teacher_bits)
    texts = _texts(config, tokenizer).texts
    vocab_size = vocab_width(teacher)
    header = {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "weights_hash": weights_hash(teacher),
        "vocab_size": vocab_size,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    answers = Answers(teacher, texts=True)
    written = write_cache(
        folder,
        answers,
        texts,
        header,
        config.cache_k,
        # Where a model makes its logits itself, they are there for a whole batch: one text, then.
        batch_size=config.batch_size if answers.body else 1,
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
    figures = {"before": done.before, "after": done.log[-1]["held_out"]}
    own = compact(parts.student, parts.student_config, config.export_dtype, config.export_bits)
    if config.export_bits:  # it is another model now
        batches = slices(parts.valid, config.batch_size)
        judging = parts.valid_teacher or parts.teacher or TextTeacher()
        quantised = judge(Answers(parts.student, True), judging, batches)
        figures[f"with {config.export_bits} bits"] = quantised
    parameters = num_parameters(parts.student)
    write_table(done.log, work / TABLE)
    draw_curves([{"step": 0, "held_out": done.before}, *done.log], work / CURVES, output.name)
    run = {
        "config": asdict(config),
        "seed": config.seed,
        "texts": parts.corpus.to_dict(),
        "held_out": figures,
        **machine.provenance(),
    }
    files = {
        "config.yaml": yaml.safe_dump(flat(config), sort_keys=False),
        "training.json": json.dumps(run, indent=1) + "\n",
        LOG: "".join(json.dumps(row) + "\n" for row in done.log),
        "README.md": _card(output.name, config, parts.corpus, run, parameters),
        **{name: (work / name).read_bytes() for name in (TABLE, CURVES)},
    }
    export(output, parts.student, own, parts.tokenizer, files)
    shutil.rmtree(work)
    print(f"{output}: {parameters:,} parameters; held out:")
    for name, found in figures.items():
        print(f"  {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
    key = "kl" if "kl" in done.before else "nats"
    if figures["after"][key] > done.before[key]:
        print(
            f"note: its {key} is worse than before; a smaller --learning-rate or more --steps may "
            "help",
            file=sys.stderr,
        )


def _card(
    name: str, config: DistillConfig, corpus: Corpus, run: dict[str, Any], parameters: int
) -> str:
    """Return the model card: what the student is, how it was made, what was measured."""
    teachers = ", ".join(Path(path).name for path in config.teacher) or "stored text only"
    losses = ", ".join(str(term) for term in config.terms)
    on_policy = config.rollouts.on_policy
    written = f", {on_policy:.0%} of them written by the student" if on_policy else ""
    figures = run["held_out"]
    rows = "\n".join(
        f"| {key} | {' | '.join(f'{found[key]:.4f}' for found in figures.values())} |"
        for key in figures["after"]
    )
    return f"""# {name}
A language model of {parameters:,} parameters, distilled with `python -m mlx_distill.distill`.

* Teacher: {teachers}
* Loss: {losses}
* Data: {", ".join(Path(path).name for path in config.data)}: {corpus.report.sentence()}; \
{corpus.valid_report.sentence()}; \
{config.training.steps:,} steps of {config.batch_size * config.training.accumulate} texts{written}
* Trained: {config.adapter.fine_tune}, learning rate {config.training.learning_rate:g}

Held out, per token, before and after (`nats`: negative log-probability of the text; `perplexity`: \
its exponential; `kl`: KL(teacher || student); `agreement`: of the most probable tokens):

| | {" | ".join(figures)} |
|---|{"---|" * len(figures)}
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


def _config(arguments: argparse.Namespace) -> DistillConfig:
    """Return the configuration that flags and file describe."""
    parts = {name: from_flags(kind, arguments) for name, kind in PARTS.items()}
    return from_flags(DistillConfig, arguments, **parts)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; those of a configuration file are defaults."""
    parser = _parser()
    first, _ = parser.parse_known_args(argv)
    if first.config:
        parser.set_defaults(**read_yaml(Path(first.config), _kinds(parser), {"loss": _spelt}))
    return parser.parse_args(argv)


def _spelt(value: Any) -> list[Any]:
    """Return losses as flags spell them; in a file they may be mappings."""
    terms = value if isinstance(value, list) else [value]
    return [str(LossTerm.of(term)) if isinstance(term, dict) else term for term in terms]


def _kinds(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the types of all options, by name."""
    defaults = vars(parser.parse_args([]))
    kinds = {name: bool if value is False else str | None for name, value in defaults.items()}
    for config in (DistillConfig, *PARTS.values()):
        kinds |= {k: v for k, v in get_type_hints(config).items() if k in kinds}
    del kinds["config"]
    return kinds


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
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
    parser.set_defaults(learning_rate=LEARNING_RATE)
    return parser


class _CallableModule(ModuleType):
    """Importing this module puts it where the package has its function ``distill``; be both."""

    def __call__(self, *args: Any, **options: Any) -> Distilled:
        return distill(*args, **options)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
