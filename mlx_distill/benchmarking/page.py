"""Results as one page that needs nothing else: no network, no other file.

The page is made from what ``benchmark --output`` and ``calibrate --output`` write, and from nothing
else, so it can be made again later and elsewhere. Every text that it shows, prompts among them, is
escaped; the trees lie in it as JSON in which no character can end the script.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from mlx_distill.benchmarking.charts import Axis, Line, heat_map, lines
from mlx_distill.benchmarking.published import published
from mlx_distill.errors import InputError, one_line

TEMPLATE = files("mlx_distill") / "benchmarking" / "page_template.html"
MODEL = "stories-14m"  # where none is named


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of some results: of benchmarks, profiles and calibrations.

    Raises:
        InputError: If something is none of these.
    """
    try:
        sections = [section for number, one in enumerate(results) for section in _of(one, number)]
        body = "".join(sections) + _published(results)
        recorded = _json(
            [
                {"result": number, "texts": [_tree_text(text) for text in one["trees"]]}
                for number, one in enumerate(results)
                if one.get("trees")
            ]
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"the result is none of benchmark's or calibrate's ({what})") from None
    before, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("<!--BODY-->")
    between, _, after = rest.partition("/*TREES*/")
    return "".join((before, body, between, recorded, after))


def _of(result: Mapping[str, Any], number: int) -> Iterator[str]:
    """Yield the sections of one result."""
    yield _heading(result, number)
    if "arms" in result:
        yield _speed(result)
        yield _acceptance(result)
    if result.get("sweep"):
        yield _sweep(result["sweep"])
    costs = result.get("costs") or result.get("calibration")
    if costs:
        yield _curve(costs)
    if result.get("growth"):
        yield _growth(result["growth"])
    profile = result if "parts" in result else result.get("profile")
    if profile:
        yield _profile(profile)
    if not ("arms" in result or costs or profile):
        raise ValueError("it holds neither arms, costs nor parts")
    if result.get("trees"):
        yield _viewer(number)


def _heading(result: Mapping[str, Any], number: int) -> str:
    machine, config = result["machine"], result.get("config", {})
    versions = ", ".join(f"{name} {value}" for name, value in result.get("versions", {}).items())
    drafter = config.get("drafter") or "its bundled drafter"
    pair = f"{config.get('model') or MODEL} with {drafter}"
    law = f"temperature {config['temperature']:g}" if "temperature" in config else "costs"
    title = result.get("title") or f"{pair}, {law}"
    told = [
        f"{machine['processor']}, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}",
        f"power: {machine['power']}" if machine.get("power") else "",
        result.get("dtype") or "",
        versions,
        f"commit {result['commit']}" if result.get("commit") else "",
    ]
    lines_of = "<br>".join(escape(str(line)) for line in told if line)
    return f'<h2 id="result-{number}">{escape(str(title))}</h2><p class="about">{lines_of}</p>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h3>{escape(title)}</h3>{''.join(parts)}</section>"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """Return a table whose first column names its rows; the style sheet knows its kind."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        "<tr>"
        + f'<th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide {kind}">{whole}</div>'


def _note(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def _range(values: Mapping[str, Any] | None, form: str) -> str:
    if values is None:
        return ""
    low, high = values["quartile_1"], values["quartile_3"]
    return f"{values['median']:{form}} ({low:{form}}-{high:{form}})"


# --------------------------------------------------------------------------------------- sections


def _speed(result: Mapping[str, Any]) -> str:
    heads = ("arm", "tokens/s", "speed-up", "tokens/call", "first token", "peak memory")
    rows = [
        (
            row["arm"],
            _range(row["tokens_per_s"], ".1f"),
            _range(row["speedup"], ".2f"),
            f"{row['tokens_per_call']:.2f}",
            f"{1e3 * row['first_token_s']['median']:.0f} ms",
            f"{row['peak_memory_bytes'] / 1e6:,.0f} MB",
        )
        for row in result["arms"]
    ]
    said = (
        f"Medians over {result['arms'][0]['prompts']} prompts, quartiles in brackets; tokens per "
        "call are means, and memory is the most that a prompt took. "
    )
    if result.get("equal_texts") is not None:
        said += f"Tokens equal mlx-lm's on {result['equal_texts']} prompts. "
    differences = result.get("differences") or ()
    if differences:
        widest = max(one["margin"] for one in differences)
        said += f"Where the others part, the best two tokens are at most {widest:.4f} nats apart. "
    cost = result.get("overhead")
    if cost:
        said += (
            f"A cycle takes {cost['cycle_ms']:.2f} ms with its parts one after the other: target "
            f"{cost['verify_ms']:.2f}, drafter {cost['draft_ms']:.2f}, the rest "
            f"{cost['overhead_ms']:.2f}; a plain step takes {cost['plain_step_ms']:.2f}."
        )
    return _section("Speed", table(heads, rows), _note(said))


def _acceptance(result: Mapping[str, Any]) -> str:
    """Return the acceptance by depth, of all prompts and of every class."""
    classes = result.get("classes") or ()
    series = [Line("all prompts", _by_depth(result["acceptance_by_depth"]))]
    if len(classes) > 1:
        series += [Line(row["class"], _by_depth(row["acceptance_by_depth"])) for row in classes]
    series = [line for line in series if line.points]
    parts = []
    if series:
        depths = [float(depth) for line in series for depth, _ in line.points]
        x = Axis.over("drafted tokens, at least", [1.0, *depths])
        y = Axis("share of calls that accept", 0, 1)
        parts.append(f"<figure>{lines(series, x, y)}</figure>")
    if classes:
        heads = ("class of prompt", "prompts", "speed-up", "tokens/call")
        rows = [
            (
                row["class"],
                row["prompts"],
                _range(row["speedup"], ".2f"),
                f"{row['tokens_per_call']:.2f}",
            )
            for row in classes
        ]
        parts.append(table(heads, rows))
    return _section("Acceptance by depth and class", *parts)


def _by_depth(shares: Sequence[Any]) -> list[tuple[int, float]]:
    return [(depth, float(share)) for depth, share in enumerate(shares, start=1)]


def _sweep(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the heat map of speed-up over widths and lengths, and the tokens per call."""
    widths = sorted({row["beam_width"] for row in rows})
    lengths = sorted({row["draft_length"] for row in rows})
    cells = {(row["beam_width"], row["draft_length"]): row for row in rows}
    grid = [
        [cells[w, n]["speedup"]["median"] if (w, n) in cells else None for n in lengths]
        for w in widths
    ]
    names = [str(width) for width in widths], [str(length) for length in lengths]
    drawn = heat_map(*names, grid, "beam width", "draft length, tokens")
    best = max(rows, key=lambda row: row["speedup"]["median"])
    said = (
        "Speed-up over mlx-lm. The best shape is a beam width of "
        f"{best['beam_width']} and a draft length of {best['draft_length']}: "
        f"{_range(best['speedup'], '.2f')}, {best['tokens_per_call']:.2f} tokens per call."
    )
    return _section("Speed over shapes of drafts", f"<figure>{drawn}</figure>", _note(said))


def _curve(costs: Mapping[str, Any]) -> str:
    """Return what a call costs against its rows, in plain steps."""
    series = [
        Line(
            f"{context:,} tokens of context",
            [(float(n), s / row[0]) for n, s in zip(costs["rows"], row, strict=True)],
        )
        for context, row in zip(costs["contexts"], costs["call_s"], strict=True)
    ]
    highest = [y for line in series for _, y in line.points]
    x = Axis.over("rows of a call", [float(n) for n in costs["rows"]])
    drawn = lines(series, x, Axis.from_zero("cost, in plain calls", highest), 1)
    said = (
        f"A call on one row takes {1e3 * costs['call_s'][0][0]:.2f} ms. Times of the same work "
        f"differ by {costs.get('spread', 0):.0%}."
    )
    return _section("What a call costs, V(T)", f"<figure>{drawn}</figure>", _note(said))


def _growth(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return speed and memory against the context, arm by arm."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    contexts = [float(row["context"]) for row in rows]
    figures = []
    for name, scale, label in (
        ("tokens_per_s", 1.0, "tokens per second"),
        ("peak_memory_bytes", 1e-6, "peak memory, MB"),
    ):
        series = [
            Line(arm, [(r["context"], r[name] * scale) for r in rows if r["arm"] == arm])
            for arm in arms
        ]
        x = Axis.over("context, tokens", contexts, log=True)
        y = Axis.from_zero(label, [value for line in series for _, value in line.points])
        figures.append(f"<figure>{lines(series, x, y)}</figure>")
    return _section("With a growing context", f'<div class="pair">{"".join(figures)}</div>')


def _profile(found: Mapping[str, Any]) -> str:
    heads = ("part", "ms", "share", "waiting", "dispatches", "at least", "reached")
    step, limits = found["plain_step"], found["ceilings"]
    rows = [
        (
            row["part"],
            f"{row['ms']:.3f}",
            f"{row['share']:.0%}",
            f"{row['waiting_ms']:.3f}",
            f"{row['dispatches']:.1f}",
            *_ceiling(row),
        )
        for row in found["parts"]
    ]
    alone = (f"{step['ms']:.3f}", "", "", f"{step['dispatches']:.1f}", *_ceiling(step))
    said = (
        f"Every part alone, the device waited for around it: {found['waited_cycle_ms']:.3f} ms. As "
        f"it runs a cycle takes {found['cycle_ms']:.3f} ms. At least: what this machine reaches in "
        f"{limits['dtype']}, {limits['bytes_per_s'] / 1e9:.1f} GB/s and "
        f"{limits['flops_per_s'] / 1e9:.0f} GFLOP/s, with estimated bytes and operations."
    )
    rows.append(("plain step of mlx-lm", *alone))
    return _section("Where a cycle's time goes", table(heads, rows), _note(said))


def _ceiling(row: Mapping[str, Any]) -> tuple[str, str]:
    if row["ceiling_ms"] is None or row["reached"] is None:
        return "", ""
    return f"{row['ceiling_ms']:.3f}", f"{row['reached']:.0%}"


def _viewer(number: int) -> str:
    help_of = (
        "Step with the arrow keys, Home and End, or click a token. Filled nodes were accepted, "
        "dashed ones were not. Below each token stand its probabilities after its parent: the "
        "target's own, and the drafter's, sharpened as it searches."
    )
    frame = f'<div class="viewer" data-result="{number}" tabindex="0"></div>'
    return _section("Trees", _note(help_of), frame)


def _tree_text(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded text for the viewer, which takes for granted what is checked here."""
    for cycle in text["cycles"]:
        size, parents, path = len(cycle["texts"]), cycle["parents"], cycle["path"]
        if not size == len(parents) == len(cycle["target"]) == len(cycle["draft"]):
            raise ValueError("a tree's lists differ in length")
        if any(not 0 <= parent < max(1, node) for node, parent in enumerate(parents)):
            raise ValueError("a node of a tree comes before its parent")
        if not path or path[0] != 0 or not all(0 <= node < size for node in path):
            raise ValueError("a path leaves its tree")
    return {name: text[name] for name in ("prompt", "text", "kind", "cycles")}


def _published(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the best published figures of each kind beside these."""
    heads = ("method", "chip", "model", "dtype", "mode", "shape", "tokens/s", "speed-up")
    heads += ("tokens/call", "source")
    rows: list[tuple[object, ...]] = []
    for one in results:
        for arm in one.get("arms", ())[1:]:
            config = one.get("config", {})
            law = config.get("temperature", 0)
            rows.append(
                (
                    f"{arm['arm']} (measured here)",
                    one["machine"]["processor"],
                    config.get("model") or MODEL,
                    one.get("dtype", ""),
                    f"T={law:g}" if law else "greedy",
                    "",
                    f"{arm['tokens_per_s']['median']:.1f}",
                    f"{arm['speedup']['median']:.2f}",
                    f"{arm['tokens_per_call']:.2f}",
                    "",
                )
            )
    if not rows:
        return ""
    told = "Of each published sweep the fastest shape. Other machines, models and versions of MLX."
    return _section(
        "Beside published figures", table(heads, [*rows, *published()], "sources"), _note(told)
    )


def _json(value: object) -> str:
    """Return JSON that lies within a script: nothing in it can end that, and nothing is a tag."""
    text = json.dumps(_finite(value), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """Return a value in which numbers that JSON has no word for are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
