"""Which texts are learned and which are held out, and in what lengths."""

from collections.abc import Hashable, Sequence
from itertools import zip_longest

import numpy as np

from mlx_distill.data.report import LOST, Report
from mlx_distill.data.texts import Source, Text
from mlx_distill.errors import InputError

LONG = ("cut", "drop", "refuse")


def limited(texts: Sequence[Text], count: int | None, report: Report) -> list[Text]:
    """Return the first ``count`` texts, or all; the others are counted as dropped."""
    for text in texts[count:] if count is not None else ():
        _drop(text, f"behind the first {count}", report)
    return list(texts[:count])


def fit(
    texts: Sequence[Text],
    max_length: int,
    long: str = "cut",
    *,
    prompts: bool = False,
    report: Report | None = None,
) -> tuple[list[Text], Report]:
    """Return the texts that can be learned, none longer than ``max_length``, and what was done.

    Args:
        texts: All of them.
        max_length: In tokens.
        long: What happens to longer ones: "cut" keeps the beginning of documents and drops chats,
            whose template's marks would be lost, "drop" leaves all out, "refuse" stops.
        prompts: Keep questions alone, of which nothing is learned.
        report: Counts go there.

    Raises:
        InputError: If a text is too long and that was to be refused, or if nothing is left.
    """
    if long not in LONG:
        raise InputError(f"long must be one of {', '.join(LONG)}, got {long}")
    report = Report(rows=len(texts)) if report is None else report
    too_long = sum(len(text.tokens) > max_length for text in texts)
    if too_long and long == "refuse":
        raise InputError(
            f"{too_long} of {len(texts)} {report.noun} are longer than {max_length} tokens; "
            "cut or drop them with --long, or raise --max-length"
        )
    kept = []
    for text in texts:
        is_long = len(text.tokens) > max_length
        if is_long and (long == "drop" or (text.source and text.source.templated)):
            _drop(text, f"longer than {max_length} tokens", report)
            continue
        fitting = text.upto(max_length) if is_long else text
        if not fitting.num_learned and not (prompts and text.asks and not is_long):
            _drop(text, f"nothing to learn within {max_length} tokens", report)
            continue
        if is_long:
            report.change(f"cut to {max_length} tokens", text.place)
        kept.append(fitting)
    report.kept = len(kept)
    if not kept:
        raise InputError(
            f"none of {len(texts)} {report.noun} has anything to learn: {report.reasons()}"
        )
    return kept, report


def _drop(text: Text, reason: str, report: Report) -> None:
    """Count a text that is not used, and no more what was done with it when it was read."""
    report.drop(reason, text.place)
    if text.source and text.source.lost and report.changed[LOST]:
        report.unchange(LOST, text.place)


def pack(texts: Sequence[Text], length: int) -> list[Text]:
    """Return the texts end to end, cut into rows of ``length`` tokens; only the last is shorter.

    Nothing is padded, and a text sees the end of the one before it. All that was learned still is,
    and once: a row begins with the last token of the one before it. A row that would have nothing
    to learn is left out. Questions alone stay as they are, for the student to answer.
    """
    asked = [text for text in texts if text.asks]
    texts = [text for text in texts if text.num_learned]
    stream = Text(
        [token for text in texts for token in text.tokens],
        [mark for text in texts for mark in text.learned],
    )
    starts = range(0, len(stream.tokens), length - 1)
    parts = [slice(start, start + length) for start in starts]
    templated = any(text.source and text.source.templated for text in texts)
    source = Source("a row of packed texts", templated=templated)
    rows = [Text(stream.tokens[part], stream.learned[part], source) for part in parts]
    return [*(row for row in rows if row.num_learned), *asked]


def held_out_rows(groups: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Return which ``count`` rows are held out, in order: the same share of every group.

    Args:
        groups: What each row belongs to: its file, or the temperature that it was written at.
        count: Number of rows to hold out.
        seed: Decides.
    """
    random = np.random.default_rng([seed, 5])
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    # Every group in a random order, spread over the same way; those that come first are taken.
    way = {}
    for rows in members.values():
        offset = random.random()
        for place, row in enumerate(random.permutation(rows).tolist()):
            way[row] = (place + offset) / len(rows)
    return sorted(sorted(way, key=way.__getitem__)[:count])


def split_held_out(texts: Sequence[Text], count: int, seed: int) -> tuple[list[Text], list[Text]]:
    """Return the texts to learn and those held out, which come from every file.

    Raises:
        InputError: If there are too few.
    """
    if len(texts) <= count:
        raise InputError(f"{len(texts)} texts are too few: {count} are held out")
    files = [text.source.file if text.source else "" for text in texts]
    held = set(held_out_rows(files, count, seed))
    learn = [text for row, text in enumerate(texts) if row not in held]
    return learn, [texts[row] for row in sorted(held)]


def rows_in_turn(kinds: Sequence[Hashable]) -> list[int]:
    """Return all rows with their kinds taking turns, so that the first few hold every kind."""
    rows: dict[Hashable, list[int]] = {}
    for row, kind in enumerate(kinds):
        rows.setdefault(kind, []).append(row)
    return [row for turn in zip_longest(*rows.values()) for row in turn if row is not None]
