"""Cases of a large model's shapes, by operation: an 8B Llama's, 4 bits in groups of 64, 8 rows."""

import itertools
from collections.abc import Callable

import mlx.core as mx

from mlx_distill.core.prefix_tree import PrefixTree, ancestors
from mlx_distill.core.sampling import Sampling
from mlx_distill.kernels.beam_step import token_bits
from mlx_distill.kernels.choice import Case
from mlx_distill.kernels.noise import Keyed
from mlx_distill.kernels.product_source import Matrix, Norm, Packed

VOCABULARY, WIDTH, INNER = 128_256, 4096, 14_336
HEADS, KEY_HEADS, HEAD_WIDTH = 32, 8, 128
NODES, CACHED = 8, 1024
DTYPE = mx.bfloat16
FILTERED = Sampling(0.8, top_p=0.95, top_k=40)


def large_cases(name: str) -> list[Case]:
    """Return the cases of an operation; none of one that is not known here."""
    return MADE[name]() if name in MADE else []


def _products() -> list[Case]:
    return [_product(WIDTH, WIDTH), _product(INNER, WIDTH), _product(VOCABULARY, WIDTH)]


def _product(columns: int, depth: int) -> Case:
    args = (_normal(NODES, depth), *_matrix(columns, depth))
    return Case(f"4 bits, {NODES} x {depth} by {columns}", args, {})


def _joined() -> list[Case]:
    into = tuple(_matrix(heads * HEAD_WIDTH, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    return [Case("queries, keys, values", (_normal(NODES, WIDTH), _norm(), into), {})]


def _gated() -> list[Case]:
    pair = _matrix(INNER, WIDTH), _matrix(INNER, WIDTH)
    return [Case("gate and up", (_normal(NODES, WIDTH), _norm(), *pair), {})]


def _added() -> list[Case]:
    shapes = {"after attention": WIDTH, "down": INNER}
    return [
        Case(name, (_normal(NODES, depth), _matrix(WIDTH, depth), _normal(NODES, WIDTH)), {})
        for name, depth in shapes.items()
    ]


def _matrix(columns: int, depth: int) -> Matrix:
    packed, scales, biases = mx.quantize(_normal(columns, depth), group_size=64, bits=4)
    return Matrix(packed, None, Packed(scales, biases, 64, 4, "affine"))


def _norm() -> Norm:
    return Norm(_normal(WIDTH), 1e-5)


def _draws() -> list[Case]:
    logits, noise = _normal(NODES, VOCABULARY), Keyed(mx.random.key(1), 0)
    sampled = [(Sampling(1.0), "temperature 1"), (FILTERED, "top-p and top-k")]
    greedy = Case(f"greedy, {NODES} rows", (logits, Sampling()), {})
    places = mx.arange(NODES)
    return [greedy, *(Case(word, (logits, law, noise, places), {}) for law, word in sampled)]


def _steps() -> list[Case]:
    logits = mx.random.normal((4, VOCABULARY))
    args = (logits, mx.zeros((4, 1), mx.uint32), mx.arange(VOCABULARY)[None], 4)
    return [Case("4 beams", (*args, token_bits(VOCABULARY)), {})]


def _walks() -> list[Case]:
    tree = _tree()
    args = (tree, mx.arange(NODES), mx.zeros(NODES), None, _normal(NODES, WIDTH))
    return [Case(f"{NODES} nodes", args, {})]


def _ropes() -> list[Case]:
    x = _normal(1, NODES, HEADS, HEAD_WIDTH).swapaxes(1, 2)
    return [Case("queries", (x, mx.random.normal((NODES, HEAD_WIDTH)), HEAD_WIDTH, False), {})]


def _turns() -> list[Case]:
    pair = (_normal(1, NODES, heads, HEAD_WIDTH).swapaxes(1, 2) for heads in (HEADS, KEY_HEADS))
    args = (*pair, mx.random.normal((NODES, HEAD_WIDTH)), HEAD_WIDTH, False, None)
    return [Case("queries and keys", args, {})]


def _attentions() -> list[Case]:
    inside = ancestors(_tree().parents, NODES)
    mask = mx.concatenate([mx.ones((NODES, CACHED), mx.bool_), inside], axis=1)
    queries = _normal(1, NODES, HEADS, HEAD_WIDTH).swapaxes(1, 2)
    keys, values = (_normal(1, KEY_HEADS, CACHED + NODES, HEAD_WIDTH) for _ in range(2))
    args = (queries, keys, values, mask, inside, HEAD_WIDTH**-0.5)
    return [Case(f"{NODES} nodes, {CACHED} cached", args, {})]


def _losses() -> list[Case]:
    return [Case("64 rows", (_normal(64, VOCABULARY), _normal(64, VOCABULARY)), {})]


def _tree() -> PrefixTree:
    parents = [0, *((node - 1) // 2 for node in range(1, NODES))]
    return PrefixTree.from_parents(mx.arange(NODES), mx.array(parents), 3)


def _normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(next(_keys))).astype(DTYPE)


_keys = itertools.count()
MADE: dict[str, Callable[[], list[Case]]] = {
    "few_rows": _products,
    "joined_products": _joined,
    "gated_product": _gated,
    "added_product": _added,
    "tree_turns": _turns,
    "sampler": _draws,
    "beam_step": _steps,
    "walk": _walks,
    "tree_rope": _ropes,
    "tree_attention": _attentions,
    "likely_acceptance": _losses,
    "total_variation": _losses,
}
