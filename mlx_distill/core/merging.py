"""Two drafts as one: an earlier one that is sure of a share, and a later one that has the rest.

    first   A - B .6 - C .5        second   A - B .4 - D .5       both   A - B .76 - C .5
                                              `- E .3                      |       `- D .25
                                                                           `- E .12

Of what follows a token, the first draft says a part, with probabilities h that add up to H <= 1;
the second has something to say of everything, q. A token that both have is one node:

    p(token) = h(token) + (1 - H) q(token)

All is done on the device, so that a draft which is still being made can be merged with one that the
host knows.

Source:
    Cleary and Witten 1984, "Data compression using adaptive coding and partial string matching":
    the longer context speaks first, and leaves the rest to the next one.
"""

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from mlx_distill.core.draft import WORST_SCORE, Draft
from mlx_distill.core.prefix_tree import connected

LEAST_SHARE = 1e-13  # of a node behind its parent: its logarithm is a score


def merged(first: Draft, second: Draft) -> Draft:
    """Return a draft of the nodes of both; those that both have are the second's.

    The first one's nodes of that kind stay where they were, but are spare: they count among
    ``Draft.spare`` and are less likely than every other. So as many nodes can be verified as the
    second draft has.

    Args:
        first: Has the same root; its scores are log-probabilities. Nodes of a depth of 0 beside the
            root fill it up.
        second: Any draft; log-probabilities, too.
    """
    depth = max(first.max_depth, second.max_depth)
    fields = [
        (draft.tokens, draft.parents, draft.depths, draft.scores) for draft in (first, second)
    ]
    tokens, parents, depths, scores = _merged(*fields[0], *fields[1], depth)
    return Draft(tokens, parents, depths, scores, depth, spare=first.tokens.size)


@mx.compile
def _merged(
    tokens1: Int[mx.array, " M"],
    parents1: Int[mx.array, " M"],
    depths1: Int[mx.array, " M"],
    scores1: Float[mx.array, " M"],
    tokens2: Int[mx.array, " N"],
    parents2: Int[mx.array, " N"],
    depths2: Int[mx.array, " N"],
    scores2: Float[mx.array, " N"],
    max_depth: int,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return tokens, parents, depths and scores of both; see ``merged``."""
    index1, index2 = (mx.array(np.arange(x.size, dtype=np.int32)) for x in (tokens1, tokens2))
    above1, above2 = _lines(parents1, index1, max_depth), _lines(parents2, index2, max_depth)
    # Two nodes are the same where their paths agree at every depth.
    alike = (tokens2[:, None] == tokens1) & (depths2[:, None] == depths1)
    agreed = above2 @ alike.astype(mx.float32) @ above1.T
    real1 = (depths1 > 0) | (index1 == 0)
    twins = (agreed > depths2[:, None]) & (depths2[:, None] == depths1) & real1
    both = twins.astype(mx.float32)
    shared = both.sum(axis=0) > 0

    share1, share2 = _shares(scores1, parents1), _shares(scores2, parents2)
    child = (parents1[:, None] == index1) & (depths1[:, None] > 0)
    taken = mx.where(child, share1[:, None], 0).sum(axis=0)
    left = 1 - (both @ taken)[parents2]
    inner2 = index2 > 0
    mixed = mx.where(inner2, both @ share1 + left * share2, 1)
    log2 = mx.log(mx.minimum(mx.maximum(mixed, LEAST_SHARE), 1))
    log1 = mx.where(shared, log2 @ both, mx.log(mx.maximum(share1, LEAST_SHARE)))
    path2, path1 = above2 @ log2, above1 @ log1
    path1 = mx.where(shared | ~real1, WORST_SCORE, path1)

    place1 = index1 + tokens2.size
    places = mx.where(shared, (index2[:, None] * twins).sum(axis=0), place1)
    return (
        mx.concatenate([tokens2, tokens1]).astype(mx.int32),
        mx.concatenate([parents2, places[parents1]]).astype(mx.int32),
        mx.concatenate([depths2, depths1]).astype(mx.int32),
        mx.concatenate([path2, path1]),
    )


def _lines(
    parents: Int[mx.array, " N"], index: Int[mx.array, " N"], max_depth: int
) -> Float[mx.array, "N N"]:
    """Return 1 from every node to each on its path, itself included, else 0."""
    links: Bool[mx.array, "N N"] = (index[None] == parents[:, None]) | (
        index[None] == index[:, None]
    )
    return (connected(links.astype(mx.float32), max_depth) > 0).astype(mx.float32)


def _shares(scores: Float[mx.array, " N"], parents: Int[mx.array, " N"]) -> Float[mx.array, " N"]:
    """Return how likely each node is behind its parent; 1 for the root."""
    return mx.exp(mx.minimum(scores - scores[parents], 0))
