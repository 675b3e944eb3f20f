"""A cache that was cut off goes on; one that is damaged, or is of something else, is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from caches import (
    HEADER,
    TEACHER,
    TEXTS,
    Speaker,
    V,
    at_learned,
    contents,
    edit_manifest,
    flip_last_byte,
    open_cache,
    times,
    write,
)

from mlx_distill.data import cache_files, teacher_cache
from mlx_distill.data.teacher_cache import TeacherCache, write_cache
from mlx_distill.data.texts import Text
from mlx_distill.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a finished cache of five shards."""
    write(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("batches", [1, 4, 6, 12])
def test_going_on_equals_never_stopping(tmp_path: Path, folder: Path, batches: int) -> None:
    stopped = tmp_path / "stopped"
    run = write_cache(stopped, Speaker(TEACHER), TEXTS, HEADER, 8, 5, 2)
    done = [next(run) for _ in range(batches)][-1]
    run.close()  # pyright: ignore[reportAttributeAccessIssue]
    kept = done - done % 5
    with pytest.raises(InputError, match=rf"unfinished: it holds {kept} of 21 texts; .* goes on"):
        open_cache(stopped)
    before = times(stopped)
    assert len(before) == done // 5
    assert write(stopped)[0] == min(kept + 2, 21)
    assert before.items() <= times(stopped).items()
    assert contents(stopped) == contents(folder)


def test_a_kill_between_shard_and_manifest(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = tmp_path / "stopped"
    whole = teacher_cache.write_whole

    def killed(path: Path, text: str) -> None:
        if "shard-00002" in text:
            raise KeyboardInterrupt
        whole(path, text)

    monkeypatch.setattr(teacher_cache, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        write(stopped)
    monkeypatch.undo()
    (stopped / "writing.safetensors").write_bytes(b"half")
    write(stopped)
    assert contents(stopped) == contents(folder)


@pytest.mark.parametrize("cut", [False, True])
def test_a_full_disk_keeps_what_is_whole(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    stopped = tmp_path / "stopped"
    save = mx.save_safetensors

    def full(path: str, arrays: dict[str, mx.array]) -> None:
        save(path, arrays)
        if (stopped / "shard-00001.safetensors").exists():
            data = Path(path).read_bytes()
            Path(path).write_bytes(data[:-9])  # a full disk can cut files without a word
            if not cut:
                raise RuntimeError("[write] Unable to write 9 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    expected = r"shard-00002.safetensors could not be written \(.*\); 10 of 21 texts are kept"
    with pytest.raises(InputError, match=expected):
        write(stopped)
    monkeypatch.undo()
    assert set(contents(stopped)) == {
        "lock",
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    }
    write(stopped)
    assert contents(stopped) == contents(folder)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"manifest.json could not be written .* 0 of 21 texts"):
        write(tmp_path / "file" / "cache")


def test_two_writers_at_once(tmp_path: Path) -> None:
    first = write_cache(tmp_path, Speaker(TEACHER), TEXTS, HEADER, 8, 5, 2)
    next(first)
    with pytest.raises(InputError, match="is being written by another run"):
        write(tmp_path)
    assert list(first)[-1] == len(TEXTS)
    assert write(tmp_path) == []


def remove(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [remove, shorten, flip_last_byte])
def test_a_damaged_shard_is_named_and_rebuilt_alone(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    whole, before = contents(folder), times(folder)
    damage(folder / "shard-00003.safetensors")
    with pytest.raises(
        InputError,
        match=r"shard-00003.safetensors is .*--cache-teacher .* rebuilds this file alone",
    ):
        at_learned(open_cache(folder), [0, 16])
    assert write(folder) == [18, 20, 21]
    assert contents(folder) == whole
    changed = {name for name, time in times(folder).items() if time != before[name]}
    assert changed == {"shard-00003.safetensors"}
    assert at_learned(open_cache(folder), [16])[0].shape[-1] == 8


def test_a_cache_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no manifest.json.*make one with --cache-teacher"):
        open_cache(tmp_path)
    with pytest.raises(InputError, match="was made with another tokenizer"):
        TeacherCache.open(folder, "xyz", TEXTS)
    others = [*TEXTS[1:], TEXTS[0]]
    starts = [Text(text.tokens) for text in TEXTS]
    for texts in (others, starts, TEXTS[:-1], [Text(text.tokens[:20]) for text in TEXTS]):
        with pytest.raises(InputError, match=r"was made of other texts.*give the model, the data"):
            TeacherCache.open(folder, "abc", texts)
    edit_manifest(folder, format_version=1)
    for action in (open_cache, write):
        with pytest.raises(InputError, match="has format version 1, expected 2"):
            action(folder)


def entries(folder: Path, **fields: Any) -> list[dict[str, Any]]:
    """Return the manifest's shards, the second with other fields."""
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return [{**shard, **(fields if place == 1 else {})} for place, shard in enumerate(shards)]


@pytest.mark.parametrize(
    "fields",
    [
        {"k": "many"},
        {"k": V + 1},
        {"k": True},
        {"tail": "sieve"},
        {"shards": 3},
        {"shards": None},
        {"shards": [{"name": "x"}]},
        {"texts_per_shard": 0},
        {"texts_per_shard": 1},
        {"texts_per_shard": 2.5},
        {"num_texts": "21"},
        {"num_texts": 10**400},
    ],
)
def test_a_damaged_manifest_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    edit_manifest(folder, **fields)
    for action in (open_cache, write):
        with pytest.raises(InputError, match=r"manifest.json (is damaged; remove|cannot be read)"):
            action(folder)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../shard-00001.safetensors"},
        {"name": "shard-00000.safetensors"},
        {"name": "shard-99999.safetensors"},
        {"name": 5},
        {"first": 6},
        {"first": "5"},
        {"count": 4},
        {"count": "5"},
        {"positions": -1},
        {"positions": "many"},
        {"sha256": 7},
        {"more": 1},
    ],
)
def test_a_damaged_entry_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    edit_manifest(folder, shards=entries(folder, **fields))
    with pytest.raises(InputError, match=r"manifest.json is damaged; remove the folder"):
        open_cache(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 7}, "shard-00000.safetensors is damaged: its arrays are not those"),
        ({"vocab_size": 10**6}, "shard-00000.safetensors is damaged: its arrays are not those"),
        ({"num_texts": 10**12}, "with num_texts 1000000000000, not 21"),
    ],
)
def test_a_manifest_that_is_not_its_shards_is_refused(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    shards = entries(folder)[:4] if "num_texts" in fields else entries(folder)
    edit_manifest(folder, **fields, shards=shards)
    with pytest.raises(InputError, match=message):
        open_cache(folder)


def test_other_numbers_of_positions_are_refused(folder: Path) -> None:
    edit_manifest(folder, shards=entries(folder, positions=3))
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is damaged: its arrays"):
        open_cache(folder)


def forge(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    """Change a shard's arrays, and its hash in the manifest with them."""
    path = folder / "shard-00001.safetensors"
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    change(arrays)
    mx.save_safetensors(str(path), arrays)
    edit_manifest(folder, shards=entries(folder, sha256=cache_files.sha256(path)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", mx.array(V, mx.uint16), "holds tokens beyond its vocabulary"),
        ("log_probs", mx.array(mx.nan, mx.float16), "holds no probabilities"),
        ("tail", mx.array(2.0), "holds no probabilities"),
        ("offsets", mx.array(10**12, mx.int64), "has other numbers of tokens than its texts"),
    ],
)
def test_values_that_would_be_read_out_of_bounds_are_refused(
    folder: Path, name: str, value: mx.array, message: str
) -> None:
    def change(arrays: dict[str, mx.array]) -> None:
        arrays[name] = mx.broadcast_to(value, arrays[name].shape)

    forge(folder, change)
    with pytest.raises(InputError, match=rf"shard-00001.safetensors {message}"):
        at_learned(open_cache(folder), [5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"header": {**HEADER, "tokenizer_hash": "xyz"}}, "with another tokenizer"),
        ({"header": {**HEADER, "weights_hash": "xyz"}}, "from another teacher"),
        ({"texts": TEXTS[1:]}, "of other texts"),
        ({"k": 9}, "with k 8, not 9; remove it or name another folder"),
        ({"texts_per_shard": 6}, "with texts_per_shard 5, not 6"),
    ],
)
def test_nothing_is_added_to_another_cache(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    whole = contents(folder)
    with pytest.raises(InputError, match=f"was made {message}"):
        write(folder, **options)
    assert contents(folder) == whole
