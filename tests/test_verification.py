"""Sample and follow is exact: proved by enumeration, tested by counting, with controls that fail.

The toy models have a distribution of their own for every prefix, so a draw that is made at, or
credited to, the wrong node shows. Prefixes are counted from after the root, which is certain.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from oracles.beam_search import slow_beam_search
from oracles.sampling import sampling_law, softmax
from scipy.stats import chi2

from mlx_distill.core.beam_search import beam_search
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.sampling import Sampling, sample
from mlx_distill.core.verification import Walk, follow

Path = tuple[int, ...]


class ToyModel:
    """A distribution for every prefix.

    Args:
        vocab_size: Number of tokens.
        seed: Of the distributions.
        kind: "random"; "one-hot"; "equal"; or "sparse", where half of the tokens have no mass.
    """

    def __init__(self, vocab_size: int, seed: int, kind: str = "random"):
        self.vocab_size = vocab_size
        self.seed = seed
        self.kind = kind
        self.logits = cache(self._logits)
        self.table = cache(self._table)

    def _logits(self, prefix: Path) -> np.ndarray:
        random = np.random.default_rng([self.seed, *prefix])
        logits = 1.2 * random.normal(size=self.vocab_size)
        if self.kind == "equal":
            return np.zeros(self.vocab_size)
        empty = {"random": 0, "sparse": self.vocab_size // 2, "one-hot": self.vocab_size - 1}
        logits[random.permutation(self.vocab_size)[: empty[self.kind]]] = -np.inf
        return logits

    def probs(self, prefix: Path) -> np.ndarray:
        """Return the distribution of the token after a prefix."""
        return softmax(self.logits(prefix))

    def _table(self, length: int) -> np.ndarray:
        """Return the logits after all prefixes of a length; the prefix's tokens index it."""
        rows = [self.logits(path) for path in product(range(self.vocab_size), repeat=length)]
        return np.array(rows).reshape((self.vocab_size,) * (length + 1))


def joint_law(target: ToyModel, num_tokens: int, **shaping: float) -> np.ndarray:
    """Return the joint law of the first tokens of plain decoding."""
    law = np.ones(())
    for place in range(num_tokens):
        law = law[..., None] * sampling_law(target.table(place), **shaping)
    return law


def best_first_tree(vocab_size: int, num_nodes: int) -> PrefixTree:
    """Return a tree of the most probable paths of a drafter that looks one token back."""
    rows = np.random.default_rng(vocab_size).normal(size=(vocab_size, vocab_size))
    table = mx.array(np.log(softmax(rows)).astype(np.float32))
    root = mx.array([0])
    draft = beam_search(lambda tokens, state: (table[tokens], state), root, (), 3, 3)
    return draft.best_first(num_nodes)


def likely_beams(model: ToyModel, width: int, length: int) -> list[Path]:
    """Return the beams of a search over a model, most probable first."""
    return list(slow_beam_search(lambda path: np.log(model.probs(path)), width, length)[-1])


def complete_tree(vocab_size: int, depth: int) -> PrefixTree:
    """Return the tree in which every token is a child of every node."""
    return PrefixTree.from_beams([[0, *p] for p in product(range(vocab_size), repeat=depth)])


def node_paths(tree: PrefixTree) -> list[Path]:
    """Return the tokens from the root, itself left out, to each node."""
    tokens = tree.tokens.tolist()
    return [tuple(tokens[node] for node in path[1:]) for path in tree.paths()]


def emitted(walk: Walk, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of independent walks, and how many each emitted; -1 fills up the rows."""
    accepted = np.array(walk.accepted)
    count = accepted.sum(axis=-1)
    # Parents come before their children, so the accepted nodes are in the path's order.
    order = np.argsort(~accepted, axis=-1, kind="stable")
    tokens = np.take_along_axis(drawn, order, axis=-1)
    np.put_along_axis(tokens, count[:, None] - 1, np.array(walk.next_token)[:, None], axis=-1)
    return np.where(np.arange(drawn.shape[-1]) < count[:, None], tokens, -1), count


# Walking


def test_the_walk_of_the_worked_example():
    a, b, c, d, x = range(5)
    tree = PrefixTree.from_beams([[a, b, d], [a, c]])
    walk = follow(tree, mx.array([b, d, x, c]))
    assert tree.tokens.tolist() == [a, b, d, c]
    assert walk.accepted.tolist() == [True, True, True, False]
    assert walk.last.item() == 2
    assert walk.next_token.item() == x


def test_a_token_is_accepted_only_under_its_own_parent():
    tree = PrefixTree.from_beams([[0, 1, 2], [0, 3, 4]])
    # 2 was drawn under 3, and 4 under 1.
    walk = follow(tree, mx.array([1, 4, 0, 2, 0]))
    assert walk.accepted.tolist() == [True, True, False, False, False]
    assert walk.next_token.item() == 4


def test_the_roots_own_token_may_be_drawn_again():
    walk = follow(PrefixTree.from_beams([[7, 7, 7]]), mx.array([7, 7, 3]))
    assert walk.accepted.tolist() == [True, True, True]
    assert walk.next_token.item() == 3


def slow_walk(tree: PrefixTree, drawn: list[int]) -> list[int]:
    """Return the nodes that are visited, by walking."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    path = [0]
    while True:
        here = path[-1]
        children = [
            node
            for node in range(1, len(tokens))
            if parents[node] == here and tokens[node] == drawn[here]
        ]
        if not children:
            return path
        path += children


@pytest.mark.parametrize("seed", range(5))
def test_the_walk_equals_a_loop_over_nodes(seed: int):
    random = np.random.default_rng(seed)
    beams = [[0, *random.integers(0, 3, 4).tolist()] for _ in range(random.integers(1, 6))]
    tree = PrefixTree.from_beams(beams)
    drawn = random.integers(0, 3, (8, 25, tree.tokens.size))
    walk = follow(tree, mx.array(drawn))
    assert walk.accepted.shape == drawn.shape
    for place in np.ndindex(drawn.shape[:-1]):
        path = slow_walk(tree, drawn[place].tolist())
        assert np.flatnonzero(np.array(walk.accepted)[place]).tolist() == path
        assert walk.last[place].item() == path[-1]
        assert walk.next_token[place].item() == drawn[place][path[-1]]


# Enumeration

ENUMERATED_TREES: dict[str, tuple[int, Callable[[], PrefixTree]]] = {
    "root": (5, lambda: PrefixTree.root(mx.array([0]))),
    "one beam": (5, lambda: PrefixTree.from_beams([[0, 1, 2, 3]])),
    "one beam of one token": (5, lambda: PrefixTree.from_beams([[0, 0, 0, 0]])),
    "three beams": (
        4,
        lambda: PrefixTree.from_beams([[0, 1, 2, 3], [0, 1, 3, 0], [0, 2, 2, 1]]),
    ),
    "best-first": (4, lambda: best_first_tree(4, 8)),
    "all first tokens": (5, lambda: complete_tree(5, 1)),
    "all paths": (2, lambda: complete_tree(2, 3)),
}


@cache
def all_walks(name: str) -> tuple[PrefixTree, np.ndarray, np.ndarray]:
    """Return a tree, every combination of draws at its nodes, and what each of them emits."""
    vocab_size, make = ENUMERATED_TREES[name]
    return walks_of(make(), vocab_size)


def walks_of(tree: PrefixTree, vocab_size: int) -> tuple[PrefixTree, np.ndarray, np.ndarray]:
    num_nodes = tree.tokens.size
    drawn = np.indices((vocab_size,) * num_nodes).reshape(num_nodes, -1).T
    return tree, drawn, emitted(follow(tree, mx.array(drawn)), drawn)[0]


def cycle_law(
    walks: tuple[PrefixTree, np.ndarray, np.ndarray], target: ToyModel, prefix: Path
) -> dict[Path, float]:
    """Return the probability of everything that one cycle can emit, over all draws."""
    tree, drawn, tokens = walks
    weights = np.ones(len(drawn))
    for node, path in enumerate(node_paths(tree)):
        weights *= target.probs(prefix + path)[drawn[:, node]]
    longest = int(tree.depths.max().item()) + 1
    base = target.vocab_size + 1
    codes = (tokens[:, :longest] + 1) @ base ** np.arange(longest)
    law: dict[Path, float] = {}
    for code, mass in enumerate(np.bincount(codes, weights)):
        digits = [code // base**place % base - 1 for place in range(longest)]
        if mass:
            law[tuple(digit for digit in digits if digit >= 0)] = mass
    return law


@cache
def later_walks(vocab_size: int, root: int) -> tuple[PrefixTree, np.ndarray, np.ndarray]:
    """Return the enumerated walks of the tree that follows a token."""
    step = [(root + i) % vocab_size for i in range(3)]
    beams = [[root, step[1], step[0]], [root, step[1], step[1]], [root, step[2]]]
    return walks_of(PrefixTree.from_beams(beams), vocab_size)


def law_of_first_tokens(name: str, target: ToyModel, num_tokens: int, then: str) -> np.ndarray:
    """Return the joint law of the first tokens of a text that begins with a tree.

    Args:
        name: The tree of the first cycle.
        target: The law at every prefix.
        num_tokens: How many tokens.
        then: What continues a cycle that emits too few: "plain" decoding, or further "cycles".
    """
    law = np.zeros((target.vocab_size,) * num_tokens)
    pending = cycle_law(all_walks(name), target, ())
    while pending:
        longer: dict[Path, float] = defaultdict(float)
        for prefix, mass in pending.items():
            if len(prefix) >= num_tokens:
                law[prefix[:num_tokens]] += mass
                continue
            if then == "plain":
                more = {(token,): p for token, p in enumerate(target.probs(prefix))}
            else:
                more = cycle_law(later_walks(target.vocab_size, prefix[-1]), target, prefix)
            for path, probability in more.items():
                longer[prefix + path] += mass * probability
        pending = longer
    return law


@pytest.mark.parametrize("then", ["plain", "cycles"])
@pytest.mark.parametrize("kind", ["random", "one-hot", "equal", "sparse"])
@pytest.mark.parametrize("name", ENUMERATED_TREES)
def test_over_all_draws_the_first_tokens_have_the_targets_law(name: str, kind: str, then: str):
    target = ToyModel(ENUMERATED_TREES[name][0], seed=3, kind=kind)
    expected = np.ones(())
    for num_tokens in (1, 2, 3):
        expected = expected[..., None] * softmax(target.table(num_tokens - 1))
        law = law_of_first_tokens(name, target, num_tokens, then)
        assert np.abs(law - expected).max() < 1e-9
        assert abs(law.sum() - 1) < 1e-9


# Counting

NUM_DRAWS = 100_000
FAIL_BELOW = 1e-3

COUNTED_TREES = {"one beam": 4, "four beams": 5, "best-first": 6}


def counted_tree(name: str, target: ToyModel) -> PrefixTree:
    """Return a tree whose paths the target may well write, so that walks get far."""
    if name == "best-first":
        return best_first_tree(target.vocab_size, 8)
    beams = likely_beams(target, *{"one beam": (1, 2), "four beams": (4, 3)}[name])
    return PrefixTree.from_beams([[0, *beam] for beam in beams])


SHAPINGS: dict[str, dict[str, float]] = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7": {"temperature": 0.7},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 1.0, "min_p": 0.2},
    "all filters": {"temperature": 1.3, "top_p": 0.9, "min_p": 0.1, "top_k": 3},
}


def p_value(tokens: np.ndarray, law: np.ndarray) -> float:
    """Return the probability that draws from a law lie so far from it or farther.

    Args:
        tokens: A joint draw per row.
        law: Their joint law, one axis per token.
    """
    codes = np.ravel_multi_index(tuple(tokens.T), law.shape)
    observed = np.bincount(codes, minlength=law.size).astype(float)
    expected = law.ravel() * len(tokens)
    if observed[expected == 0].any():
        return 0.0
    # Pearson's statistic needs cells that are not too small: those share one.
    large = expected >= 10
    observed = np.append(observed[large], observed[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    possible = expected > 0
    distance = (observed - expected)[possible] ** 2 / expected[possible]
    return float(chi2.sf(distance.sum(), possible.sum() - 1))


def draws_at_all_nodes(
    tree: PrefixTree, target: ToyModel, sampling: Sampling, key: mx.array
) -> np.ndarray:
    """Return independent draws at all the nodes of a tree, one set of draws per row."""
    logits = mx.array(np.array([target.logits(path) for path in node_paths(tree)], np.float32))
    # As in the decoding loop: nodes of the same depth share their noise.
    shape = (NUM_DRAWS, max(tree.depths.tolist()) + 1, target.vocab_size)
    noise = mx.take(mx.random.gumbel(shape, key=key), tree.depths, axis=1)
    return np.array(sample(logits, sampling, noise))


def three_tokens(
    tokens: np.ndarray, count: np.ndarray, target: ToyModel, sampling: Sampling, key: mx.array
) -> np.ndarray:
    """Return texts of three tokens; those that are shorter are continued by plain decoding."""
    text = np.full((len(tokens), 3), -1)
    text[:, : tokens.shape[1]] = tokens[:, :3]
    for place, key_here in enumerate(mx.random.split(key, 3)):
        short = np.flatnonzero(count <= place)
        if short.size:
            logits = mx.array(target.table(place)[tuple(text[short, :place].T)], mx.float32)
            noise = mx.random.gumbel(logits.shape, key=key_here)
            text[short, place] = np.array(sample(logits, sampling, noise))
    return text


def sample_and_follow(
    tree: PrefixTree, target: ToyModel, sampling: Sampling, key: mx.array
) -> np.ndarray:
    """Return texts of three tokens that begin with one cycle of the tree."""
    key, later = mx.random.split(key)
    drawn = draws_at_all_nodes(tree, target, sampling, key)
    tokens, count = emitted(follow(tree, mx.array(drawn)), drawn)
    assert (count > 1).mean() > 0.05, "the tree is hardly ever followed"
    return three_tokens(tokens, count, target, sampling, later)


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("name", COUNTED_TREES)
def test_draws_have_the_joint_law_of_plain_decoding(name: str, shaping: str):
    target = ToyModel(COUNTED_TREES[name], seed=5)
    sampling = Sampling(**SHAPINGS[shaping])
    text = sample_and_follow(counted_tree(name, target), target, sampling, mx.random.key(11))
    for num_tokens in (2, 3):
        law = joint_law(target, num_tokens, **SHAPINGS[shaping])
        assert p_value(text[:, :num_tokens], law) > FAIL_BELOW


# Controls: rules that are wrong, and that the same count has to find out

TARGET, DRAFTER = ToyModel(5, seed=5), ToyModel(5, seed=6)
PLAIN = Sampling(temperature=1.0)


def draw_rows(probs: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return one token per row of probabilities."""
    below = probs.cumsum(axis=-1) <= random.random(len(probs))[:, None] * probs.sum(-1)[:, None]
    return below.sum(axis=-1)


def ratio_rule(drafts: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return what chains emit if x is accepted with min(1, p/q), else drawn from [p - q]+.

    Args:
        drafts: One chain per row.
        random: Of the coins and the draws.

    Returns:
        The tokens, and how many of every row count.
    """
    tokens = np.full((len(drafts), drafts.shape[1] + 1), -1)
    alive = np.ones(len(drafts), bool)
    count = np.ones(len(drafts), int)
    for place in range(tokens.shape[1]):
        prefix = (*drafts[:, :place].T,)
        p, q = (
            np.broadcast_to(softmax(model.table(place))[prefix], (len(drafts), 5))
            for model in (TARGET, DRAFTER)
        )
        if place == drafts.shape[1]:
            tokens[alive, place] = draw_rows(p[alive], random)
            break
        draft = drafts[:, place, None]
        ratio = np.take_along_axis(p, draft, 1) / np.take_along_axis(q, draft, 1)
        entered = random.random(len(drafts)) < ratio[:, 0]
        refused = alive & ~entered
        alive &= entered
        tokens[alive, place] = draft[alive, 0]
        tokens[refused, place] = draw_rows(np.maximum(p - q, 0)[refused], random)
        count += alive
    return tokens, count


def sampled_chains(random: np.random.Generator) -> np.ndarray:
    """Return chains of two tokens, drawn from the drafter."""
    first = draw_rows(np.broadcast_to(DRAFTER.probs(()), (NUM_DRAWS, 5)), random)
    return np.stack([first, draw_rows(softmax(DRAFTER.table(1))[first], random)], axis=1)


def always_accept() -> np.ndarray:
    """Walk down the first beam, whatever was drawn."""
    tree = PrefixTree.from_beams([[0, *likely_beams(DRAFTER, 1, 2)[0]]])
    drawn = draws_at_all_nodes(tree, TARGET, PLAIN, mx.random.key(1))
    drawn = np.concatenate([np.tile(np.array(tree.tokens[1:]), (NUM_DRAWS, 1)), drawn[:, -1:]], 1)
    return three_tokens(drawn, np.full(NUM_DRAWS, 3), TARGET, PLAIN, mx.random.key(2))


def temperature_off() -> np.ndarray:
    """Draw at 0.8 of the temperature."""
    tree = PrefixTree.from_beams([[0, *beam] for beam in likely_beams(DRAFTER, 3, 2)])
    return sample_and_follow(tree, TARGET, Sampling(temperature=0.8), mx.random.key(3))


def ratio_of_beam_tokens() -> np.ndarray:
    """Apply the rule for sampled tokens to the drafter's best ones."""
    tokens, count = ratio_rule(
        np.tile(likely_beams(DRAFTER, 1, 2)[0], (NUM_DRAWS, 1)), np.random.default_rng(4)
    )
    return three_tokens(tokens, count, TARGET, PLAIN, mx.random.key(4))


def longest_beam() -> np.ndarray:
    """Verify every beam by itself with that rule, and keep the one that gets farthest."""
    random = np.random.default_rng(5)
    results = [
        ratio_rule(np.tile(beam, (NUM_DRAWS, 1)), random) for beam in likely_beams(DRAFTER, 3, 2)
    ]
    counts = np.stack([count for _, count in results])
    longest = counts.argmax(axis=0), np.arange(NUM_DRAWS)
    tokens = np.stack([tokens for tokens, _ in results])[longest]
    return three_tokens(tokens, counts[longest], TARGET, PLAIN, mx.random.key(5))


@pytest.mark.parametrize(
    "control", [always_accept, temperature_off, ratio_of_beam_tokens, longest_beam]
)
def test_the_count_finds_out_a_wrong_rule(control: Callable[[], np.ndarray]):
    text = control()
    for num_tokens in (2, 3):
        assert p_value(text[:, :num_tokens], joint_law(TARGET, num_tokens)) < FAIL_BELOW


def test_the_ratio_rule_of_the_controls_is_right_where_it_belongs():
    random = np.random.default_rng(6)
    tokens, count = ratio_rule(sampled_chains(random), random)
    text = three_tokens(tokens, count, TARGET, PLAIN, mx.random.key(6))
    for num_tokens in (2, 3):
        assert p_value(text[:, :num_tokens], joint_law(TARGET, num_tokens)) > FAIL_BELOW


def test_the_count_finds_out_a_small_bias():
    # One text in a hundred takes the drafter's best token for its first, whatever was drawn.
    beams = likely_beams(DRAFTER, 3, 2)
    tree = PrefixTree.from_beams([[0, *beam] for beam in beams])
    text = sample_and_follow(tree, TARGET, PLAIN, mx.random.key(7))
    text[::100, 0] = beams[0][0]
    assert p_value(text[:, :2], joint_law(TARGET, 2)) < FAIL_BELOW
