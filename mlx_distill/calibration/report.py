"""A calibration as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mlx_distill.console import Console
from mlx_distill.kernels.probe import Verdict
from mlx_distill.names import for_plot
from mlx_distill.speculation.costs import Costs


def show(costs: Costs) -> None:
    """Print what calls and drafts take."""
    console = Console()
    console.print("A call of the target, in plain steps (and milliseconds):")
    table = Table()
    table.add_column("rows", justify="right")
    for context in costs.contexts:
        table.add_column(f"{context:,} tokens", justify="right")
    for column, rows in enumerate(costs.rows):
        cells = (f"{row[column] / row[0]:.2f} ({1e3 * row[column]:.2f})" for row in costs.call_s)
        table.add_row(str(rows), *cells)
    console.print(table)
    console.print("A draft, in milliseconds:")
    table = Table()
    table.add_column("beam width", justify="right")
    for length in costs.lengths:
        table.add_column(f"length {length}", justify="right")
    for width, row in zip(costs.widths, costs.draft_s, strict=True):
        table.add_row(str(width), *(f"{1e3 * seconds:.2f}" for seconds in row))
    console.print(table)
    for name, law in (("temperature 0", costs), ("temperature 1", costs.sampled())):
        line = ""
        if law.line_overhead_s is not None:
            line = f", {1e3 * law.line_overhead_s:.2f} ms where a line is drafted"
        console.print(
            f"At {name}, a plain step: {1e3 * law.plain(law.contexts[0]):.2f} ms; the rest of a "
            f"cycle: {1e3 * law.overhead_s:.2f} ms{line}"
        )
    if costs.threads:
        console.print(f"Drafting is fastest here with {costs.threads} threads of OpenBLAS")
    console.print(f"Times of the same work differ by {costs.spread:.0%}")


def show_kernels(verdicts: Sequence[Verdict]) -> None:
    """Print which kernels are used, and why the others are not."""
    console = Console()
    if not verdicts:
        console.print("Kernels: none can be used here, or none was tried (MLX_DISTILL_KERNELS)")
        return
    table = Table(title="Kernels, in microseconds a call")
    for name in ("kernel", "used", "kernel takes", "MLX takes", "why"):
        table.add_column(name, justify="right" if "takes" in name else "left")
    for one in verdicts:
        untried = "no draft here asks for it" if not one.kernel_s else ""
        slower = "" if one.used else "it is not faster"
        times = (f"{1e6 * s:.1f}" if s else "" for s in (one.kernel_s, one.twin_s))
        table.add_row(one.name, "yes" if one.used else "no", *times, one.fault or untried or slower)
    console.print(table)


def plot(costs: Costs, title: str, path: Path) -> None:
    """Draw what calls cost against their rows, in plain steps, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for context, row in zip(costs.contexts, costs.call_s, strict=True):
        relative = [seconds / row[0] for seconds in row]
        axes.plot(costs.rows, relative, marker=".", label=f"{context:,} tokens of context")
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(title=for_plot(title), xlabel="rows of a call", ylabel="cost, in plain steps")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
