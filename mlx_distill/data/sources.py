"""Where data come from: files, folders with a file per split, and datasets of the hub."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlx_distill.errors import InputError, one_line
from mlx_distill.files import read_jsonl, usable_path
from mlx_distill.regular import check_regular

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def local_file(source: str | Path, split: str) -> Path:
    """Return the file that a source means, fetched from the hub if it is not here.

    Args:
        source: A file, a folder that holds ``{split}.jsonl`` (also ``.jsonl.gz`` or ``.parquet``),
            or the name of a hub dataset that does.
        split: Which file of a folder or a dataset.

    Raises:
        InputError: If there is none.
    """
    name = str(source)
    path = usable_path(source, "the data")
    if path.is_dir():
        named = [path / f"{split}{suffix}" for suffix in SUFFIXES]
        path = next((file for file in named if file.exists()), named[0])
    if path.exists():
        return path
    if name.endswith(SUFFIXES) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"there is no file {path}")
    return _from_hub(name, split)


def _from_hub(name: str, split: str) -> Path:
    """Return a dataset's file of a split, fetched from the hub, in the first layout that it has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    wrong: list[Exception] = []
    for suffix in SUFFIXES:
        try:
            return Path(hf_hub_download(name, f"{split}{suffix}", repo_type="dataset"))
        except Exception as error:  # the hub's client raises its transport's errors too
            wrong.append(error)
            if not isinstance(error, EntryNotFoundError):
                break
    raise InputError(
        f"there is no file {name}, and {split}.jsonl of a dataset of that name could not be "
        f"fetched from the hub: {one_line(wrong[0])}"
    )


def check_sources(sources: Iterable[str | Path], split: str = "train") -> None:
    """Raise InputError if a source is not there or its first row cannot be read.

    Costs next to nothing: to be called before models are loaded.
    """
    for source in sources:
        next(read_rows(local_file(source, split)), None)


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a JSONL file, also compressed, or a parquet file, each behind its place.

    Every line of a text file is a row with a prompt; blank ones are skipped.

    Raises:
        InputError: If the file or a row cannot be read.
    """
    path = usable_path(path, "the data")
    if path.suffix == ".txt":
        return _lines(path)
    return _parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        check_regular(path)
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", {"prompt": line.rstrip("\r\n")}
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"{path} needs pyarrow to be read; install mlx-distill[parquet]") from None
    try:
        check_regular(path)
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", _without_nulls(row)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {one_line(error)}") from None


def _without_nulls(value: Any) -> Any:
    """Return a table's value without the fields that only other rows have: they are null here.

    So are, within a column, the arguments of other tools and the fields of other messages.
    """
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return value
