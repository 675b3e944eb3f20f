"""Greedy tokens with a drafter against mlx-lm's, in five ways of decoding; status 1 if any differ.

    python tests/parity.py --model FOLDER --drafter ngram --data PROMPTS.jsonl --num-prompts 40

Not collected by pytest: a real model takes minutes. Without --drafter a recurrent drafter with
random weights drafts; it is hardly ever right, so every tree is mostly rejected.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx_distill  # the BLAS comes first
from mlx_distill import CacheConfig

import mlx.core as mx  # isort: skip
import mlx_lm  # isort: skip
from mlx_lm.models.cache import RotatingKVCache  # isort: skip
from mlx_lm.sample_utils import make_logits_processors  # isort: skip

from mlx_distill.data.prompts import encode_prompt
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.files import read_jsonl
from mlx_distill.target.target import Target

QUANTISED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}


@dataclass
class Way:
    """One way of decoding: options for ours, for mlx-lm's, and caches for both."""

    ours: Callable[[], dict[str, Any]] = dict
    theirs: Callable[[], dict[str, Any]] = dict
    caches: Callable[[Any], Any] = lambda model: None


def packed() -> dict[str, Any]:
    # Rounding of several rows at once would be other codes in the cache.
    return {"cache": CacheConfig(**QUANTISED), "exact_rows": True}


def penalties() -> dict[str, Any]:
    return {"logits_processors": make_logits_processors(repetition_penalty=1.2)}


WAYS = {
    "plain": Way(),
    "8-bit KV": Way(packed, lambda: dict(QUANTISED)),
    "penalties": Way(penalties, penalties),
    "stop texts": Way(lambda: {"stop": ["the", "."]}),
    "window": Way(caches=lambda model: [RotatingKVCache(48, 4) for _ in model.layers]),
}


def drafter_for(name: str | None, model: Any, tokenizer: Any) -> Any:
    """Return the drafter of a name, or one with random weights."""
    if name:
        return mlx_distill.load_drafter(name, model, tokenizer)
    target = Target.of(model)
    assert target.embed is not None
    mx.random.seed(0)
    network = RecurrentDrafter(RecurrentDrafterConfig(target.hidden_size, target.vocab_size, 64, 1))
    network.set_dtype(target.embed(mx.array([0])).dtype)
    mx.eval(network.parameters())
    return BoundDrafter(network, target.embed, {})


def differs(
    pair: Any,
    drafter: Any,
    prompt: list[int],
    way: Way,
    max_tokens: int,
    plan: DraftPlan | None = None,
) -> str | None:
    """Return where a drafted text leaves mlx-lm's, or None."""
    caches = [way.caches(pair[0]) for _ in range(2)]
    options = {"max_tokens": max_tokens, "prompt_cache": caches[0], "plan": plan, **way.ours()}
    ours = list(mlx_distill.stream_generate(*pair, prompt, drafter=drafter, **options))
    options = {"max_tokens": max_tokens, "prompt_cache": caches[1], **way.theirs()}
    theirs = itertools.islice(mlx_lm.stream_generate(*pair, prompt, **options), len(ours))
    text = ""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        text += other.text
        if one.token != other.token:
            best = mx.sort(other.logprobs.astype(mx.float32))[-2:]
            return f"token {place}, best two {(best[1] - best[0]).item():.2g} nats apart"
    ended = ours[-1].finish_reason == "stop" or len(ours) == max_tokens
    return None if ended and text.startswith("".join(r.text for r in ours)) else "the texts' ends"


def main() -> int:
    """Print the differences of every way; return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", help="folder, hub repository or ngram (default: random)")
    parser.add_argument("--data", required=True, help="JSONL rows with prompt or turns")
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument(
        "--plan", type=int, nargs=3, metavar=("WIDTH", "LENGTH", "NODES"), help="of every draft"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    pair = mlx_distill.load(arguments.model)
    drafter = drafter_for(arguments.drafter, *pair)
    rows = itertools.islice(read_jsonl(arguments.data), arguments.num_prompts)
    texts = [row["prompt"] if "prompt" in row else row["turns"][0] for _, row in rows]
    prompts = [encode_prompt(pair[1], text)[:1024] for text in texts]
    plan, total = DraftPlan(*arguments.plan) if arguments.plan else None, 0
    for name in arguments.ways:
        found = [differs(pair, drafter, p, WAYS[name], arguments.max_tokens, plan) for p in prompts]
        wrong = [f"prompt {number}: {where}" for number, where in enumerate(found) if where]
        total += len(wrong)
        print(f"{name}: {len(wrong)} of {len(prompts)} differ", *wrong, sep="\n  ", flush=True)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
