"""Two drafts as one: what a slow twin says of every path, and the likeliest of those verified."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.core.draft import WORST_SCORE, Draft
from mlx_distill.core.merging import merged
from mlx_distill.core.prefix_tree import PrefixTree

Path = tuple[int, ...]


def random_draft(random: np.random.Generator, count: int, depth: int, tokens: int) -> Draft:
    """Return a tree of siblings that differ; the shares of a node's children add up to below 1."""
    rows, used = [(9, 0, 0)], {0: set()}
    shares, left = [1.0], [1.0]
    while len(rows) < count:
        parent = int(random.integers(len(rows)))
        free = [token for token in range(tokens) if token not in used[parent]]
        if rows[parent][2] == depth or not free:
            continue
        token = int(random.choice(free))
        used[parent].add(token)
        used[len(rows)] = set()
        share = left[parent] * random.uniform(0.2, 0.8)
        left[parent] -= share
        rows.append((token, parent, rows[parent][2] + 1))
        shares.append(shares[parent] * share)
        left.append(1.0)
    fields = mx.array(np.array(rows).T.astype(np.int32))
    return Draft(*fields, mx.log(mx.array(shares)), max(row[2] for row in rows))


def filled_up(draft: Draft, size: int) -> Draft:
    fill = size - draft.tokens.size
    arrays = (mx.pad(x, (0, fill)) for x in (draft.parents, draft.depths))
    tokens = mx.concatenate([draft.tokens, mx.full((fill,), 9, mx.int32)])
    scores = mx.pad(draft.scores, (0, fill), constant_values=WORST_SCORE)
    return Draft(tokens, *arrays, scores, draft.max_depth)


def paths(tree: Draft | PrefixTree) -> list[Path]:
    found: list[Path] = [()]
    pairs = zip(tree.tokens.tolist()[1:], tree.parents.tolist()[1:], strict=True)
    for token, parent in pairs:
        # A spare node may come before its parent.
        found.append((*(found[parent] if parent < len(found) else (-1,)), token))
    return found


def slow_merged(first: Draft, second: Draft) -> dict[Path, float]:
    """Return the log-probability of every path of either, by the definition."""
    drafts = [
        dict(zip(paths(draft), np.array(draft.scores, np.float64), strict=True))
        for draft in (first, second)
    ]

    def share(draft: dict[Path, float], path: Path) -> float:
        return float(np.exp(draft[path] - draft[path[:-1]])) if path in draft else 0.0

    scores: dict[Path, float] = {(): 0.0}
    for path in sorted(drafts[0] | drafts[1], key=len)[1:]:
        siblings = [p for p in drafts[0] if p and p[:-1] == path[:-1]]
        rest = 1 - sum(share(drafts[0], p) for p in siblings)
        here = share(drafts[0], path) + rest * share(drafts[1], path)
        scores[path] = scores[path[:-1]] + np.log(here)
    return scores


@pytest.mark.parametrize("seed", range(12))
def test_paths_are_as_likely_as_defined_and_the_likeliest_are_verified(seed: int) -> None:
    random = np.random.default_rng(seed)
    first = random_draft(random, int(random.integers(2, 7)), 3, 3)
    second = random_draft(random, int(random.integers(6, 12)), 4, 4)
    expected = slow_merged(first, second)
    both = merged(filled_up(first, 8), second)
    assert both.max_depth == max(first.max_depth, second.max_depth)
    assert both.spare == 8
    real = np.array(both.scores) > WORST_SCORE / 2
    found = {
        path: score
        for path, score, keep in zip(paths(both), both.scores.tolist(), real, strict=True)
        if keep
    }
    assert found.keys() == expected.keys()
    assert real.sum() == len(expected)  # each of them once
    for path, score in found.items():
        assert score == pytest.approx(expected[path], abs=1e-5)
    likeliest = sorted(expected, key=lambda path: -expected[path])
    for count in (2, 5, second.tokens.size):
        tree = both.best_first(count)
        assert sorted(paths(tree)) == sorted(likeliest[:count])
        depths = [len(path) for path in paths(tree)]
        assert tree.depths.tolist() == depths
    # No more than the second draft has: behind the real ones come spare ones.
    assert both.best_first(1000).tokens.size == second.tokens.size


def test_whole_beams_of_both_are_paths() -> None:
    random = np.random.default_rng(3)
    first, second = random_draft(random, 4, 2, 3), random_draft(random, 7, 2, 3)
    beams = {tuple(beam[1:]) for beam in merged(filled_up(first, 8), second).beams()}
    assert beams == {path for path in {*paths(first), *paths(second)} if len(path) == 2}


def test_a_draft_that_says_nothing_changes_nothing() -> None:
    second = random_draft(np.random.default_rng(1), 9, 3, 4)
    nothing = Draft.chain(mx.array([9]), [])
    tree = merged(filled_up(nothing, 4), second).best_first(9)
    alone = second.best_first(9)
    assert tree.tokens.tolist() == alone.tokens.tolist()
    assert tree.parents.tolist() == alone.parents.tolist()
