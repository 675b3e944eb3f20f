"""Rejection of a chain that was drawn from a drafter's law: token by token, and as a block.

Both are written as laws: how likely it is that so many of the drafted tokens are accepted, and what
the token behind them is drawn from then. A draw is then two draws, and a proof is a sum.

p is the target's law at the root and behind each drafted token, q the drafter's at all but the last
of these. Leading axes are independent chains.
"""

import numpy as np

Verdict = tuple[np.ndarray, np.ndarray]  # (..., L + 1) and (..., L + 1, V)


def rejection(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> Verdict:
    """Return how many of the tokens are accepted, and the laws of the token behind them.

    Args:
        p: (..., L + 1, V).
        q: (..., L, V).
        tokens: (..., L), drawn from q.

    Source:
        Leviathan et al. 2023, arXiv:2211.17192, algorithm 1.
    """
    likely = np.minimum(1, ratios(p, q, tokens))
    ends = np.ones((*tokens.shape[:-1], 1))
    reached = np.concatenate([ends, np.cumprod(likely, axis=-1)], axis=-1)
    lengths = reached * np.concatenate([1 - likely, ends], axis=-1)
    return lengths, np.concatenate(
        [residual(p[..., :-1, :], q, p[..., :-1, :]), p[..., -1:, :]], -2
    )


def block(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> Verdict:
    """Return the same for a chain that is judged as a whole: never fewer tokens are accepted.

    Args:
        p: (..., L + 1, V).
        q: (..., L, V).
        tokens: (..., L), drawn from q.

    Source:
        Sun et al. 2024, arXiv:2403.10444, algorithm 2.
    """
    weights = [np.ones(tokens.shape[:-1])]
    for ratio in np.moveaxis(ratios(p, q, tokens), -1, 0):
        weights.append(np.minimum(1, weights[-1] * ratio))
    w = np.stack(weights, axis=-1)
    shares = w[..., :-1, None] * p[..., :-1, :]
    rest = np.maximum(shares - q, 0).sum(axis=-1)
    # 1 - w first: a sum with it may round to less than the rest. Where nothing is left of a token
    # that is certain, p is q there, and whatever comes later is accepted in its place.
    whole = rest + (1 - w[..., :-1])
    accepts = np.where(whole > 0, rest / np.where(whole > 0, whole, 1), 1)
    accepts = np.concatenate([accepts, w[..., -1:]], axis=-1)
    laws = np.concatenate([residual(shares, q, p[..., :-1, :]), p[..., -1:, :]], axis=-2)
    return law_of_lengths(accepts[..., 1:]), laws


def law_of_lengths(accepts: np.ndarray) -> np.ndarray:
    """Return how likely each number of accepted tokens is: the last whose coin says so, or none.

    Args:
        accepts: (..., L): how likely the coin of each token is to.
    """
    ends = np.ones((*accepts.shape[:-1], 1))
    later = np.cumprod((1 - accepts)[..., ::-1], axis=-1)[..., ::-1]
    return np.concatenate([ends, accepts], -1) * np.concatenate([later, ends], -1)


def ratios(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return p / q of the drafted tokens; q is above 0 there, or they were not drawn from it."""
    at = tokens[..., None]
    p, q = (np.take_along_axis(x, at, axis=-1)[..., 0] for x in (p[..., :-1, :], q))
    return p / q


def residual(p: np.ndarray, q: np.ndarray | float, otherwise: np.ndarray) -> np.ndarray:
    """Return what p has more than q, normalised; where that is nothing, it is never drawn from."""
    rest = np.maximum(p - q, 0)
    total = rest.sum(axis=-1, keepdims=True)
    return np.where(total > 0, rest / np.where(total > 0, total, 1), otherwise)
