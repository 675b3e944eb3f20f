"""What the commands share: the console script, flags for models, errors as sentences."""

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from transformers.utils import logging as transformers_logging

from mlx_distill import interrupts
from mlx_distill.config import add_flags
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.errors import SENTENCE, InputError, one_line, printable, shorten
from mlx_distill.files import new_path

VERBS = {
    "generate": "write text with a model, faster with a drafter",
    "train_drafter": "train a recurrent drafter for a model",
    "distill": "teach a small model what a large one knows",
    "evaluate": "compare a teacher and its students on held-out text",
    "convert": "write a drafter with fewer bits a weight, or in the published layout",
    "calibrate": "measure what decoding costs here, for the planner of drafts",
    "benchmark": "measure drafting against mlx-lm on this machine",
}


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one sentence: the usage is dozens of lines."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence on stderr; exit with status 2."""
        self.exit(2, f"error: {shorten(printable(message), SENTENCE)}; see --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mlx-distill VERB ...``, which is ``python -m mlx_distill.VERB ...``."""
    parser = Parser(
        prog="mlx-distill",
        description="Make language models faster, and smaller, by distillation.",
        epilog="verbs: " + "; ".join(f"{verb}: {text}" for verb, text in VERBS.items()),
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see mlx-distill VERB --help")
    arguments = parser.parse_args(argv)
    return importlib.import_module(f"mlx_distill.{arguments.verb}").main(arguments.arguments)


def add_drafter_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--drafter``, of a command that drafts for a model."""
    parser.add_argument(
        "--drafter",
        type=path,
        help="the drafter's folder or hub repository, ngram, ngram+FOLDER, or auto for whichever "
        "is fastest (default: a bundled one that fits the model)",
    )


def add_exact_rows_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--exact-rows``, of a command that drafts."""
    parser.add_argument(
        "--exact-rows",
        action="store_true",
        help="draft so that the text is the plainly decoded one to the last bit, in half "
        "precision, with packed weights and with a quantised cache, too; off a GPU that costs "
        "what drafting gains",
    )


def add_shape_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a draft's shape, and the one that keeps the default one."""
    add_flags(parser, DraftPlan)
    parser.add_argument(
        "--no-calibrate",
        action="store_true",
        help="do not measure at a pair's first use which shape of draft pays here; as do the flags "
        "of a shape, it keeps every draft as they say",
    )


def asked_shape(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, arguments: argparse.Namespace
) -> DraftPlan | None:
    """Return the shape that the flags ask for; None if they leave it to what was measured.

    The arguments then have none either, so that no report says of a planned draft that it had one.
    """
    names = [field.name for field in fields(DraftPlan)]
    # What is in the namespace already gets no default.
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))
    values = {name: value for name in names if (value := getattr(given, name)) is not None}
    if values or given.no_calibrate:
        return DraftPlan(**values)
    vars(arguments).update(dict.fromkeys(names))
    return None


def refuse_unused(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *reasons: tuple[object, Sequence[str | type], str],
) -> None:
    """Raise InputError if a command line has a flag that nothing would look at.

    Args:
        parser: The command's.
        argv: The command line.
        reasons: Whether one applies; names of arguments that are not looked at then, or dataclasses
            whose fields they are called like; and what the sentence begins with.
    """
    for unused, why in ((unused, why) for applies, unused, why in reasons if applies):
        names = {
            name
            for one in unused
            for name in ([one] if isinstance(one, str) else [field.name for field in fields(one)])
        }
        given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))
        for name, value in vars(given).items():
            if name in names and value is not None:
                flag = {"temperature": "temp"}.get(name, name.replace("_", "-"))
                raise InputError(f"{why}; leave --{flag} out")


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Turn the errors that a user can mend into one line on stderr and exit status 2."""

    @functools.wraps(function)
    def run(argv: Sequence[str] | None = None) -> int:
        interrupts.end()
        # Tokenizers warn of long texts, which the commands refuse in their own words.
        transformers_logging.set_verbosity_error()
        return _flushed(_status(function, argv))

    return run


def _status(function: Callable[..., int], argv: Sequence[str] | None) -> int:
    """Return a command's exit status; errors that a user can mend are said."""
    try:
        return function(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has gone, as with | head
        _forget_output()
        return 0
    except OSError as error:  # a full disk, a folder without permission
        said = error.strerror or one_line(error)
        print(f"error: {error.filename or 'a file'}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _flushed(status: int) -> int:
    """Return the exit status when all that was printed is out.

    Python itself would try that last, and end with a traceback and a status of 120.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
    except OSError as error:
        _forget_output()
        if not status:
            print(f"error: the output could not be written: {error.strerror}", file=sys.stderr)
            return 2
    return status


def _forget_output() -> None:
    """Let what is still to be written to stdout go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def callable_as(name: str, function: Callable[..., Any]) -> None:
    """Make a command's module callable, too: importing it hides the function of its name.

    Args:
        name: Of the module.
        function: What the package has under that name.
    """
    kind = type("CallableModule", (ModuleType,), {"__call__": staticmethod(function)})
    sys.modules[name].__class__ = kind


def path(text: str) -> str:
    """Return the name of a file, a folder or a hub repository; argparse's type of such flags.

    Raises:
        argparse.ArgumentTypeError: If no file can have it.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("must name something, got nothing")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"must be the name of a file, got {text!r:.40}")
    return text


def new_file(name: str | None) -> Path | None:
    """Return where a result is to be written, None if it is not; nothing is written over.

    Raises:
        InputError: If there is a file of that name, or no folder for it.
    """
    if name is None:
        return None
    file = new_path(name)
    if not file.parent.is_dir():
        raise InputError(f"the output {name} cannot be written: its folder does not exist")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise InputError(f"the output {name} cannot be written: its folder is read-only")
    return file


def new_files(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Path | None]:
    """Return where several results are to be written, by the names of their flags.

    Raises:
        InputError: If one cannot be written, or two would be one file.
    """
    files = {name: new_file(getattr(arguments, name)) for name in names}
    taken: dict[Path, str] = {}
    for name, file in files.items():
        other = taken.setdefault(file.resolve(), name) if file else name
        if other != name:
            raise InputError(f"--{other} and --{name} name the same file; name another")
    return files


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model, under mlx-lm's names."""
    parser.add_argument(
        "--model",
        type=path,
        help="the model's folder or hub repository (default: the bundled stories-14m)",
    )
    parser.add_argument(
        "--adapter-path",
        type=path,
        metavar="DIR",
        help="folder of adapters that mlx-lm trained for the model (default: none)",
    )
    add_reading_flags(parser)


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how any model's repository and chat template are read."""
    parser.add_argument(
        "--chat-template-config",
        metavar="JSON",
        help="further arguments of the chat template, as a JSON object such as "
        "'{\"enable_thinking\": false}' (default: none)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let a model's repository run its own Python code",
    )


def template_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the further arguments of the chat template that the flags give.

    Raises:
        InputError: If they are no JSON object.
    """
    try:
        config = json.loads(arguments.chat_template_config or "{}")
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep, or with a number too long")
        raise InputError(f"--chat-template-config is not JSON: {reason}") from None
    if not isinstance(config, dict):
        raise InputError("--chat-template-config must be a JSON object")
    return config


def load_model(
    arguments: argparse.Namespace, tokenizer_config: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Return the model and the tokenizer, made with a config, that the flags ask for."""
    from mlx_distill.checkpoint import bundled, load

    options = code_options(arguments.trust_remote_code)
    if tokenizer_config:
        options["tokenizer_config"] = tokenizer_config | (options["tokenizer_config"] or {})
    name = arguments.model or bundled("stories-14m")
    return load(name, adapter_path=arguments.adapter_path, **options)


def load_drafter(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """Return the drafter that the flags ask for, else a bundled one that fits, else None."""
    from mlx_distill.calibration.automatic import is_on
    from mlx_distill.checkpoint import bundled
    from mlx_distill.drafters import registry
    from mlx_distill.target.memory import open_remembered

    if is_on():
        open_remembered(model)
    path = arguments.drafter or (None if arguments.model else bundled("stories-14m-redrafter"))
    if path is not None:
        return registry.load_drafter(path, model, tokenizer)
    found = registry.bundled_drafter(model, tokenizer)
    if found is None:
        return None
    print(f"drafting with the bundled {found[0].name}, which fits the model", file=sys.stderr)
    return found[1]


def auto_drafter(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """Return what tries the drafter that the flags ask for, or fits, beside n-grams and nothing."""
    from mlx_distill.drafters import registry

    name = f"{registry.AUTO}+{arguments.drafter}" if arguments.drafter else registry.AUTO
    return registry.load_drafter(name, model, tokenizer)


def add_ngrams(drafter: Any, model: Any) -> Any:
    """Return a drafter with the nodes of n-grams beside its own; n-grams alone if there is none."""
    from mlx_distill.drafters import registry

    if drafter is not None:
        return registry.with_ngrams(drafter)
    print("no drafter fits the model, so n-grams draft alone", file=sys.stderr)
    return registry.load_drafter(registry.NGRAM, model)


def drafter_of(draft_model: Any, model: Any, max_kv_size: int | None) -> Any:
    """Return the drafter that a second model is."""
    from mlx_distill.drafters.draft_model import DraftModelDrafter
    from mlx_distill.target.target import Target

    return DraftModelDrafter(draft_model, Target.of(model).vocab_size, max_kv_size)


def need_drafter(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """Return the same.

    Raises:
        InputError: If no bundled drafter fits.
    """
    drafter = load_drafter(arguments, model, tokenizer)
    if drafter is None:
        raise InputError("no bundled drafter fits this model; name one with --drafter")
    return drafter


def load_draft_model(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    """Return the model that drafts, or None if none is named.

    Raises:
        InputError: If its tokenizer is another one.
    """
    from mlx_distill.checkpoint import load
    from mlx_distill.hashes import first_other_encoding

    if arguments.draft_model is None:
        return None
    draft_model, other = load(arguments.draft_model, **code_options(arguments.trust_remote_code))
    text = first_other_encoding(other, tokenizer)
    if text is not None:
        raise InputError(
            f"the draft model's tokenizer is not the model's: they encode {text[:24]!r} differently"
        )
    return draft_model


def code_options(trust: bool) -> dict[str, Any]:
    """Return the arguments of ``load`` that let a repository run its own code, or not."""
    tokenizer_config = {"trust_remote_code": True} if trust else None
    return {"trust_remote_code": trust, "tokenizer_config": tokenizer_config}


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a result has to say about its command; of local files and folders the names."""
    written, named = ("output", "plot", "trace", "report"), ("student", "adapter_path")
    read = (
        "model",
        "adapter_path",
        "drafter",
        "drafters",
        "draft_model",
        "draft_models",
        "teacher",
        "student",
        "data",
        "qa",
        "results",
        "answers",
        "traces",
        "learn",
        "prompts_file",
    )

    def shown(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [shown(key, one) for one in value]
        if not isinstance(value, str) or key not in (*written, *read):
            return value
        name, equals, path = value.rpartition("=") if key in named else ("", "", value)
        whole = key in written or is_here(path)
        parts = [path] if whole else path.split("+")  # drafters of one tree
        return name + equals + "+".join(without_folder(part, key in written) for part in parts)

    def without_folder(path: str, local: bool) -> str:
        return os.path.basename(os.path.normpath(path)) if local or is_here(path) else path

    def is_here(path: str) -> bool:
        return os.path.exists(os.path.expanduser(path))

    return {key: shown(key, value) for key, value in vars(arguments).items()}


if __name__ == "__main__":
    sys.exit(main())
