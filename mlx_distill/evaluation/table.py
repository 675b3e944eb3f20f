"""An evaluation as a table: a column per model, a row per figure that any model has."""

import math
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from mlx_distill.console import Console

FIGURES = {
    "perplexity": ("perplexity", ".3f"),
    "nats_per_token": ("nats/token", ".3f"),
    "kl": ("KL, nats/token", ".4f"),
    "agreement": ("agreement", ".1%"),
    "gap_closed": ("gap closed", ".1%"),
    "calibration_error": ("calib. error", ".2%"),
    "exact_match": ("exact match", ".1%"),
    "f1": ("F1", ".1%"),
}
Rows = dict[str, dict[str, Any]]


def show(result: dict[str, Any]) -> None:
    """Print an evaluation: ``models`` as ``measure`` returns them, ``machine`` and ``config``."""
    # As wide as the table needs: a figure with its interval is not to be broken.
    console = Console(highlight=False, soft_wrap=True, width=1000)
    rows: Rows = result["models"]
    found = result["machine"]
    console.print(_table(rows, escape(f"{found['processor']}, {found['device']}")))
    texts, tokens = (sorted({row[name] for row in rows.values()}) for name in ("texts", "tokens"))
    intervals = (
        "; in brackets the 95 % interval over texts" if result["config"]["bootstrap"] else ""
    )
    console.print(
        f"{' or '.join(map(str, texts))} texts with {' or '.join(map(str, tokens))} tokens"
        f"{intervals}."
    )
    for name, row in rows.items():
        if row.get("questions_too_long"):
            console.print(
                f"{escape(name)} was not asked {row['questions_too_long']} questions that leave "
                "no room for an answer."
            )
    if len(tokens) > 1:
        console.print(
            "The models read other tokens, by their tokenizers or contexts, so perplexity per "
            "token is not comparable."
        )


def _table(rows: Rows, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1))
    table.add_column("")
    for name in rows:
        table.add_column(escape(name), justify="right")
    for key, (label, form) in FIGURES.items():
        if any(key in row for row in rows.values()):
            table.add_row(label, *(_cell(row.get(key), form) for row in rows.values()))
    if any("tokens_per_s" in row for row in rows.values()):
        table.add_row("tokens/s", *(f"{row['tokens_per_s']:.0f}" for row in rows.values()))
    table.add_row("parameters", *(f"{row['parameters'] / 1e6:.1f} M" for row in rows.values()))
    for key, label in (("weights_bytes", "loaded"), ("file_bytes", "on disk")):
        table.add_row(label, *(f"{row[key] / 1e6:.1f} MB" for row in rows.values()))
    return table


def _cell(figure: dict[str, Any] | None, form: str) -> str:
    """Return a figure and its interval."""
    if figure is None:
        return ""
    low_high = figure["interval"]
    value = "-" if math.isnan(figure["value"]) else f"{figure['value']:{form}}"
    if low_high is None:
        return value
    low, high = (f"{bound:{form}}".removesuffix("%") for bound in low_high)
    return f"{value} ({low}..{high})"


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: what is infinite or not a number becomes None."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
