"""What others measured and published of drafting on Apple's chips."""

import csv
from importlib.resources import files

PUBLISHED = files("mlx_distill") / "benchmarking" / "published.csv"


def published() -> list[tuple[str, ...]]:
    """Return the fastest row of each published sweep on Apple's chips."""
    best: dict[tuple[str, ...], dict[str, str]] = {}
    for row in csv.DictReader(PUBLISHED.read_text(encoding="utf-8").splitlines()):
        kind = tuple(row[name] for name in ("source", "method", "chip", "model", "dtype", "mode"))
        if kind not in best or float(row["speedup"]) > float(best[kind]["speedup"]):
            best[kind] = row
    return [
        (
            *(row[name] for name in ("method", "chip", "model", "dtype", "mode")),
            f"{row['beam_width']} x {row['beam_length']}" if row["beam_width"] else "",
            *(row[name] for name in ("tokens_per_s", "speedup", "tokens_per_call", "source")),
        )
        for row in best.values()
    ]
