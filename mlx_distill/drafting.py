"""What drafts, as the flags of a command ask for it."""

import argparse
import sys
from typing import Any

from mlx import nn

from mlx_distill import cli
from mlx_distill.calibration.automatic import is_on
from mlx_distill.calibration.choosing import choosing
from mlx_distill.calibration.pair import Pair
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.errors import InputError
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.draft_verification import BLOCK, COUPLED
from mlx_distill.speculation.generation import chain_of
from mlx_distill.target.memory import open_remembered

AUTO, ALONE, NGRAM, MERGED = "auto", "drafter", "ngram", "ngram+drafter"


def add_drafting_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what drafts."""
    parser.add_argument(
        "--drafter",
        type=cli.path,
        help="the drafter's folder or hub repository (default: a bundled one that fits the model, "
        "else none)",
    )
    parser.add_argument(
        "--draft-model",
        type=cli.path,
        help="a small model with the same tokenizer that drafts instead (default: none)",
    )
    parser.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="INT",
        default=3,
        help="tokens that it drafts, 1 to 64, in a chain unless the flags of a draft's shape say "
        "otherwise (default: 3)",
    )
    parser.add_argument(
        "--draft-verification",
        choices=(BLOCK, COUPLED),
        help="how its chains are verified above temperature 0: block accepts most of them, and a "
        "seed's text depends on the draft; coupled gives the text that the seed gives without "
        "(default: block where that can be done: no trees, no exact rows)",
    )
    parser.add_argument("--no-drafter", action="store_true", help="decode plainly")
    parser.add_argument(
        "--draft",
        choices=(AUTO, ALONE, NGRAM, MERGED),
        help="auto tries the drafter, n-grams, both and neither on the first texts, and keeps what "
        "is fastest with this model on this machine; ngram drafts what followed the last tokens "
        "earlier in the text, which needs no drafter; ngram+drafter has both in one tree, with a "
        "draft model, too (default: auto; the drafter where one is named, learns, or has a shape "
        "of drafts asked for)",
    )
    parser.add_argument(
        "--learn",
        type=cli.path,
        metavar="DIR",
        help="let the drafter learn from what it is used for: answers and what is learned from "
        "them are kept in this folder, on this machine alone; the text does not change, and the "
        "drafter that is named neither (default: nothing is kept)",
    )
    parser.add_argument(
        "--reset-learning", action="store_true", help="first forget all that --learn has kept"
    )


def check_drafting(arguments: argparse.Namespace, plan: DraftPlan | None) -> None:
    """Decide which way to draft is meant where no flag says it.

    Raises:
        InputError: If two flags name what drafts, and not the same.
    """
    if arguments.no_drafter and arguments.drafter:
        raise InputError("--drafter and --no-drafter exclude each other")
    if arguments.no_drafter and arguments.draft_model:
        raise InputError("--draft-model and --no-drafter exclude each other")
    if arguments.draft_model and arguments.drafter:
        raise InputError("--drafter and --draft-model exclude each other")
    if arguments.draft_verification and not arguments.draft_model:
        raise InputError("--draft-verification is for the chains of a --draft-model; name one")
    if arguments.draft_verification == BLOCK and arguments.draft == MERGED:
        raise InputError("--draft ngram+drafter makes trees, blocks are chains; leave either out")
    if arguments.draft is not None and arguments.no_drafter:
        raise InputError(f"--draft {arguments.draft} and --no-drafter exclude each other")
    for flag in ("drafter", "draft_model"):
        if arguments.draft == NGRAM and getattr(arguments, flag):
            flag = flag.replace("_", "-")
            raise InputError(f"--draft {NGRAM} takes no --{flag}; ngram+drafter has both")
    if arguments.draft == AUTO:
        _check_auto(arguments, plan)
    if arguments.draft is None:
        named = arguments.no_drafter or arguments.drafter or arguments.draft_model
        kept = arguments.learn or plan is not None or not is_on()
        arguments.draft = ALONE if named or kept else AUTO


def _check_auto(arguments: argparse.Namespace, plan: DraftPlan | None) -> None:
    """Raise InputError where nothing could be tried."""
    if arguments.draft_model:
        raise InputError("--draft auto takes no --draft-model; name either")
    if arguments.learn:
        raise InputError("--learn changes the drafter all the time; leave --draft auto out")
    if plan is not None or not is_on():
        raise InputError("--draft auto plans by what is measured; leave shapes of drafts out")


def _drafter(
    arguments: argparse.Namespace, model: nn.Module, tokenizer: Any, cache: CacheConfig
) -> Any:
    """Return the drafter that the flags ask for, or None."""
    if arguments.no_drafter or arguments.draft_model:
        return None
    if arguments.draft == NGRAM:
        arguments.drafter = NGRAM
    if arguments.draft == AUTO and open_remembered(model).support != "none":
        auto = cli.auto_drafter(arguments, model, tokenizer)
        sampled = arguments.temperature > 0
        pair = Pair(model, tokenizer, auto, cache, arguments.exact_rows)
        choice = choosing(pair, auto, sampled)
        if choice.trial.chosen is not None or not arguments.prompts_file:
            print(choice.sentence(), file=sys.stderr)
        return auto
    drafter = cli.load_drafter(arguments, model, tokenizer)
    if drafter is None and arguments.draft in (AUTO, ALONE):
        print(
            "no drafter is named and none that is bundled fits, so mlx-lm decodes plainly; train "
            "one with python -m mlx_distill.train_drafter, or try --draft ngram",
            file=sys.stderr,
        )
    return drafter


def drafting(
    arguments: argparse.Namespace,
    model: nn.Module,
    tokenizer: Any,
    cache: CacheConfig,
    plan: DraftPlan | None,
) -> tuple[Any, nn.Module | None, DraftPlan | None]:
    """Return the drafter, the draft model that drafts by itself, and the shape that was asked for.

    A draft model whose nodes are merged with n-grams' is a drafter like any other.
    """
    drafter = _drafter(arguments, model, tokenizer, cache)
    draft_model = cli.load_draft_model(arguments, tokenizer)
    merged = arguments.draft == MERGED
    if draft_model is not None and merged:
        drafter = cli.drafter_of(draft_model, model, cache.max_kv_size)
        plan, draft_model = plan or chain_of(arguments.num_draft_tokens), None
    if arguments.compare and not (drafter or draft_model or merged):
        raise InputError("--compare needs a drafter; name one with --drafter")
    return drafter, draft_model, plan
