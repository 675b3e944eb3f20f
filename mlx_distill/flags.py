"""Flags of the command that writes text: many prompts, one saved before, what is told of one."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx import nn
from mlx_lm.models.cache import QuantizedKVCache

from mlx_distill import cli
from mlx_distill.data.sources import read_rows
from mlx_distill.errors import InputError
from mlx_distill.hashes import weights_hash
from mlx_distill.limits import check_value
from mlx_distill.parsing import parse_json
from mlx_distill.speculation.caching import PromptCache
from mlx_distill.speculation.requests import BatchSize
from mlx_distill.target.layer_cache import leaves
from mlx_distill.target.prompt_cache import read_prompt_cache

# What another run has to have in common to go on with a file of answers.
DEPEND_ON = (
    "model",
    "adapter_path",
    "chat_template_config",
    "ignore_chat_template",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "max_kv_size",
    "kv_bits",
    "kv_group_size",
    "quantized_kv_start",
    "exact_rows",
)
# Go with one prompt, and not with a file of them.
ONE_PROMPT = (
    "compare",
    "learn",
    "show_draft",
    "json",
    "system_prompt",
    "prefill_response",
    "prompt_cache_file",
)
# The same where a draft model may draw: which text a seed gives depends on it then.
DRAWN_BY = "draft_model", "num_draft_tokens", "draft_verification"


def add_prompts_file_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that writes the answers to a file of prompts."""
    parser.add_argument(
        "--prompts-file",
        type=cli.path,
        metavar="FILE",
        help="answer all prompts of a JSONL file (prompt, messages, turns or text in a row, with "
        "max_tokens, temperature, top_p, top_k, min_p, seed and stop of its own, if it likes), or "
        "of a text file with one in every line",
    )
    parser.add_argument(
        "--output",
        type=cli.path,
        metavar="FILE",
        help="where their answers are written, as JSONL in the prompts' order; a command that was "
        "stopped goes on where it ended (default: stdout, each as it is ready)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="INT",
        help="answers that are written at the same time, 1 to 1024 (default: 8)",
    )


def check_prompts_file(arguments: argparse.Namespace) -> None:
    """Raise InputError if a flag goes with one prompt only, or with a file of them only."""
    if not arguments.prompts_file:
        for flag in ("output", "batch"):
            if getattr(arguments, flag) is not None:
                raise InputError(f"--{flag} needs --prompts-file, the file of the prompts")
        return
    for flag in ONE_PROMPT:
        if getattr(arguments, flag):
            flag = flag.replace("_", "-")
            raise InputError(f"--{flag} goes with one prompt; leave it out beside --prompts-file")
    if arguments.batch is not None:
        check_value("batch", arguments.batch, BatchSize)
    cli.new_file(arguments.output)
    next(read_rows(arguments.prompts_file), None)


def answers_settings(
    arguments: argparse.Namespace, model: nn.Module, draft_model: nn.Module | None
) -> dict[str, Any]:
    """Return what the answers to a file of prompts depend on, but for the prompts."""
    settings = cli.settings(arguments)
    also = ("extra_eos_token",) if arguments.extra_eos_token else ()
    found = {name: settings[name] for name in (*DEPEND_ON, *also)} | {
        "weights": weights_hash(model)
    }
    if draft_model is not None:
        found |= {name: settings[name] for name in DRAWN_BY}
        found["draft_weights"] = weights_hash(draft_model)
    return found


@dataclass(frozen=True)
class SavedPrompt:
    """What ``mlx_lm.cache_prompt`` has read already.

    Args:
        caches: The model's caches behind it.
        tokenizer_config: What the tokenizer was made with.
    """

    caches: PromptCache
    tokenizer_config: dict[str, Any]


def saved_prompt(arguments: argparse.Namespace) -> SavedPrompt | None:
    """Return what --prompt-cache-file holds; the model is then the one that it names.

    Raises:
        InputError: If it holds something else, another model's, or is quantised in another way
            than was asked for.
    """
    if arguments.prompt_cache_file is None:
        return None
    path = Path(arguments.prompt_cache_file).expanduser()
    caches, said = read_prompt_cache(path)
    arguments.model = arguments.model or said.get("model")
    if arguments.model is None or said.get("model", arguments.model) != arguments.model:
        raise InputError(
            f"{path} is a prompt cache of {said.get('model', 'a model that it does not name')}; "
            "name that with --model, or leave it out"
        )
    packed = [cache for cache in leaves(caches) if isinstance(cache, QuantizedKVCache)]
    asked = arguments.kv_bits, arguments.kv_group_size
    if arguments.kv_bits is not None and any((x.bits, x.group_size) != asked for x in packed):
        raise InputError(
            f"{path} is quantised to {packed[0].bits} bits in groups of {packed[0].group_size}; "
            "leave --kv-bits out"
        )
    try:
        config = parse_json(said.get("tokenizer_config", "{}"))
    except InputError as error:
        raise InputError(f"{path}: its tokenizer_config is damaged: {error}") from None
    end = config.get("eos_token") if isinstance(config, dict) else None
    # Whether code of others is run is the command's to say.
    return SavedPrompt(caches, {"eos_token": end} if isinstance(end, str) else {})


def add_ends(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Let more tokens end an answer, as mlx-lm's command does; numbers are ids.

    Raises:
        InputError: If one is no token of the tokenizer's.
    """
    known = tokenizer.get_vocab() if tokens else {}
    for token in tokens:
        if token not in known and not (token.isdecimal() and int(token) in known.values()):
            raise InputError(f"--extra-eos-token {token!r:.60} is no token of the tokenizer's")
        tokenizer.add_eos_token(token)


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is told of it."""
    parser.add_argument(
        "--verbose",
        type=_truth,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="print statistics on stderr, True or False (default: True)",
    )
    parser.add_argument(
        "--show-draft", action="store_true", help="colour the tokens that were drafted"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also decode plainly with mlx-lm; print the ratio"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the whole run as a last line of JSON"
    )


def _truth(text: str) -> bool:
    if text.lower() in ("true", "t", "false", "f"):
        return text.lower() in ("true", "t")
    raise argparse.ArgumentTypeError(f"expected True or False, got {text}")
