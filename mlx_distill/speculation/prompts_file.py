"""The answers to a file of prompts, as a file that a kill does not lose.

Answers are kept in ``OUTPUT.writing`` as they come, behind a line that says how they are written.
What was stopped goes on from there, in the same way or not at all. When the last one is there,
``OUTPUT`` appears whole, in the prompts' order:

    {"index": 0, "text": " the end.", "finish_reason": "stop", "prompt_tokens": 4, ...}
    {"index": 1, "error": "prompts.jsonl, line 2: the prompt has no tokens"}
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx import nn
from tqdm import tqdm

from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import read_each
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import naming, new_path
from mlx_distill.limits import check_value, hints
from mlx_distill.locks import locked
from mlx_distill.parsing import parse_json
from mlx_distill.speculation.batch_generation import BATCH, Answer, stream_answers
from mlx_distill.speculation.requests import Request
from mlx_distill.untyped import Fields, Settings, Tokenizer

__all__ = ["BATCH", "answer_file"]

FORMAT_VERSION = 1
# What a row may say of its own answer.
OWN = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
# What a record holds.
FAILED = {"index": int, "error": str}
ANSWERED = {
    "index": int,
    "text": str,
    "finish_reason": str,
    "prompt_tokens": int,
    "generation_tokens": int,
}
_LINE = re.compile("[^\n]*\n|[^\n]+$")  # others than a line's end are no end of a record
Rows = Sequence[tuple[Settings, list[int] | InputError]]
Numbered = tuple[int, Fields]
# Of files beside the output: what was written so far, who writes, and what is about to be it.
ENDINGS = (".writing", ".lock", ".whole")


def answer_file(
    model: nn.Module,
    tokenizer: Tokenizer,
    source: str,
    output: Path | None,
    settings: Settings,
    options: Settings,
    reading: Settings,
) -> int:
    """Answer a file of prompts, and say on stderr how that went; return an exit status.

    Args:
        model: Writes the answers.
        tokenizer: Its tokenizer.
        source: The file of prompts.
        output: The file of answers, which must not exist; None for stdout.
        settings: What the answers depend on: another run goes on only with the same.
        options: Of ``stream_answers``.
        reading: Of ``read_each``.

    Raises:
        InputError: If the prompts cannot be read, what was kept was written in another way, or
            nothing can be written.
    """
    rows = read_each(source, tokenizer, **reading)
    start = time.perf_counter()
    with tqdm(total=len(rows), unit="answer", leave=False, disable=output is None) as bar:
        if output is None:
            before = 0
            records = dict(_printed(answered(model, tokenizer, rows, range(len(rows)), options)))
        else:
            before, records = _kept(model, tokenizer, rows, output, settings, options, bar)
    seconds = time.perf_counter() - start
    failed = sum("error" in record for record in records.values())
    tokens = sum(record.get("generation_tokens", 0) for record in records.values())
    told = f"{len(records):,} answers, {tokens:,} tokens, in {seconds:.1f} s"
    told += f"; {before:,} of them were there before" if before else ""
    print(told + (f"; {failed} of them failed, and say why" if failed else ""), file=sys.stderr)
    return 0


def _printed(records: Iterable[Numbered]) -> Iterator[Numbered]:
    for index, record in records:
        print(json.dumps(record), flush=True)
        yield index, record


def _kept(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Rows,
    output: Path,
    settings: Settings,
    options: Settings,
    bar: Any,
) -> tuple[int, dict[int, Fields]]:
    """Write the answers that are not kept yet.

    Returns:
        How many were, and all of them when their file is whole.
    """
    writing, lock, whole = (output.with_name(output.name + end) for end in ENDINGS)
    header = json.dumps({"format_version": FORMAT_VERSION, "prompts": _hash(rows), **settings})
    with locked(lock, output):
        records = _resume(writing, whole, header, len(rows))
        before = len(records)
        bar.update(before)
        left = [index for index in range(len(rows)) if index not in records]
        try:
            with naming(writing), writing.open("a", encoding="utf-8") as file:
                for index, record in answered(model, tokenizer, rows, left, options):
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    records[index] = record
                    bar.update(1)
        except KeyboardInterrupt:
            kept = f"{len(records)} of {len(rows)} answers are kept in {writing}"
            print(f"{kept}; the same command goes on", file=sys.stderr)
            raise
        new_path(output)  # it took long: somebody else may have written there meanwhile
        _write(whole, "".join(json.dumps(records[index]) + "\n" for index in sorted(records)))
        os.replace(whole, output)
        writing.unlink()
    lock.unlink(missing_ok=True)
    return before, records


def answered(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Rows,
    left: Sequence[int],
    options: Settings,
) -> Iterator[Numbered]:
    """Yield the records of some rows, as they are ready, with the rows' numbers."""
    usable, each = [], []
    for index in left:
        row, ids = rows[index]
        if isinstance(ids, InputError):
            yield index, {"index": index, "error": str(ids)}
            continue
        try:
            own = _own(row)
        except InputError as error:
            yield index, {"index": index, "error": str(error)}
            continue
        seed = options.get("seed")
        if seed is not None and "seed" not in own:
            # Each row's own, whatever is written beside it; behind the last seed comes the first.
            own["seed"] = (seed + index) % 2**63
        usable.append((index, ids))
        each.append(own)
    prompts = [ids for _, ids in usable]
    for answer in stream_answers(model, tokenizer, prompts, each=each, **options):
        index = usable[answer.index][0]
        yield index, _record(index, answer)


def _own(row: Settings) -> Fields:
    """Return what a row says of its own answer.

    Raises:
        InputError: If that is of a wrong kind, or out of its range.
    """
    own = {name: row[name] for name in OWN if row.get(name) is not None}
    if isinstance(own.get("stop"), str):
        own["stop"] = [own["stop"]]
    known = hints(Request) | hints(Sampling)
    for name, value in own.items():
        check_value(name, value, known[name])
    return own


def _record(index: int, answer: Answer) -> Fields:
    """Return what is kept of an answer."""
    if answer.error is not None:
        return {"index": index, "error": one_line(answer.error)}
    assert answer.last is not None
    return {
        "index": index,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.last.prompt_tokens,
        "generation_tokens": answer.last.generation_tokens,
    }


def _resume(writing: Path, whole: Path, header: str, num_rows: int) -> dict[int, Fields]:
    """Return what was kept, by index; what is damaged is dropped, and so written again.

    A kill cuts a line, and a machine that loses its power may leave anything. A kill while that is
    put in order leaves the file as it was, or in order.

    Raises:
        InputError: If it was written in another way.
    """
    if not writing.exists() or not writing.stat().st_size:
        _write(writing, header + "\n")
        return {}
    first, *lines = _LINE.findall(writing.read_bytes().decode("utf-8", "replace"))
    if first != header + "\n" and header.startswith(first):  # killed while it was written
        first, lines = header + "\n", []
    if first != header + "\n":
        raise InputError(
            f"{writing} was begun with other prompts or settings; go on with the same ones, or "
            "remove it"
        )
    found = [(line, _kept_record(line, num_rows)) for line in lines]
    _write(whole, "".join([first, *(line for line, one in found if one)]))
    os.replace(whole, writing)
    return {record["index"]: record for _, record in found if record}


def _write(path: Path, text: str) -> None:
    with naming(path):
        path.write_text(text, encoding="utf-8")


def _kept_record(line: str, num_rows: int) -> Fields | None:
    """Return the record that a line holds, as ``_record`` has made it; None if it holds none."""
    try:
        record = parse_json(line)
    except InputError:
        return None
    if not line.endswith("\n") or not isinstance(record, dict):
        return None
    kinds = {name: type(value) for name, value in record.items()}
    known = kinds in (ANSWERED, FAILED) and 0 <= record["index"] < num_rows
    return record if known else None


def _hash(rows: Rows) -> str:
    """Return a hash of the prompts and what their rows say of the answers."""
    digest = hashlib.sha256()
    for row, ids in rows:
        own = {name: row[name] for name in OWN if name in row}
        digest.update(json.dumps([own, str(ids)], default=str).encode())
    return digest.hexdigest()[:16]
