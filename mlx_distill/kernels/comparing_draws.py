"""What the sampler is tried on, and when its draws are right.

Draws are integers, so they have to be equal. Float32 leaves two doubts: whether a token is within
a filter, where the twin's running sums may be off by more than the kernel's, and which of two
scores is the best, of which the rounded difference is none. There, double precision decides.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.core.filters import ROUNDING
from mlx_distill.core.sampling import Sampling, normalised, sample
from mlx_distill.kernels.choice import Case
from mlx_distill.kernels.comparing import TOLERANCES, largest_difference
from mlx_distill.kernels.noise import Keyed

SIZES = (1, 2, 31, 97, 1000, 5003, 32_000)
LARGE = (128_256, 151_936, 262_144)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
NEAR = 1e-5  # of scores, relative


def cases(seed: int) -> Iterator[Case]:
    """Return logits and laws, of all sizes and kinds, by noise that lies there or is made."""
    random = np.random.default_rng(seed)
    while True:
        large = random.random() < 0.02
        size = int(random.choice(LARGE if large else SIZES))
        rows = int(random.choice([1, 2] if large or size > 2000 else [1, 2, 5, 8, 16, 64]))
        kind = str(random.choice(KINDS))
        dtype = DTYPES[random.integers(3)]
        logits = _laid(random, _logits(random, kind, rows, size), dtype)
        sampling = _sampling(random, size)
        args: list[Any] = [logits, sampling]
        places = mx.array(random.integers(0, 4, rows).astype(np.int32))
        if sampling.temperature:
            key = mx.random.key(int(random.integers(2**31)))
            made = Keyed(key, int(random.integers(1000)))
            args.append(made if random.random() < 0.5 else mx.random.gumbel((4, size), key=key))
            args.append(places)
        name = f"{kind}, {rows} rows of {size} in {dtype}, {sampling}"
        yield Case(name, tuple(args), {})


def draws_differ(case: Case, found: Any, expected: Any) -> str:
    """Return in what draws are wrong, or "" if they are right."""
    if largest_difference(found.greatest, expected.greatest):
        return f"greatest is wrong at {case.name}"
    failed = mx.isnan(expected.greatest)
    exact = sample(case.args[0], case.args[1], _noise(case))
    same = found.tokens == exact
    certain = mx.full(same.shape, True) if found.certain is None else found.certain
    doubtful = ~failed & ~(certain & same)
    for row in np.flatnonzero(np.array(doubtful)):
        wrong = _wrong(case, int(row), int(found.tokens[row].item()), bool(certain[row].item()))
        if wrong:
            return f"{wrong} in row {row} at {case.name}"
    if largest_difference(found.log_sum_exps, expected.log_sum_exps) > TOLERANCES[mx.float32]:
        return f"log_sum_exps are off at {case.name}"
    for row in np.flatnonzero(np.array(certain & (found.tokens == expected.tokens) & ~failed)):
        wrong = _log_prob_wrong(case, int(row), found, expected)
        if wrong:
            return f"{wrong} in row {row} at {case.name}"
    return ""


def _noise(case: Case) -> mx.array | None:
    """Return the noise of every row; a caller may leave out what it does not need."""
    logits, _, noise, places, *_ = (*case.args, None, None)
    if noise is None:
        return None
    if isinstance(noise, mx.array):
        return noise if places is None else noise[places]
    where = mx.arange(logits.shape[0]) if places is None else places
    return noise.rows(where, logits.shape[-1])


def _log_prob_wrong(case: Case, row: int, found: Any, expected: Any) -> str:
    """Return by how much a log-probability is off: of the twin's and, if so, in double precision.

    On a CPU the twin's sum of some thousand numbers is off by more than the kernel's.
    """
    most = TOLERANCES[case.args[0].dtype]
    log_prob = found.log_probs[row]
    if largest_difference(log_prob, expected.log_probs[row]) <= most:
        return ""
    values, sampling = _values(case, row), case.args[1]
    kept, _ = _kept(values, sampling) if sampling.temperature else (values == values, False)
    scaled = np.where(kept, values - values.max(), -np.inf) / (sampling.temperature or 1)
    exact = scaled[int(found.tokens[row].item())] - np.log(np.exp(scaled).sum())
    off = largest_difference(log_prob, mx.array(exact, mx.float32))
    return f"log_probs are off by {off:.3g}" if off > most else ""


def _values(case: Case, row: int) -> np.ndarray:
    """Return what a row is drawn from, before the law changes it, in double precision."""
    values = normalised(case.args[0][row : row + 1]).astype(mx.float32)
    return np.array(values)[0].astype(np.float64)


def _wrong(case: Case, row: int, token: int, certain: bool) -> str:
    """Return what is wrong with a draw that is not the twin's, or that is called uncertain."""
    sampling: Sampling = case.args[1]
    values = _values(case, row)
    if values.max() == -np.inf:
        return "" if token == 0 else "a barred token is drawn"
    kept, doubt = _kept(values, sampling)
    if not certain:
        return "" if doubt else "a draw is called uncertain, and is not"
    noise = _noise(case)
    added = 0 if noise is None else np.array(noise[row]).astype(np.float64)
    scores = np.where(kept, values / (sampling.temperature or 1) + added, -np.inf)
    best = scores.max()
    right = scores[token] >= best - NEAR * max(1, abs(best))
    return "" if right else f"{token} is drawn, not {scores.argmax()}"


def _kept(values: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, bool]:
    """Return which tokens the filters keep in double precision, and whether that is doubtful."""
    probs = np.exp(values - values.max())
    order = np.argsort(-values, kind="stable")
    sums = np.concatenate([[0], np.cumsum(probs[order])])
    ascending = np.sort(-values)
    above = sums[np.searchsorted(ascending, -values, side="left")] / sums[-1]
    kept, doubt = np.ones(values.shape, bool), False
    if sampling.top_p < 1:
        kept &= (above < sampling.top_p) | (values == values.max())
        doubt |= bool((np.abs(above - sampling.top_p) < 4 * ROUNDING).any())
    if sampling.min_p > 0:
        bound = values.max() + np.log(sampling.min_p)
        kept &= values >= bound
        within = np.abs(values - bound) < 2 * ROUNDING * np.maximum(1, np.abs(values))
        doubt |= bool((within & (values < values.max())).any())
    if 0 < sampling.top_k < values.size:
        kept &= values >= -ascending[sampling.top_k - 1]
        doubt |= int((kept & (values > -np.inf)).sum()) > sampling.top_k
    return kept, doubt


# --------------------------------------------------------------------------------------- logits

KINDS = ("normal", "peaked", "flat", "ties", "barred", "all barred but one", "one-hot", "nan")


def _logits(random: np.random.Generator, kind: str, rows: int, size: int) -> np.ndarray:
    logits = random.normal(size=(rows, size)).astype(np.float32) * 3
    if kind == "peaked":
        logits *= 4
    elif kind == "flat":
        logits[:] = random.choice([0.0, -0.0, 7.25, -100.0])
    elif kind == "ties":
        logits = np.round(logits)
    elif kind == "barred":
        logits[random.random(logits.shape) < 0.5] = -np.inf
    elif kind in ("all barred but one", "one-hot"):
        logits[:] = -np.inf if kind != "one-hot" else 0
        logits[np.arange(rows), random.integers(0, size, rows)] = 30
    elif kind == "nan":
        failing = random.random(rows) < 0.5
        logits[failing, random.integers(0, size)] = np.nan
    return logits


def _laid(random: np.random.Generator, logits: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Return logits as they may lie in memory: together, or as a part of wider rows."""
    array = mx.array(logits).astype(dtype)
    if random.random() < 0.5:
        return array
    wider = mx.concatenate([array, mx.full((len(logits), 3), 99).astype(dtype)], axis=1)
    mx.eval(wider)
    part = wider[:, : logits.shape[1]]
    mx.eval(part)
    return part


def _sampling(random: np.random.Generator, size: int) -> Sampling:
    if random.random() < 0.25:
        return Sampling()
    temperature = float(random.choice([0.3, 0.7, 1.0, 1.5]))
    if random.random() < 0.3:
        return Sampling(temperature)
    return Sampling(
        temperature,
        top_p=float(random.choice([1.0, 1e-9, 0.3, 0.8, 0.95])),
        top_k=int(random.choice([0, 1, min(40, size), size])),
        min_p=float(random.choice([0.0, 0.0, 0.05, 1.0])),
    )
