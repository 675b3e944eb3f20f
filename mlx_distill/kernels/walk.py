"""The walk along a tree: from what was drawn at every node to the path that is accepted.

    drawn    B  D  X  .       tokens  A  B  D  C      parents  0  0  1  0
    path     A  B  D          last node 2             next token X

With it comes what the rest of a cycle asks of the path, so that a GPU is sent one dispatch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from mlx_distill.core.prefix_tree import ancestors
from mlx_distill.core.verification import followed
from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.comparing import differs
from mlx_distill.kernels.program import SIMD_WIDTH, Program

MOST = 256  # threads: each copies some values of the hidden state
WIDE = 2**20  # tokens that are no children's, in cases


class Walked(NamedTuple):
    """Where the draws led.

    Args:
        accepted: 1 for the nodes on the path, the root among them, else 0.
        path: The path's nodes, root first; the last one is repeated up to the greatest length.
        text: The path's tokens; -1 after its end.
        last: The path's last node.
        depth: That node's distance from the root.
        next_token: What was drawn there.
        seen: The hidden state there.
    """

    accepted: Int[mx.array, " N"]
    path: Int[mx.array, " T"]
    text: Int[mx.array, " T"]
    last: Int[mx.array, ""]
    depth: Int[mx.array, ""]
    next_token: Int[mx.array, ""]
    seen: Float[mx.array, " D"]


PROGRAM = Program(
    name="walk",
    inputs=("tokens", "parents", "drawn", "hidden", "steps"),
    outputs=("accepted", "path", "text", "place", "seen"),
    # Every thread walks for itself, a few comparisons each, so that nobody waits for anybody.
    # Parents come before their children, and siblings differ, so one pass finds the end.
    body="""
  int count = tokens_shape[0], width = hidden_shape[1], most = steps[0];
  int self = thread_position_in_threadgroup.x, threads = threads_per_threadgroup.x;
  int end = 0, length = 1;
  for (int node = 1; node < count; node++) {
    if (parents[node] == end && tokens[node] == drawn[end]) {
      end = node;
      length++;
    }
  }
  for (int node = self; node < count; node += threads) {
    int above = end;
    while (above > node) {
      above = parents[above];
    }
    accepted[node] = int(above == node);
  }
  for (int step = self; step < most; step += threads) {
    int node = end;
    for (int down = length - 1; down > step; down--) {
      node = parents[node];
    }
    path[step] = node;
    text[step] = step < length ? int(tokens[node]) : -1;
  }
  if (self == 0) {
    place[0] = end;
    place[1] = length - 1;
    place[2] = drawn[end];
  }
  for (int column = self; column < width; column += threads) {
    seen[column] = hidden[long(end) * width + column];
  }
""",
)


def _kernel(
    tokens: Int[mx.array, " N"],
    parents: Int[mx.array, " N"],
    mask: Bool[mx.array, "N N"],
    drawn: Int[mx.array, " N"],
    hidden: Float[mx.array, "N D"],
    max_depth: int,
) -> Walked:
    nodes, width = hidden.shape
    steps = max_depth + 1
    threads = min(MOST, -(-max(nodes, width) // SIMD_WIDTH) * SIMD_WIDTH)
    accepted, path, text, place, seen = PROGRAM(
        [tokens, parents, drawn, hidden, mx.array([steps])],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(nodes,), (steps,), (steps,), (3,), (width,)],
        output_dtypes=[*[mx.int32] * 4, hidden.dtype],
    )
    return Walked(accepted, path, text, place[0], place[1], place[2], seen)


def _twin(
    tokens: Int[mx.array, " N"],
    parents: Int[mx.array, " N"],
    mask: Bool[mx.array, "N N"],
    drawn: Int[mx.array, " N"],
    hidden: Float[mx.array, "N D"],
    max_depth: int,
) -> Walked:
    walk = followed(tokens, parents, mask, drawn, max_depth)
    depth = walk.accepted.sum().astype(mx.int32) - 1
    text = mx.where(mx.arange(max_depth + 1) <= depth, tokens[walk.path], -1)
    accepted = walk.accepted.astype(mx.int32)
    seen = hidden[walk.last]
    return Walked(accepted, walk.path, text, walk.last, depth, walk.next_token, seen)


def _cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        nodes = int(random.choice([1, 2, 3, 8, 16, 33, 64]))
        shape = str(random.choice(["tree", "chain", "star"]))
        parents = {
            "tree": [0, *(int(random.integers(node)) for node in range(1, nodes))],
            "chain": [0, *range(nodes - 1)],
            "star": [0] * nodes,
        }[shape]
        depths = [0] * nodes
        for node in range(1, nodes):
            depths[node] = depths[parents[node]] + 1
        tokens = random.permutation(nodes) + int(random.integers(WIDE))
        # At most nodes a child is drawn, so that walks are long now and then.
        children = [[tokens[c] for c in range(1, nodes) if parents[c] == n] for n in range(nodes)]
        drawn = [
            int(random.choice(own)) if own and random.random() < 0.8 else int(random.choice(tokens))
            for own in children
        ]
        dtype = [mx.float32, mx.float16, mx.bfloat16][random.integers(3)]
        width = int(random.choice([1, 31, 64, 300]))
        hidden = mx.array(random.normal(size=(nodes, width)).astype(np.float32)).astype(dtype)
        links, deepest = mx.array(parents, mx.int32), max(depths)
        found, made = mx.array(tokens.astype(np.int32)), mx.array(drawn, mx.int32)
        mask = ancestors(links, deepest)
        args = (found, links, mask, made, hidden, deepest)
        yield Case(f"{shape} of {nodes}, {width} wide, {dtype}", args, {})


walk = Operation("walk", _kernel, _twin, _cases, differs({}))
"""Return where the draws led: see ``Walked``.

Args:
    tokens: One per node; siblings differ.
    parents: Each node's, smaller than the node.
    mask: Row i holds the ancestors of node i and i itself.
    drawn: A token per node.
    hidden: What the head saw at every node.
    max_depth: No node is deeper.
"""
