"""Write text with a model, faster with a drafter, and with exactly the model's own distribution.

    python -m mlx_distill.generate --prompt "Once upon a time"

Without ``--model`` the bundled pair is used. The text goes to stdout as it is written, the
statistics to stderr.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn

from mlx_distill import cli, drafting, flags, machine
from mlx_distill.benchmarking.comparison import Comparison, compare, plain
from mlx_distill.calibration.pair import Pair
from mlx_distill.config import add_flags, from_flags
from mlx_distill.console import Console
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import encode_prompt, encode_suffix
from mlx_distill.drafters.auto import AutoDrafter
from mlx_distill.drafters.learning_config import LearningConfig
from mlx_distill.drafters.protocol import DraftLength, DraftPlan
from mlx_distill.errors import InputError
from mlx_distill.limits import Count, check_value
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.generation import generate, stream_generate
from mlx_distill.speculation.showing import Run, print_statistics, show

if TYPE_CHECKING:
    from mlx_distill.distillation.learning import Learner

# What a prompt cache decides, or cannot be used for.
BEFORE = "system_prompt", "prefill_response", "max_kv_size", "draft_model", "compare", "learn"
# Tokens of the texts that a trial is made of before --compare.
TRIAL_TEXT = 128
# Of a text before it: a shape of draft is compiled at its fifth use, of five tokens perhaps.
WARM_UP = 64


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Write what the arguments ask for; return the exit status."""
    arguments = _parser().parse_args(argv)
    sampling = from_flags(Sampling, arguments)
    plan = cli.asked_shape(_parser(), argv, arguments)
    cache = from_flags(CacheConfig, arguments)
    template_config = cli.template_config(arguments)
    _check_flags(arguments)
    _refuse_unused(argv, arguments)
    drafting.check_drafting(arguments, plan)
    text = _prompt(arguments)
    if arguments.reset_learning:
        from mlx_distill.distillation.learning_folder import reset_learning

        reset_learning(arguments.learn)
    saved = flags.saved_prompt(arguments)
    model, tokenizer = cli.load_model(arguments, saved.tokenizer_config if saved else None)
    flags.add_ends(tokenizer, arguments.extra_eos_token)
    drafter, draft_model, plan = drafting.drafting(arguments, model, tokenizer, cache, plan)
    merged = arguments.draft == drafting.MERGED
    options = _options(arguments, {"plan": plan, "cache": cache, **asdict(sampling)}, draft_model)
    if arguments.prompts_file:
        options["drafter"] = cli.add_ngrams(drafter, model) if merged else drafter
        return _answer_file(arguments, model, tokenizer, template_config, options)
    prompt = _encoded(arguments, text, tokenizer, template_config)
    options |= {"prompt_cache": saved.caches} if saved else {}
    with _learner(arguments, drafter, model, tokenizer) as learner:
        drafter = learner.drafter if learner else drafter
        options["drafter"] = cli.add_ngrams(drafter, model) if merged else drafter
        if arguments.compare:
            _warm_up(model, tokenizer, prompt, sampling, options)
        start, most = time.perf_counter(), arguments.max_tokens
        responses = stream_generate(model, tokenizer, prompt, max_tokens=most, **options)
        responses = learner.listen(responses) if learner else responses
        raw = arguments.ignore_chat_template or not tokenizer.has_chat_template
        run = show(responses, Console(), arguments.show_draft, text if raw else "")
        seconds = time.perf_counter() - start
        comparison = None
        if arguments.compare and run.last is not None and not run.interrupted:
            written, law = (run.tokens, run.last.generation_tps), (sampling, cache)
            comparison = compare(model, tokenizer, prompt, *written, *law, most)
        if arguments.verbose:
            print_statistics(run.last, bool(options["drafter"] or draft_model), comparison)
        if arguments.json:
            print(json.dumps(_record(run, seconds, arguments, comparison)), flush=True)
        if learner and not run.interrupted and (learned := learner.learn()) and arguments.verbose:
            print(learned, file=sys.stderr)
    return 130 if run.interrupted else 0


def _warm_up(
    model: nn.Module, tokenizer: Any, prompt: list[int], sampling: Sampling, options: dict[str, Any]
) -> None:
    """Let a trial come to its end, and both that are compared compile and cache what they need."""
    auto, cache = options["drafter"], options["cache"]
    if isinstance(auto, AutoDrafter):
        from mlx_distill.benchmarking.arms import settled

        pair = Pair(model, tokenizer, auto, cache, options["exact_rows"])
        settled(pair, sampling, [prompt], TRIAL_TEXT)
    list(stream_generate(model, tokenizer, prompt, max_tokens=WARM_UP, **options))
    list(plain(model, tokenizer, prompt, sampling, cache, 16))
    mx.reset_peak_memory()


def _encoded(
    arguments: argparse.Namespace, text: str, tokenizer: Any, template_config: dict[str, Any]
) -> list[int]:
    """Return the prompt's token ids."""
    how = {
        "chat_template": not arguments.ignore_chat_template,
        "template_config": template_config,
    }
    if arguments.prompt_cache_file:
        return encode_suffix(tokenizer, text, **how)
    begun = {"system_prompt": arguments.system_prompt, "prefill": arguments.prefill_response}
    return encode_prompt(tokenizer, text, **begun, **how)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.generate",
        description="Write text with a model, faster with a drafter.",
    )
    cli.add_model_flags(parser)
    drafting.add_drafting_flags(parser)
    cli.add_exact_rows_flag(parser)
    _add_prompt_flags(parser)
    add_flags(parser, Sampling, {"temperature": "temp"})
    flags.add_prompts_file_flags(parser)
    cli.add_shape_flags(parser)
    add_flags(parser, CacheConfig)
    add_flags(parser, LearningConfig)
    flags.add_report_flags(parser)
    return parser


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is written, and how much of it."""
    parser.add_argument(
        "--prompt",
        "-p",
        default="Once upon a time",
        help=r"the prompt, where \n is a line's end and \t a tab; - reads stdin as it is "
        "(default: %(default)s)",
    )
    parser.add_argument("--system-prompt", help="put in front of the chat")
    parser.add_argument(
        "--prompt-cache-file",
        type=cli.path,
        metavar="FILE",
        help="what mlx_lm.cache_prompt wrote: the prompt goes on behind that, with its model",
    )
    parser.add_argument(
        "--prefill-response", metavar="TEXT", help="what the answer of a chat begins with"
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="use the prompt as it is"
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        metavar="INT",
        default=256,
        help="the longest answer, in tokens; at least 1 (default: 256)",
    )
    parser.add_argument(
        "--stop",
        nargs="+",
        default=(),
        metavar="TEXT",
        help=r"texts that end the answer, with \n and \t as in the prompt",
    )
    parser.add_argument(
        "--extra-eos-token",
        nargs="+",
        default=(),
        metavar="TOKEN",
        help="tokens that end the answer, too, by name or id",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="INT",
        help="repeats the random numbers; at least 0 (default: others every time)",
    )


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt == "-":
        try:
            return sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InputError(
                f"stdin is not {error.encoding} text: {error.reason} at byte {error.start}"
            ) from None
    return _with_line_ends(arguments.prompt)  # as mlx-lm's command does


def _with_line_ends(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise InputError before anything is loaded."""
    if arguments.compare and arguments.no_drafter:
        raise InputError("--compare needs a drafter; leave --no-drafter out")
    if arguments.reset_learning and not arguments.learn:
        raise InputError("--reset-learning needs --learn, the folder of what is to be forgotten")
    if arguments.learn and (arguments.no_drafter or arguments.draft_model):
        flag = "--no-drafter" if arguments.no_drafter else "--draft-model"
        raise InputError(f"--learn needs a drafter that can learn; leave {flag} out")
    flags.check_prompts_file(arguments)
    check_value("max_tokens", arguments.max_tokens, Count)
    check_value("num_draft_tokens", arguments.num_draft_tokens, DraftLength)


def _refuse_unused(argv: Sequence[str] | None, arguments: argparse.Namespace) -> None:
    """Raise InputError if a flag was given that nothing would look at."""
    cli.refuse_unused(
        _parser(),
        argv,
        (arguments.prompts_file, ["prompt"], "--prompts-file has the prompts"),
        (arguments.no_drafter, [DraftPlan], "--no-drafter drafts nothing"),
        (not arguments.learn, [LearningConfig], "nothing is learned without --learn, the folder"),
        (arguments.prompt_cache_file, BEFORE, "--prompt-cache-file holds what comes before"),
    )


def _options(
    arguments: argparse.Namespace, options: dict[str, Any], draft_model: nn.Module | None
) -> dict[str, Any]:
    """Return the arguments of ``stream_generate`` but for the drafter and the length."""
    stop = [_with_line_ends(text) for text in arguments.stop]
    options |= {"seed": arguments.seed, "stop": stop, "draft_model": draft_model}
    options |= {"exact_rows": arguments.exact_rows}
    options |= {"draft_verification": arguments.draft_verification}
    return options | {"num_draft_tokens": arguments.num_draft_tokens}


def _answer_file(
    arguments: argparse.Namespace,
    model: nn.Module,
    tokenizer: Any,
    template_config: dict[str, Any],
    options: dict[str, Any],
) -> int:
    """Write the answers to a file of prompts; return the exit status."""
    from mlx_distill.speculation.prompts_file import BATCH, answer_file

    return answer_file(
        model,
        tokenizer,
        arguments.prompts_file,
        cli.new_file(arguments.output),
        flags.answers_settings(arguments, model, options["draft_model"]),
        options | {"max_tokens": arguments.max_tokens, "batch": arguments.batch or BATCH},
        {"chat_template": not arguments.ignore_chat_template, "template_config": template_config},
    )


def _learner(
    arguments: argparse.Namespace, drafter: Any, model: nn.Module, tokenizer: Any
) -> "AbstractContextManager[Learner | None]":
    """Return what lets the drafter learn from the answer, if the flags ask for it."""
    config = from_flags(LearningConfig, arguments)
    if not arguments.learn:
        return nullcontext()
    if drafter is None:
        raise InputError("--learn needs a drafter; name one with --drafter")
    from mlx_distill.distillation.learning import Learner  # what learns is not loaded to write

    return Learner(arguments.learn, drafter, model, tokenizer, config)


def _record(
    run: Run, seconds: float, arguments: argparse.Namespace, comparison: Comparison | None
) -> dict[str, Any]:
    """Return the run as one JSON object."""
    counters = {}
    if run.last is not None:
        counters = {f.name: getattr(run.last, f.name) for f in fields(run.last)}
        for name in ("text", "token", "logprobs", "logits_row", "from_draft"):
            del counters[name]
    return {
        "text": run.text,
        **counters,
        "interrupted": run.interrupted,
        "seconds": seconds,
        "comparison": asdict(comparison) if comparison else None,
        "config": cli.settings(arguments),
        **machine.provenance(),
    }


cli.callable_as(__name__, generate)

if __name__ == "__main__":
    sys.exit(main())
