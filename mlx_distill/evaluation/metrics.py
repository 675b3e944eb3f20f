"""Figures of language models: logits to scores per token, to sums per text, to intervals.

Arrays only; no model, no file. Everything is kept as sums over a text's tokens, so that
texts can be drawn anew without computing anything again::

    logits (T, V) -> token_scores (T,) -> text_sums -> resampled (R, ...) -> figures (R,)
"""

from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.arrays import log_probs

NUM_BINS = 15
Sums = dict[str, Any]  # NumPy arrays, or its numbers where no axis is left


def token_scores(
    logits: Float[mx.array, "T V"],
    labels: Int[mx.array, " T"],
    teacher_logits: Float[mx.array, "T U"] | None = None,
) -> dict[str, mx.array]:
    """Return what is known of every token's prediction, in float32; no token is left out.

    Args:
        logits: Before the token; not normalised.
        labels: The token. What marks a place without one, as -100 does, must be masked afterwards.
        teacher_logits: Of another model at the same places. If its vocabulary has another width,
            both are cut to the narrower one before they are compared.

    Returns:
        ``nats``, the token's negative log-probability; ``confidence``, the best token's
        probability; ``right``, whether the best one is the token. With a teacher also ``kl``,
        KL(teacher || model) in nats, and ``agree``, whether both have the same best token.
    """
    log_probs_TV = log_probs(logits)
    best = mx.argmax(log_probs_TV, axis=-1)
    known = mx.maximum(labels, 0)[:, None]  # a negative index would count from the end
    scores = {
        "nats": -mx.take_along_axis(log_probs_TV, known, axis=-1)[:, 0],
        "confidence": mx.exp(log_probs_TV.max(axis=-1)),
        "right": best == labels,
    }
    if teacher_logits is not None:
        width = min(logits.shape[-1], teacher_logits.shape[-1])
        if width < logits.shape[-1]:
            log_probs_TV = log_probs(logits[..., :width])
            best = mx.argmax(log_probs_TV, axis=-1)
        teacher_TV = log_probs(teacher_logits[..., :width])
        probs = mx.exp(teacher_TV)
        # Not the losses' form, cross entropy less entropy: that leaves 1e-6 of rounding where the
        # two are equal. Where the teacher has no mass the student does not matter.
        scores["kl"] = mx.where(probs > 0, probs * (teacher_TV - log_probs_TV), 0).sum(axis=-1)
        scores["agree"] = mx.argmax(teacher_TV, axis=-1) == best
    return scores


def text_sums(scores: Sums) -> Sums:
    """Return the sums of a text's scores over its tokens, in float64.

    Confidences and right predictions are summed by confidence, in bins of equal width.
    """
    scores = {name: values.astype(np.float64) for name, values in scores.items()}
    confidence, right = scores.pop("confidence"), scores.pop("right")
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    return {
        "tokens": float(len(confidence)),
        "bin_confidence": np.bincount(bins, confidence, NUM_BINS),
        "bin_right": np.bincount(bins, right, NUM_BINS),
        **{name: values.sum() for name, values in scores.items()},
    }


def report(
    sums: dict[str, Sums], teacher: str | None = None, num_samples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return every model's figures with intervals, from their sums per text.

    Each is ``{"value", "interval"}``; see ``figures``. With a teacher and at least two other models
    these have ``gap_closed``: which share of the gap in nats per token between the first of them
    and the teacher they close, None where there is no such gap.

    Args:
        sums: By model, as ``evaluation.texts.evaluate`` returns them.
        teacher: The one that ``evaluate`` was told.
        num_samples: How often the texts are drawn anew. One text has no intervals.
        seed: Of the draws; they are the same for all models.
    """
    whole = {
        name: figures({key: values.sum(axis=0) for key, values in one.items()})
        for name, one in sums.items()
    }
    drawn = {name: figures(_resampled(one, num_samples, seed)) for name, one in sums.items()}
    students = [name for name in sums if name != teacher]
    if teacher is not None and len(students) > 1:
        for some in (whole, drawn):
            nats = {name: some[name]["nats_per_token"] for name in sums}
            for name in students:
                some[name]["gap_closed"] = share_closed(
                    nats[students[0]], nats[name], nats[teacher]
                )
    return {
        name: {
            "texts": len(one["tokens"]),
            "tokens": int(one["tokens"].sum()),
            **{key: with_interval(value, drawn[name][key]) for key, value in whole[name].items()},
        }
        for name, one in sums.items()
    }


def figures(sums: Sums) -> Sums:
    """Return the figures of some sums over texts; leading axes are kept.

    The calibration error is the mean distance of confidence and share of right predictions, over
    bins weighted by their tokens. An absolute value does not average out: of few tokens it comes
    out too high, and of texts drawn anew higher still.

    Source:
        Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    tokens = sums["tokens"]
    nats = sums["nats"] / tokens
    distance = np.abs(sums["bin_confidence"] - sums["bin_right"]).sum(axis=-1)
    with np.errstate(over="ignore"):  # an infinite perplexity is one
        found = {"perplexity": np.exp(nats), "nats_per_token": nats}
    found["calibration_error"] = distance / tokens
    if "kl" in sums:
        found |= {"kl": sums["kl"] / tokens, "agreement": sums["agree"] / tokens}
    return found


def resampled(sums: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Return sums over texts drawn with replacement, one row per sample.

    The same number of texts and the same seed draw the same texts, so that figures of several
    models are paired. A single text has no samples: it could not be drawn otherwise.

    Args:
        sums: One row per text.
        num_samples: How often to draw as many texts as there are.
        seed: Of the draws.
    """
    random = np.random.default_rng(seed)
    num_texts = len(sums)
    flat = sums.reshape(num_texts, -1)
    drawn = np.empty((num_samples if num_texts > 1 else 0, flat.shape[1]))
    for row in range(len(drawn)):
        counts = np.bincount(random.integers(num_texts, size=num_texts), minlength=num_texts)
        drawn[row] = counts.astype(np.float64) @ flat
    return drawn.reshape(-1, *sums.shape[1:])


def _resampled(sums: Sums, num_samples: int, seed: int) -> Sums:
    """Return ``resampled`` sums by name; texts are drawn once for all of them."""
    flat = {name: values.reshape(len(values), -1) for name, values in sums.items()}
    places = np.cumsum([values.shape[1] for values in flat.values()])[:-1]
    drawn = resampled(np.concatenate(list(flat.values()), axis=1), num_samples, seed)
    parts = np.split(drawn, places, axis=1)
    return {
        name: part.reshape(-1, *values.shape[1:])
        for (name, values), part in zip(sums.items(), parts, strict=True)
    }


def with_interval(value: Any, samples: np.ndarray) -> dict[str, Any]:
    """Return a figure and its 95 % interval, the percentiles of its bootstrap samples.

    Without samples, or with one that is not a number, the interval is None.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    known = samples.size > 0 and bool(np.isfinite(samples).all())
    interval = np.percentile(samples, [2.5, 97.5]).tolist() if known else None
    return {"value": float(value), "interval": interval}


def share_closed(first: Any, this: Any, teacher: Any) -> Any:
    """Return which share of the gap between a first student and the teacher another one closes.

    NaN where the first student is no worse than the teacher: there is no gap.
    """
    gap = first - teacher
    return (first - this) / np.where(gap > 0, gap, np.nan)
