"""Samples of the arms as figures: medians, quartiles, ratios prompt by prompt."""

import statistics
from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np

from mlx_distill.benchmarking.arms import OURS, PLAIN, Sample
from mlx_distill.errors import InputError

NOTHING_TIMED = "every answer ended with its first token, so there is no speed to measure"


def timed(samples: dict[str, list[Sample]]) -> list[bool]:
    """Return which prompts can be timed: no arm's answer ended with its first token."""
    return [all(len(s.tokens) > 1 for s in row) for row in zip(*samples.values(), strict=True)]


def summary(samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    """Return a row per arm: medians, quartiles, and the speed-up prompt by prompt.

    Raises:
        InputError: If no prompt can be timed.
    """
    rows, whole_rows = [], timed(samples)
    if not any(whole_rows):
        raise InputError(NOTHING_TIMED)
    for name, whole in samples.items():
        mine, plain = (list(compress(part, whole_rows)) for part in (whole, samples[PLAIN]))
        pairs = zip(mine, plain, strict=True)
        ratios = [sample.tokens_per_s / other.tokens_per_s for sample, other in pairs]
        rows.append(
            {
                "arm": name,
                "prompts": len(mine),
                "tokens_per_s": spread([sample.tokens_per_s for sample in mine]),
                "speedup": spread(ratios),
                "tokens_per_call": statistics.mean(s.tokens_per_call for s in mine),
                "nodes_per_call": _nodes_per_call(mine),
                "first_token_s": spread([sample.first_token_s for sample in mine]),
                "peak_memory_bytes": max(sample.peak_memory_bytes for sample in mine),
            }
        )
    return rows


def _nodes_per_call(samples: Sequence[Sample]) -> float:
    """Return how many tokens a call of the target verified; 1 where nothing was drafted."""
    return statistics.mean(max(1.0, s.verified_tokens / s.target_calls) for s in samples)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of some values."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "quartile_1": low, "quartile_3": high}


def mean_by_depth(samples: Sequence[Sample]) -> list[float]:
    """Return the acceptance by depth, averaged over the samples."""
    depth = max(len(sample.acceptance_by_depth) for sample in samples)
    padded = [[*s.acceptance_by_depth, *[0.0] * depth][:depth] for s in samples]
    return [statistics.mean(column) for column in zip(*padded, strict=True)]


def by_class(samples: dict[str, list[Sample]], kinds: Sequence[str | None]) -> list[dict[str, Any]]:
    """Return a row per class of prompts: speed-up, tokens per call, acceptance by depth.

    Args:
        samples: Of every arm, prompt by prompt.
        kinds: The classes of the prompts; there are no rows if none has any.
    """
    names = [kind for kind in dict.fromkeys(kinds) if kind is not None]
    rows = []
    for name in names:
        chosen = [kind == name for kind in kinds]
        mine = {arm: list(compress(of, chosen)) for arm, of in samples.items()}
        ours = mine[OURS]
        ratios = [
            sample.tokens_per_s / plain.tokens_per_s
            for sample, plain in zip(ours, mine[PLAIN], strict=True)
            if len(sample.tokens) > 1 and len(plain.tokens) > 1
        ]
        rows.append(
            {
                "class": name,
                "prompts": len(ours),
                "speedup": spread(ratios) if ratios else None,
                "tokens_per_call": statistics.mean(s.tokens_per_call for s in ours),
                "acceptance_by_depth": mean_by_depth(ours),
            }
        )
    return rows


def equal_texts(samples: dict[str, list[Sample]]) -> int:
    """Return on how many prompts drafting wrote exactly mlx-lm's tokens."""
    pairs = zip(samples[PLAIN], samples[OURS], strict=True)
    return sum(plain.tokens == ours.tokens for plain, ours in pairs)
