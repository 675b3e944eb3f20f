"""Twins beside the plain expressions of MLX that they stand for, timed in turn.

    python -m tests.kernels.twins --output FILE.json

The shapes are those of the bundled pair's cycles, and of a few more where those are small. A twin
and its expression are called in turn, some milliseconds each; a round's ratio compares neighbours.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_distill import checkpoint  # before MLX, since the BLAS comes first

# isort: split
import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_distill.calibration.kernels import in_use, operations
from mlx_distill.calibration.pair import Pair
from mlx_distill.core.sampling import Sampling
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.files import write_whole
from mlx_distill.kernels.acceptance import ETA
from mlx_distill.kernels.beam_step import NATS, token_bits
from mlx_distill.kernels.choice import Case
from mlx_distill.kernels.noise import Keyed
from mlx_distill.kernels.product_source import Matrix
from mlx_distill.kernels.walk import Walked
from mlx_distill.machine import provenance

MODELS = Path(__file__).parents[2] / "models"
CONTEXT, ROUNDS, ROUND_S = 128, 21, 0.008
BASE = 10_000.0


# ------------------------------------------------------------------------------- what MLX's users
# write for the same


def product(x: mx.array, weight: mx.array, bias: Any, packed: Any) -> mx.array:
    if packed is None:
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    scales, biases, size, bits, mode = packed
    y = mx.quantized_matmul(x, weight, scales, biases, True, size, bits, mode)
    return y if bias is None else y + bias


def joined(x: mx.array, norm: Any, matrices: tuple[Matrix, ...]) -> list[mx.array]:
    rows = mx.fast.rms_norm(x, *norm)
    return [product(rows, *one) for one in matrices]


def gated(x: mx.array, norm: Any, gate: Matrix, up: Matrix) -> mx.array:
    rows = mx.fast.rms_norm(x, *norm)
    return nn.silu(product(rows, *gate)) * product(rows, *up)


def added(x: mx.array, by: Matrix, rows: mx.array) -> mx.array:
    return rows + product(x, *by)


def rope(x: mx.array, table: mx.array, dims: int, by_two: bool) -> mx.array:
    nodes, names = x.transpose(2, 1, 0, 3), {"traditional": by_two, "base": BASE, "scale": 1.0}
    return mx.fast.rope(nodes, dims, offset=mx.arange(x.shape[2]), **names).transpose(2, 1, 0, 3)


def ropes(q: mx.array, k: mx.array, *how: Any) -> list[mx.array]:
    *turning, norms = how
    if norms is not None:
        q, k = mx.fast.rms_norm(q, *norms[0]), mx.fast.rms_norm(k, *norms[1])
    return [rope(q, *turning), rope(k, *turning)]


def attention(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array, inside: mx.array, scale: float
) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def draw(logits: mx.array, sampling: Sampling, *_: Any) -> mx.array:
    """As mlx-lm draws, which makes its own noise."""
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sampling.mlx_lm_sampler(logits.shape[-1])(logits)


def walk(tree: Any, drawn: mx.array, greatest: mx.array, certain: Any, hidden: mx.array) -> Any:
    """On the device, too: nodes are reached whose ancestors' draws all led there.

    The path and its tokens are made as the twin makes them: a graph, which few cycles compute.
    """
    nodes = mx.arange(tree.tokens.size)
    entered = (drawn[tree.parents] == tree.tokens) | (nodes == 0)
    accepted = mx.all(~tree.mask | entered, axis=-1)
    last = mx.where(accepted, nodes, 0).max()
    rows = [tree.parents, accepted, drawn, mx.isnan(greatest)]
    rows += [row for row in (certain, tree.ranks) if row is not None]
    path = mx.sort(mx.where(accepted, nodes, last))[: tree.max_depth + 1]
    within = mx.arange(tree.max_depth + 1) <= tree.depths[last]
    others = path, mx.where(within, tree.tokens[path], -1), drawn[last]
    return mx.stack([row.astype(mx.int32) for row in rows]), last, hidden[last], others


def beams(
    logits: mx.array, above: mx.array, tokens: mx.array, width: int, bits: int
) -> tuple[mx.array, ...]:
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    scores = (scores - above / NATS).reshape(-1)
    best = mx.argpartition(-scores, kth=width - 1)[:width]
    columns = best % logits.shape[1]
    return tokens[0][columns], best // logits.shape[1], scores[best]


def variation(student: mx.array, teacher: mx.array) -> mx.array:
    return 0.5 * mx.abs(mx.exp(teacher) - mx.exp(student)).sum(axis=-1)


def mixture(student: mx.array, teacher: mx.array) -> mx.array:
    p, q = mx.softmax(teacher, axis=-1), mx.softmax(student, axis=-1)
    accepted = mx.minimum(p, q).sum(axis=-1)
    divergence = (p * (log_softmax(teacher) - log_softmax(student))).sum(axis=-1)
    weight = mx.stop_gradient(mx.exp(-ETA * accepted))
    return weight * divergence + (1 - weight) * (1 - accepted)


def log_softmax(x: mx.array) -> mx.array:
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


PLAIN: dict[str, Callable[..., Any]] = {
    "few_rows": product,
    "joined_products": joined,
    "gated_product": gated,
    "added_product": added,
    "tree_rope": rope,
    "tree_turns": ropes,
    "tree_attention": attention,
    "sampler": draw,
    "walk": walk,
    "beam_step": beams,
    "total_variation": variation,
    "likely_acceptance": mixture,
}


# Where cycles call these, it is in something that is compiled.
COMPILED = ("beam_step",)


def as_compiled(function: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """Return a function of a case's arguments whose arrays a compiled one takes."""
    settings = [None if isinstance(x, mx.array) else x for x in case.args]

    def of_arrays(*arrays: mx.array) -> Any:
        given = iter(arrays)
        return function(*(next(given) if x is None else x for x in settings))

    compiled = mx.compile(of_arrays)
    return lambda *args: compiled(*(x for x in args if isinstance(x, mx.array)))


def asked(name: str, result: Any) -> Any:
    """Return what a cycle asks of a result; the rest is never computed."""
    if name == "sampler" and not isinstance(result, mx.array):
        return result.tokens, result.greatest, result.certain
    if name == "walk":
        walked = isinstance(result, Walked)
        return (result.report, result.last, result.seen) if walked else result[:3]
    return result


# -------------------------------------------------------------------------------------- cases


def cases() -> dict[str, list[Case]]:
    """Return the cases of every operation."""
    model, tokenizer = checkpoint.load(MODELS / "stories-14m")
    drafter = load_drafter(str(MODELS / "stories-14m-redrafter"), model, tokenizer)
    found = {
        name: list(own[-1:])
        for name, own in in_use(Pair(model, tokenizer, drafter), CONTEXT).items()
    }
    logits, noise = 3 * mx.random.normal((8, 32_000)), Keyed(mx.random.key(3), 0)
    laws = {
        "greedy": Sampling(),
        "temperature 1": Sampling(1.0),
        "top-p": Sampling(1.0, top_p=0.95),
    }
    found["sampler"] = [
        Case(
            f"{law}, 8 x 32,000",
            (logits, laws[law], noise if laws[law].temperature else None, mx.arange(8)),
            {},
        )
        for law in laws
    ]
    # How long a partition takes depends on the values.
    others = mx.zeros((4, 1), mx.uint32), mx.arange(1536)[None], 4, token_bits(1536)
    beams = [(3 * mx.random.normal((4, 1536)), *others) for _ in range(4)]
    found["beam_step"] = [Case(f"4 x 1,536, number {i}", args, {}) for i, args in enumerate(beams)]
    pair = 3 * mx.random.normal((64, 4096)), 3 * mx.random.normal((64, 4096))
    for name in ("total_variation", "likely_acceptance"):
        found[name] = [Case("64 x 4,096, with gradients", pair, {})]
    return found


# -------------------------------------------------------------------------------------- timing


def compared(name: str, case: Case) -> dict[str, Any]:
    """Return medians in microseconds, and the quartiles of the rounds' ratios."""
    operation = operations()[name]

    def of(function: Callable[..., Any]) -> Callable[[], None]:
        if name in COMPILED:
            function = as_compiled(function, case)
        return lambda: mx.eval(asked(name, operation.tried(function, case)))

    calls = [of(operation.twin), of(PLAIN[name])]
    counts = [max(1, round(ROUND_S / _seconds(call, 2))) for call in calls]
    times = np.array(
        [[_seconds(*pair) for pair in zip(calls, counts, strict=True)] for _ in range(ROUNDS)]
    )
    low, ratio, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.5, 0.75]).tolist()
    twin, plain = (1e6 * np.median(times, axis=0)).tolist()
    return {"name": name, "case": case.name, "twin_us": twin, "plain_us": plain} | {
        "ratio": ratio,
        "quartiles": [low, high],
    }


def _seconds(call: Callable[[], None], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def main(argv: list[str] | None = None) -> int:
    """Print the times; return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args(argv)
    rows = [compared(name, case) for name, own in cases().items() for case in own]
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['name']:18} {row['case']:28} twin {row['twin_us']:9.1f} us  plain "
            f"{row['plain_us']:9.1f} us  {row['ratio']:.2f} x ({low:.2f}-{high:.2f})"
        )
    if options.output:
        write_whole(options.output, json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
