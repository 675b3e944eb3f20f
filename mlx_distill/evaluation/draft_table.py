"""What was found of a drafter, as tables."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from mlx_distill.console import Console
from mlx_distill.evaluation.drafts import ALL

FAITHFUL = 0.98  # of the target's greedy answers, the tokens that are its best ones
Found = Mapping[str, Any]


def show_drafter(found: Found) -> None:
    """Print what ``judge_drafter`` returns."""
    console = Console(highlight=False, soft_wrap=True, width=1000)
    figures: Mapping[str, Found] = found["temperatures"]
    console.print(_shapes(figures))
    if any(len(_first(one["shapes"])) > 2 for one in figures.values()):
        console.print(_kinds(figures))
    console.print(_acceptance(figures))
    if found["costs"]:
        console.print(_costs(found["costs"]))
    size = found["size"]
    console.print(
        f"{size['parameters']:,} parameters, {size['bytes'] / 1e6:.1f} MB loaded; the target has "
        f"{size['target_bytes'] / 1e6:.1f} MB"
    )
    for temperature, one in figures.items():
        console.print(f"T = {temperature}: {one['tokens']:,} tokens of answers")
    greedy = figures.get("0")
    if greedy and greedy["agreement"] < FAITHFUL:
        console.print(
            f"Of the greedy answers {greedy['agreement']:.1%} of the tokens are this target's "
            "best: another model, or the same in another precision, wrote them."
        )


def _first(shapes: Found) -> Any:
    return next(iter(shapes.values()))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1))
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _shapes(figures: Mapping[str, Found]) -> Table:
    """Return a row per shape."""
    columns = [f"T = {temperature}" for temperature in figures]
    table = _table("tokens per call", "", *columns, "nodes")
    for name in _first(figures)["shapes"]:
        rows = [one["shapes"][name][ALL] for one in figures.values()]
        cells = [f"{row['tokens_per_call']:.3f}" for row in rows]
        table.add_row(name, *cells, f"{rows[0]['nodes_per_call']:.1f}")
    return table


def _kinds(figures: Mapping[str, Found]) -> Table:
    """Return a row per kind of prompt, for some of the shapes."""
    chosen = _chosen(_first(figures)["shapes"])
    columns = [f"{name}, T = {temperature}" for name in chosen for temperature in figures]
    table = _table("by kind of prompt", "", *columns)
    for kind in _first(_first(figures)["shapes"]):
        if not kind:
            continue
        cells = [
            f"{one['shapes'][name][kind]['tokens_per_call']:.3f}"
            if kind in one["shapes"][name]
            else "-"
            for name in chosen
            for one in figures.values()
        ]
        table.add_row(escape(kind), *cells)
    return table


def _chosen(shapes: Found) -> list[str]:
    """Return some of the shapes: those that most is said about, or the last."""
    wanted = [name for name in ("chain of 4", "4 nodes", "8 nodes", "16 nodes") if name in shapes]
    return wanted or list(shapes)[-1:]


def _acceptance(figures: Mapping[str, Found]) -> Table:
    """Return acceptance by depth of some shapes, and how good the first choices are."""
    names = {
        f"{name}, T = {temperature}": one["shapes"][name][ALL]["reached"]
        for temperature, one in figures.items()
        for name in _chosen(one["shapes"])
    }
    hits = {f"T = {temperature}": one["hits"] for temperature, one in figures.items()}
    depth = max(len(row) for row in [*names.values(), *hits.values()])
    table = _table("share of drafts that ...", "", *map(str, range(1, depth + 1)))
    for name, row in names.items():
        table.add_row(f"reach a depth of: {name}", *(f"{share:.3f}" for share in row))
    for name, row in hits.items():
        table.add_row(
            f"have the next token among the best: {name}", *(f"{share:.3f}" for share in row)
        )
    return table


def _costs(costs: Found) -> Table:
    """Return what a draft costs against a step of the target."""
    title = (
        f"costs at {costs['context']} tokens of context, {costs['draft_length']} drafted deep, "
        f"{costs['nodes']} nodes"
    )
    table = _table(title, "", "ms", "of a step", "dispatches", "of a step")
    for name, label in (
        ("plain_step", "a plain step of the target"),
        ("tree_call", "a call of the target"),
        ("draft", "a draft"),
    ):
        time_ms, sent = costs["time_ms"][name], costs["dispatches"][name]
        table.add_row(
            label,
            f"{time_ms:.2f}",
            f"{time_ms / costs['time_ms']['plain_step']:.2f}",
            f"{sent:.0f}",
            f"{sent / costs['dispatches']['plain_step']:.2f}",
        )
    table.add_row(
        "a step of the drafter",
        f"{costs['time_ms']['draft'] / costs['draft_length']:.2f}",
        f"{costs['step_time_share']:.3f}",
        f"{costs['dispatches']['draft'] / costs['draft_length']:.0f}",
        f"{costs['step_dispatch_share']:.3f}",
    )
    return table
