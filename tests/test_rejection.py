"""Rejection, token by token and by block, is exact: the twins, and the device's own blocks."""

from collections.abc import Callable
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles.rejection import Verdict, block, law_of_lengths, rejection, residual
from oracles.sampling import sampling_law
from scipy.stats import chi2

from mlx_distill.core.block_verification import acceptance, probabilities, verdict
from mlx_distill.core.sampling import TextNoise

Scheme = Callable[[np.ndarray, np.ndarray, np.ndarray], Verdict]
V, L = 4, 2


def on_device(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> Verdict:
    """Return the verdicts of what texts are written with, in float32, as laws."""
    lengths, laws = [], []
    for of_p, of_q, chain in zip(p, q, tokens, strict=True):
        accepts, rests = acceptance(mx.array(of_p), mx.array(of_q), mx.array(chain))
        lengths.append(law_of_lengths(np.array(accepts, np.float64)))
        rests = np.array(rests, np.float64)
        laws.append(np.concatenate([residual(rests, 0, of_p[:-1]), of_p[-1:]]))
    return np.stack(lengths), np.stack(laws)


SCHEMES = [rejection, block, on_device]
# Of float32: the largest error of a law's value.
ROUNDING = {on_device: 1e-6}


def table(seed: int, kind: str = "random", **law: Any) -> np.ndarray:
    """Return a law for every prefix of up to ``L`` tokens, the shorter ones padded with zeros."""
    random = np.random.default_rng(seed)
    logits = 1.5 * random.normal(size=(V,) * L + (L + 1, V))
    for depth in range(L):  # a law depends on the tokens before it alone
        first = (slice(None),) * depth + (0,) * (L - depth)
        logits[..., depth, :] = logits[(*first, depth)].reshape(
            (V,) * depth + (1,) * (L - depth) + (V,)
        )
    if kind == "sparse":
        logits[..., :2] -= 1000 * (seed % 2)
        logits[..., 2:] -= 1000 * (1 - seed % 2)
    if kind == "one-hot":
        logits = 1000 * logits
    return sampling_law(logits, **law)


LAWS = {
    "random": (table(1), table(6)),
    "equal": (table(1), table(1)),
    "equal at the root": (
        table(1),
        np.concatenate([table(1)[..., :1, :], table(6)[..., 1:, :]], -2),
    ),
    "disjoint": (table(1, "sparse"), table(6, "sparse")),
    "certain": (table(1, "one-hot"), table(6)),
    "certain drafter": (table(1), table(6, "one-hot")),
    "top-p": (table(1, top_p=0.8), table(6, top_p=0.8)),
    "top-p of the target alone": (table(1, top_p=0.6), table(6)),
    "top-k and cold": (table(1, top_k=2, temperature=0.5), table(6, top_k=2, temperature=0.5)),
}


def joint(p: np.ndarray) -> np.ndarray:
    """Return the joint law of the first ``L + 1`` tokens of plain decoding."""
    law = np.ones(())
    for depth in range(L + 1):
        law = law[..., None] * p[(slice(None),) * depth + (0,) * (L - depth) + (depth,)]
    return law


def emitted(p: np.ndarray, q: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, float]:
    """Return that law of what a scheme writes, and how many drafted tokens it accepts on average.

    Every chain, every number of accepted tokens and every token behind them is counted; what is
    still missing of the ``L + 1`` tokens comes from the target.
    """
    chains = np.array(list(product(range(V), repeat=L)))
    where = tuple(chains.T)
    drafted = np.prod(
        [q[where][:, d][np.arange(len(chains)), chains[:, d]] for d in range(L)], axis=0
    )
    chains, drafted = chains[drafted > 0], drafted[drafted > 0]
    where = tuple(chains.T)
    lengths, laws = scheme(p[where], q[where][:, :L], chains)
    assert (lengths >= 0).all()
    np.testing.assert_allclose(lengths.sum(axis=-1), 1)
    law, plain = np.zeros((V,) * (L + 1)), joint(p)
    for chain, share, of_lengths, nexts in zip(chains, drafted, lengths, laws, strict=True):
        for length in range(L + 1):
            for token in range(V):
                path = (*chain[:length], token)
                mass = share * of_lengths[length] * nexts[length, token]
                rest = plain[path] / max(plain[path].sum(), 1e-300)
                law[path] += mass * rest
                assert mass == 0 or plain[path].sum() > 0
    return law, float(drafted @ lengths @ np.arange(L + 1))


@pytest.mark.parametrize("name", LAWS)
def test_all_draws_add_up_to_the_targets_law(name: str) -> None:
    """Equal laws, no residual, disjoint supports, filtered ones; a block accepts no fewer."""
    p, q = LAWS[name]
    accepted = []
    for scheme in SCHEMES:
        law, length = emitted(p, q, scheme)
        np.testing.assert_allclose(law, joint(p), atol=ROUNDING.get(scheme, 1e-9))
        accepted.append(length)
    assert accepted[0] <= accepted[1] + 1e-12
    np.testing.assert_allclose(accepted[2], accepted[1], atol=1e-6)
    expected = {"equal": L, "disjoint": 0}
    if name in expected:
        np.testing.assert_allclose(accepted, expected[name], atol=1e-6)


def test_a_block_accepts_more_where_tokens_make_up_for_each_other() -> None:
    p, q = LAWS["random"]
    (_, one), (_, other) = (emitted(p, q, scheme) for scheme in SCHEMES[:2])
    assert other > one + 0.01


@pytest.mark.parametrize("name", LAWS)
def test_coins_decide_as_the_law_says(name: str) -> None:
    """The longest beginning whose coin is below its chance; then the law behind it."""
    p, q = LAWS[name]
    random = np.random.default_rng(0)
    seen = set()
    for chain in product(range(V), repeat=L):
        of_p, of_q = p[chain], q[chain][:L]
        if of_q[np.arange(L), chain].min() == 0:
            continue
        arrays = mx.array(of_p), mx.array(of_q), mx.array(chain)
        chances = np.array(acceptance(*arrays)[0])
        _, laws = block(of_p[None], of_q[None], np.array([chain]))
        for coins in random.random((4, L)).astype(np.float32):
            expected = max([0, *(1 + np.flatnonzero(coins < chances))])
            length, law = verdict(*arrays, mx.array(coins))
            assert length.item() == expected
            found = np.array(law, np.float64)
            if found.sum() > 1e-6:  # else its draw is one in a million
                np.testing.assert_allclose(found / found.sum(), laws[0, expected], atol=1e-5)
            seen.add(expected)
    assert seen == {"equal": {L}, "disjoint": {0}}.get(name, seen)


def test_probabilities_are_the_softmax_whatever_is_barred() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32) * 20
    logits[1, 3:] = -np.inf
    found = np.array(probabilities(mx.array(logits)), np.float64)
    np.testing.assert_allclose(found, sampling_law(logits), atol=1e-6)
    assert (found[1, 3:] == 0).all()


def always(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> Verdict:
    lengths = np.zeros((len(tokens), L + 1))
    lengths[:, L] = 1
    return lengths, p


def without_residual(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> Verdict:
    return rejection(p, q, tokens)[0], p


def rejections_residual(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> Verdict:
    return block(p, q, tokens)[0], rejection(p, q, tokens)[1]


def next_nodes_residual(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> Verdict:
    lengths, laws = rejection(p, q, tokens)
    return lengths, np.roll(laws, -1, axis=-2)


def hotter_draft(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> Verdict:
    hot = q**0.8
    return rejection(p, hot / hot.sum(axis=-1, keepdims=True), tokens)


CONTROLS = [always, without_residual, rejections_residual, next_nodes_residual, hotter_draft]


@pytest.mark.parametrize("scheme", CONTROLS)
def test_what_is_wrong_does_not_add_up(scheme: Scheme) -> None:
    p, q = LAWS["random"]
    assert np.abs(emitted(p, q, scheme)[0] - joint(p)).sum() > 0.01


def drawn(p: np.ndarray, q: np.ndarray, scheme: Scheme, count: int) -> np.ndarray:
    """Return the first two tokens of many texts, as drafts, verdicts and draws make them."""
    random = np.random.default_rng(3)
    where: list[np.ndarray] = []
    for depth in range(L):
        laws = q[(*where, *[np.zeros(count, int)] * (L - depth))][:, depth]
        where.append(pick(laws, random))
    codes, which = np.unique(where[0] * V + where[1], return_inverse=True)  # few are different
    chains = codes // V, codes % V
    lengths, laws = scheme(p[chains], q[chains][:, :L], np.stack(chains, axis=-1))
    accepted = pick(lengths[which], random)
    token = pick(laws[which, accepted], random)
    first = np.where(accepted > 0, where[0], token)
    behind = pick(p[first, 0][:, 1], random)  # of those that wrote one token alone
    second = np.where(accepted > 1, where[1], np.where(accepted == 1, token, behind))
    return first * V + second


def pick(laws: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a draw from every row."""
    ends = np.cumsum(laws, axis=-1)
    return (random.random((len(laws), 1)) * ends[:, -1:] >= ends).sum(axis=-1)


@pytest.mark.parametrize("name", ["random", "top-p", "disjoint"])
@pytest.mark.parametrize("scheme", [rejection, block, without_residual])
def test_draws_have_the_law(scheme: Scheme, name: str) -> None:
    p, q = LAWS[name]
    count = 400_000
    expected = count * joint(p).sum(axis=-1).reshape(-1)
    counts = np.bincount(drawn(p, q, scheme, count), minlength=V * V)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    statistic = ((counts - expected)[some] ** 2 / expected[some]).sum()
    wrong = scheme not in SCHEMES and name != "disjoint"  # where all is rejected, all is residual
    assert (chi2.sf(statistic, some.sum() - 1) < 1e-3) == wrong


def test_coupled_draws_agree_at_most_as_often() -> None:
    """No coupling agrees more often than one minus the distance; rejection does exactly that.

    What is drawn with the same noise reaches it nearly, and needs to know nothing of q.
    """
    p, q = (sampling_law(x) for x in 1.5 * np.random.default_rng(5).normal(size=(2, 12)))
    noise = np.array(TextNoise(mx.random.key(2), 12).rows(0, 60_000))
    draws = [(np.log(law) + noise).argmax(axis=-1) for law in (p, q)]
    agreed = (draws[0] == draws[1]).mean()
    most = np.minimum(p, q).sum()
    chains = np.arange(12)[:, None]
    twice, drafter = (np.tile(x, (12, rows, 1)) for x, rows in ((p, 2), (q, 1)))
    np.testing.assert_allclose(q @ rejection(twice, drafter, chains)[0][:, 1], most)
    assert most / (2 - most) < agreed < most
