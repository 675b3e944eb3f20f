"""What a tree costs on recurrent and hybrid models, beside what mlx-lm takes for a line.

    python tests/hybrid_cost.py --output hybrid.json

Five families with eight layers of width 768 and random weights read a text; then mlx-lm's model on
one token and on eight, a tree of eight nodes and its commit take turns behind it. Nothing else
should run.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_distill import cli, machine  # a fast BLAS on Linux, before anything else loads mlx

# isort: split
import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_config, tiny_model

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.target.target import Target

SIZES: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 4096,
}
LINEAR = {"num_heads": 12, "head_dim": 64, "short_conv_kernel_size": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 24, "intermediate_size": 1536, "state_size": 64, "n_groups": 1},
    "qwen3_5": {
        "linear_num_value_heads": 12,
        "linear_num_key_heads": 6,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "full_attention_interval": 4,
    },
    "lfm2": {
        "layer_types": (["conv"] * 3 + ["full_attention"]) * 2,
        "block_dim": 768,
        "block_ff_dim": 2048,
    },
    "falcon_h1": {
        "mamba_d_ssm": 1536,
        "mamba_n_heads": 24,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_n_groups": 1,
    },
    "kimi_linear": {
        "linear_attn_config": {
            **LINEAR,
            "kda_layers": [1, 2, 3, 5, 6, 7],  # counted from one
            "full_attn_layers": [4, 8],
        },
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "moe_intermediate_size": 512,
    },
}
PARENTS = [0, 0, 0, 1, 1, 2, 3, 3]
PATH = [0, 1, 3]  # that is committed
TEXT = 64  # tokens of the text


def model_of(family: str) -> nn.Module:
    """Return a model whose weights leave its numbers as large as a trained one's."""
    config = tiny_config(family)
    sizes = SIZES | FAMILIES[family]
    nested = "text_config" in config
    changes = {"text_config": config["text_config"] | sizes} if nested else sizes
    model = tiny_model(family, **changes)
    model.update(tree_map(lambda x: 0.15 * x if x.ndim > 1 else x, model.parameters()))
    mx.eval(model.parameters())
    return model


def costs_of(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of every way, round by round."""
    target = Target.of(model)
    text = mx.array([(7 * place) % 4093 + 1 for place in range(TEXT)])
    read: list[Any] = make_prompt_cache(model)
    mx.eval(model(text[None], cache=read))
    tree = PrefixTree.from_parents(mx.arange(11, 19), mx.array(PARENTS), 3)
    mx.eval(tree.tokens, tree.parents, tree.mask, tree.depths)
    taken: dict[str, list[float]] = {}

    def clocked(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = run()
        taken.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        return made

    def plainly(tokens: mx.array, caches: list[Any]) -> None:
        mx.eval(model(tokens[None], cache=caches))

    def verified(caches: list[Any]) -> Any:
        call = target.verify(tree, caches)
        mx.eval(call.logits)
        return call

    def committed(call: Any, caches: list[Any]) -> None:
        call.commit(PATH)
        mx.eval([cache.state for cache in caches])

    for _ in range(rounds + 2):
        for count, name in ((1, "a step"), (8, "eight in a line")):
            caches = copy.deepcopy(read)
            mx.eval([cache.state for cache in caches])
            clocked(name, lambda: plainly(tree.tokens[:count], caches))  # noqa: B023
        caches = copy.deepcopy(read)
        mx.eval([cache.state for cache in caches])
        call = clocked("a tree of eight", lambda: verified(caches))  # noqa: B023
        clocked("a commit", lambda: committed(call, caches))  # noqa: B023
    return {name: times[2:] for name, times in taken.items()}


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Time all families, print what was found, and keep it; return the exit status."""
    parser = cli.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="turns (default: 40)")
    parser.add_argument("--output", type=Path, help="write everything there, as JSON")
    arguments: argparse.Namespace = parser.parse_args(argv)
    found = {}
    for family in FAMILIES:
        times = costs_of(model_of(family), arguments.rounds)
        tree = _quartiles(times["a tree of eight"], times["eight in a line"])
        commit = _quartiles(times["a commit"], times["a step"])
        medians = {name: statistics.median(one) for name, one in times.items()}
        found[family] = {"tree": tree, "commit": commit, "milliseconds": medians}
        low, middle, high = tree
        print(f"{family}: a tree of eight {middle:.2f} ({low:.2f}-{high:.2f}) of eight in a line,")
        low, middle, high = commit
        print(f"    a commit {middle:.2f} ({low:.2f}-{high:.2f}) of a step")
    if arguments.output:
        whole = {"families": found, "rounds": arguments.rounds, **machine.provenance()}
        arguments.output.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


def _quartiles(times: list[float], others: list[float]) -> list[float]:
    ratios = [one / other for one, other in zip(times, others, strict=True)]
    return statistics.quantiles(ratios, n=4)


if __name__ == "__main__":
    sys.exit(main())
