"""A sweep over the shapes of drafts as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_distill.names import for_plot


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the speed-up over beam width and draft length as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for width in sorted({row["beam_width"] for row in rows}):
        mine = [row for row in rows if row["beam_width"] == width]
        lengths = [row["draft_length"] for row in mine]
        medians = [row["speedup"]["median"] for row in mine]
        axes.plot(lengths, medians, marker="o", label=f"beam width {width}")
        axes.fill_between(
            lengths,
            [row["speedup"]["quartile_1"] for row in mine],
            [row["speedup"]["quartile_3"] for row in mine],
            alpha=0.15,
        )
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(title=for_plot(title), xlabel="draft length, tokens", ylabel="speed-up over mlx-lm")
    axes.set_xticks(sorted({row["draft_length"] for row in rows}))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
