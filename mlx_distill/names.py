"""Names that others chose, as they have to be written where some characters mean something."""

from pathlib import Path

from rich.text import Text

from mlx_distill.errors import printable, shorten

LONGEST = 60  # characters of a name in a table or a plot


def shown(path_or_name: str | Path) -> str:
    """Return the name of a file, a folder or anything else on one line of moderate length."""
    text = str(path_or_name)
    return shorten(printable(Path(text).name or text), LONGEST)


def for_table(name: str) -> Text:
    """Return a name as a cell of a rich table, where ``[/x]`` would be markup."""
    return Text(shown(name))


def for_plot(name: str) -> str:
    """Return a name as matplotlib's text, where ``$x$`` would be mathematics.

    A legend leaves out what begins with an underscore; an invisible character goes before it.
    """
    text = shown(name).encode("utf-8", "replace").decode().replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def for_markdown(name: str) -> str:
    """Return a name as text of a model card, where ``|`` ends a cell and ``*`` is emphasis."""
    return "".join(f"\\{c}" if c in r"\`*_[]<>|#" else c for c in shown(name))
