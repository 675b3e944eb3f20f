"""The walk along a tree: from what was drawn at every node to the path that is accepted.

    drawn    B  D  X  .       tokens  A  B  D  C      parents  0  0  1  0
    path     A  B  D          last node 2             next token X

With it comes what the rest of a cycle asks of the path, so that a GPU is sent one dispatch.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.verification import Walk, follow
from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.comparing import differs
from mlx_distill.kernels.program import SIMD_WIDTH, Program

MOST = 256  # threads: each copies some values of the hidden state
WIDE = 2**20  # tokens that are no children's, in cases


class Walked(NamedTuple):
    """Where the draws led.

    Args:
        report: Per node its parent, whether it is on the path, what was drawn there, whether its
            logits are no numbers; then whether the draw is certain, and the node's rank, if these
            are known.
        accepted: Which nodes are on the path; the root always is.
        path: The path's nodes, root first; the last one is repeated up to the greatest length.
        text: The path's tokens; -1 after its end.
        last: The path's last node.
        depth: That node's distance from the root.
        next_token: What was drawn there.
        seen: The hidden state there.
    """

    report: Int[mx.array, "R N"]
    accepted: Bool[mx.array, " N"]
    path: Int[mx.array, " T"]
    text: Int[mx.array, " T"]
    last: Int[mx.array, ""]
    depth: Int[mx.array, ""]
    next_token: Int[mx.array, ""]
    seen: Float[mx.array, " D"]


PROGRAM = Program(
    name="walk",
    inputs=("tokens", "parents", "drawn", "greatest", "certain", "ranks", "hidden", "settings"),
    outputs=("report", "accepted", "path", "text", "place", "seen"),
    # Every thread walks for itself, a few comparisons each, so that nobody waits for anybody.
    # Parents come before their children, and siblings differ, so one pass finds the end.
    body="""
  int count = tokens_shape[0], width = hidden_shape[1], steps = settings[0];
  int certain_row = settings[1], ranks_row = settings[2];
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
    bool on_path = above == node;
    accepted[node] = on_path;
    report[node] = parents[node];
    report[count + node] = int(on_path);
    report[2 * count + node] = drawn[node];
    report[3 * count + node] = int(isnan(float(greatest[node])));
    if (certain_row > 0) {
      report[certain_row * count + node] = int(certain[node]);
    }
    if (ranks_row > 0) {
      report[ranks_row * count + node] = ranks[node];
    }
  }
  for (int step = self; step < steps; step += threads) {
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
    tree: PrefixTree,
    drawn: Int[mx.array, " N"],
    greatest: Float[mx.array, " N"],
    certain: Bool[mx.array, " N"] | None,
    hidden: Float[mx.array, "N D"],
) -> Walked:
    nodes, width = hidden.shape
    steps = tree.max_depth + 1
    threads = min(MOST, -(-max(nodes, width) // SIMD_WIDTH) * SIMD_WIDTH)
    rows = 4 + (certain is not None) + (tree.ranks is not None)
    settings = [steps, 0 if certain is None else 4, 0 if tree.ranks is None else rows - 1]
    report, accepted, path, text, place, seen = PROGRAM(
        [
            tree.tokens,
            tree.parents,
            drawn,
            greatest,
            mx.array([True]) if certain is None else certain,
            mx.array([0]) if tree.ranks is None else tree.ranks,
            hidden,
            mx.array(settings),
        ],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, nodes), (nodes,), (steps,), (steps,), (3,), (width,)],
        output_dtypes=[mx.int32, mx.bool_, *[mx.int32] * 3, hidden.dtype],
    )
    return Walked(report, accepted, path, text, place[0], place[1], place[2], seen)


def _twin(
    tree: PrefixTree,
    drawn: Int[mx.array, " N"],
    greatest: Float[mx.array, " N"],
    certain: Bool[mx.array, " N"] | None,
    hidden: Float[mx.array, "N D"],
) -> Walked:
    walk = follow(tree, drawn)
    rows = [tree.parents, walk.accepted, drawn, greatest]
    report = _report(*rows, *(x for x in (certain, tree.ranks) if x is not None))
    text, depth = along(tree, walk)
    seen = hidden[walk.last]
    return Walked(report, walk.accepted, walk.path, text, walk.last, depth, walk.next_token, seen)


def along(tree: PrefixTree, walk: Walk) -> tuple[Int[mx.array, " T"], Int[mx.array, ""]]:
    """Return the tokens of a path, -1 after its end, and the depth of its last node."""
    depth = tree.depths[walk.last]
    return mx.where(mx.arange(tree.max_depth + 1) <= depth, tree.tokens[walk.path], -1), depth


@mx.compile
def _report(
    parents: mx.array, accepted: mx.array, drawn: mx.array, greatest: mx.array, *others: mx.array
) -> Int[mx.array, "R N"]:
    """Return rows in one array, by one operation."""
    rows = [x[None] for x in (parents, accepted, drawn, greatest, *others)]
    rows[3] = mx.isnan(rows[3])
    numbers = mx.array(np.arange(len(rows), dtype=np.int32)[:, None])
    report = rows[0]
    for number, row in enumerate(rows[1:], start=1):
        report = mx.where(numbers == number, row.astype(mx.int32), report)
    return report


def _cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        nodes = int(random.choice([2, 3, 8, 16, 33, 64]))
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
        greatest = random.normal(size=nodes).astype(np.float32)
        greatest[random.random(nodes) < 0.1] = np.nan
        tree = PrefixTree.from_parents(
            mx.array(tokens.astype(np.int32)), mx.array(parents, mx.int32), max(depths)
        )
        if random.random() < 0.5:
            tree = replace(tree, ranks=mx.array(random.permutation(nodes).astype(np.int32)))
        certain = mx.array((random.random(nodes) < 0.9).tolist()) if random.random() < 0.5 else None
        args = (tree, mx.array(drawn, mx.int32), mx.array(greatest), certain, hidden)
        yield Case(f"{shape} of {nodes}, {width} wide, {dtype}", args, {})


walk = Operation("walk", _kernel, _twin, _cases, differs({}))
"""Return where the draws led: see ``Walked``.

Args:
    tree: Siblings carry different tokens; something is drafted.
    drawn: A token per node.
    greatest: The largest logit at every node; no number where any is none.
    certain: Whether the draws are certain; None if all are.
    hidden: What the head saw at every node.
"""
