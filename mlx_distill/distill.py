"""Distil a teacher into a student: a small language model learns a large one's distributions.

    python -m mlx_distill.distill --teacher T --student-config small.json --data texts --output DIR

Every option is a flag or, under the same name with underscores, a key of the YAML file that
``--config`` names; a flag wins. What was used is written beside the result. A run that was stopped
goes on with ``--resume``.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import mlx.core as mx
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from tqdm import tqdm

from mlx_distill import cli
from mlx_distill.config import add_flags, from_flags, read_yaml
from mlx_distill.distillation.caching import CacheRun
from mlx_distill.distillation.config import PARTS, DistillConfig
from mlx_distill.distillation.parts import Opening, open_parts
from mlx_distill.distillation.run import Outcome, finish, memory_of, train_student
from mlx_distill.distillation.terms import LossTerm
from mlx_distill.distillation.training import distill
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import output_path, usable_path
from mlx_distill.training.runs import check_output, partial_folder


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Distil as the arguments say; return the exit status."""
    arguments = _parse(argv)
    config = _config(arguments)
    opening = Opening(arguments.trust_remote_code, cli.template_config(arguments))
    mx.set_cache_limit(2**30)  # freed arrays of one shape would pile up beside the next one's
    if arguments.cache_teacher:
        return _cache(config, output_path(arguments.cache_teacher), opening, arguments.quiet)
    if arguments.output is None:
        raise InputError("name the student's folder with --output")
    output = output_path(arguments.output)
    check_output(output, arguments.resume)
    callback = _callback(arguments, config, partial_folder(output))
    parts = open_parts(config, opening)
    _say(*parts.corpus.lines(), memory_of(config, parts), _rate(config))
    done = train_student(config, parts, output, opening, callback=callback, quiet=arguments.quiet)
    _say(*(f"note: {note}" for note in done.notes))
    if not done.finished:
        step, steps = done.log[-1]["step"], config.training.steps
        _say(f"stopped after step {step} of {steps}; the same command with --resume goes on")
        return 130
    _report(output, finish(config, parts, output, opening, done))
    return 0


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _rate(config: DistillConfig) -> str:
    """Return the learning rate, in words; unless it was given, what is trained decides it."""
    return f"training {config.trained} at a learning rate of {config.training.learning_rate:g}"


def _report(output: Path, outcome: Outcome) -> None:
    """Tell what has come of it."""
    print(f"{output}: {outcome.parameters:,} parameters; held out:")
    for name, found in outcome.figures.items():
        print(f"  {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
    _say(*(f"note: {note}" for note in outcome.notes))


def _cache(config: DistillConfig, folder: Path, opening: Opening, quiet: bool) -> int:
    """Write what the teacher says about the data to disk."""
    run = CacheRun(config, opening)
    _say(*run.corpus.lines(), run.memory())
    count = len(run.corpus.texts)
    with tqdm(total=count, unit="text", disable=quiet) as bar:
        for done in run.write(folder):
            bar.update(done - bar.n)
    print(f"{folder}: {count} texts, {run.bytes_per_token(folder):.0f} bytes per token")
    return 0


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
        parser.set_defaults(
            **read_yaml(usable_path(first.config, "the config"), _kinds(parser), {"loss": _spelt})
        )
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
    cli.add_reading_flags(parser)
    parser.add_argument("--report-to", help="mlx-lm's reporting: wandb, swanlab, or both")
    parser.add_argument("--project-name", help="of the reports")
    parser.add_argument("--quiet", action="store_true", help="draw no progress bar")
    add_flags(parser, DistillConfig)
    for kind in PARTS.values():
        add_flags(parser, kind)
    return parser


cli.callable_as(__name__, distill)

if __name__ == "__main__":
    sys.exit(main())
