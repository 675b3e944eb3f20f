"""A teacher's distributions on disk, against a slow twin; resuming, refusals, damage, size."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.arrays import log_probs as normalised
from mlx_distill.data import cache_files, teacher_cache
from mlx_distill.data.teacher_cache import TeacherCache, tail_draws, top_tokens, write_cache
from mlx_distill.data.texts import Text, text_batch
from mlx_distill.errors import InputError
from mlx_distill.losses import response

V = 300
HEADER = {"tokenizer_hash": "abc", "weights_hash": "def", "vocab_size": V}
HALF = 2**-8 + 1e-3  # half of float16's step below 16, and what rescaling adds


def make_texts(count: int, seed: int = 0, vocab_size: int = V) -> list[Text]:
    random = np.random.default_rng(seed)
    lengths = [2, 40, *random.integers(2, 41, count - 2).tolist()]
    return [Text.behind(random.integers(0, vocab_size, n).tolist(), 1 + n // 4) for n in lengths]


def make_teacher(vocab_size: int = V, scale: float = 3.0) -> Callable[[mx.array], mx.array]:
    """Return a teacher that sees the last token only."""
    if vocab_size > V:  # its table would be large: every row is a rotation of one
        row = mx.array(np.random.default_rng(1).normal(0, scale, vocab_size).astype(np.float32))
        places = mx.arange(vocab_size)
        return lambda inputs: row[(places + 7 * inputs[..., None]) % vocab_size]
    table = np.random.default_rng(1).normal(0, scale, (vocab_size, vocab_size))
    weights = mx.array(table.astype(np.float32))
    return lambda inputs: weights[inputs]


class Speaker:
    """A teacher that reads token ids and makes logits of them by a function."""

    def __init__(self, logits_of: Callable[[mx.array], mx.array]):
        self.logits_of = logits_of
        self.most_rows = 0

    def hidden(self, inputs: mx.array) -> mx.array:
        return inputs[..., None]

    def logits(self, hidden: mx.array) -> mx.array:
        assert hidden.ndim == 2
        self.most_rows = max(self.most_rows, len(hidden))
        return self.logits_of(hidden[:, 0])


TEXTS = make_texts(21)
TEACHER = make_teacher()


def write(folder: Path, **options: Any) -> list[int]:
    options = {"k": 8, "texts_per_shard": 5, "batch_size": 2, "header": HEADER, **options}
    texts = options.pop("texts", TEXTS)
    return list(write_cache(folder, Speaker(options.pop("teacher", TEACHER)), texts, **options))


def open_cache(folder: Path) -> TeacherCache:
    return TeacherCache.open(folder, "abc", TEXTS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def oracle(text: Text, k: int, teacher: Callable[[mx.array], mx.array] = TEACHER) -> Any:
    """Return ids, log-probabilities and tail of each learned token, one by one, in float64."""
    for place in np.flatnonzero(text.learned):
        token = text.tokens[place - 1]
        logits = np.array(teacher(mx.array([[token]]))[0, 0]).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        order = np.argsort(-log_probs, kind="stable")
        yield order[:k], log_probs[order[:k]], np.exp(log_probs[order[k:]]).sum()


def at_learned(cache: TeacherCache, rows: list[int]) -> tuple[mx.array, mx.array]:
    return cache.batch(rows, text_batch(TEXTS, rows).mask)


def learned_of(cache: TeacherCache, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return what a cache says of the learned tokens of some texts, as a batch of one."""
    batch = text_batch(TEXTS, rows)
    at = np.array(batch.mask) > 0
    ids, log_probs = (np.array(x)[at][None] for x in cache.batch(rows, batch.mask))
    return ids, log_probs


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit_manifest(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a finished cache of five shards."""
    write(tmp_path / "cache")
    return tmp_path / "cache"


def test_a_cache_holds_what_the_slow_twin_finds(folder: Path) -> None:
    cache = open_cache(folder)
    assert (cache.k, cache.vocab_size) == (8, V)
    assert cache.header["weights_hash"] == "def"
    for row, text in enumerate(TEXTS):
        ids, log_probs = learned_of(cache, [row])
        for t, (expected_ids, expected, tail) in enumerate(oracle(text, 8)):
            np.testing.assert_array_equal(ids[0, t], expected_ids)
            np.testing.assert_allclose(log_probs[0, t], expected, atol=HALF)
            assert np.exp(log_probs[0, t]).sum() + tail == pytest.approx(1, abs=2e-6)


def test_the_tail_on_disk_is_that_of_float32(folder: Path) -> None:
    shard = mx.load(str(folder / "shard-00000.safetensors"))
    assert isinstance(shard, dict)
    dtypes = {name: array.dtype for name, array in shard.items()}
    assert dtypes == {
        "ids": mx.uint16,
        "log_probs": mx.float16,
        "tail": mx.float32,
        "offsets": mx.int64,
    }
    tails = [tail for text in TEXTS[:5] for _, _, tail in oracle(text, 8)]
    np.testing.assert_allclose(np.array(shard["tail"]), tails, rtol=1e-5)
    lengths = [text.num_learned for text in TEXTS[:5]]
    np.testing.assert_array_equal(np.diff(np.array(shard["offsets"])), lengths)


def test_a_tiny_tail_keeps_its_digits() -> None:
    logits = mx.array([[0.0, 1.0, -30.0, -31.0]])
    ids, _, tail = top_tokens(logits, 2)
    assert ids.tolist() == [[1, 0]]
    expected = (math.exp(-30) + math.exp(-31)) / (1 + math.e)
    assert tail.item() == pytest.approx(expected, rel=1e-5)


def test_many_tokens_are_summed_exactly() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 70_000)).astype(np.float32)
    exact = np.exp(logits.astype(np.float64))
    exact = np.sort(exact / exact.sum(axis=-1, keepdims=True))[:, ::-1]
    _, log_probs, tail = map(np.array, top_tokens(mx.array(logits), 64))
    np.testing.assert_allclose(np.exp(log_probs), exact[:, :64], rtol=3e-6)
    np.testing.assert_allclose(tail, exact[:, 64:].sum(axis=-1), rtol=3e-6)


def test_equal_logits_give_different_tokens(tmp_path: Path) -> None:
    write(tmp_path, teacher=lambda inputs: mx.zeros((*inputs.shape, V)), k=64)
    ids, log_probs = learned_of(open_cache(tmp_path), [1])
    assert all(len(set(row)) == 64 for row in ids[0].tolist())
    np.testing.assert_allclose(log_probs, -math.log(V), rtol=1e-6)


@pytest.mark.parametrize("width", [1, 7, 32, 39, 64])
def test_batches_of_every_width(folder: Path, width: int) -> None:
    """Cut or padded, every learned token has what the cache says of it; nothing else has."""
    cache = open_cache(folder)
    rows = [20, 0, 7, 1]
    mask = np.zeros((4, width), np.float32)
    for place, row in enumerate(rows):
        marks = TEXTS[row].learned[1 : width + 1]
        mask[place, : len(marks)] = marks
    ids, log_probs = cache.batch(rows, mx.array(mask))
    assert ids.shape == log_probs.shape == (4, width, 8)
    assert (ids.dtype, log_probs.dtype) == (mx.int32, mx.float32)
    for place, row in enumerate(rows):
        at = np.flatnonzero(mask[place])
        for found, expected in zip((ids, log_probs), learned_of(cache, [row]), strict=True):
            np.testing.assert_array_equal(np.array(found)[place, at], expected[0, : len(at)])
        others = np.flatnonzero(mask[place] == 0)
        assert (np.array(ids)[place, others] == np.arange(8)).all()
        np.testing.assert_allclose(np.array(log_probs)[place, others], -math.log(V), rtol=1e-6)


def test_logits_exist_for_learned_tokens_alone_and_some_at_a_time(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def spoken(tokens: mx.array) -> mx.array:
        asked.append(tokens.size)
        return TEACHER(tokens)

    monkeypatch.setattr(teacher_cache, "CHUNK_BYTES", 4 * V * 3)
    write(tmp_path / "small", teacher=spoken)
    assert max(asked) == 3
    assert sum(asked) == sum(text.num_learned for text in TEXTS)
    assert contents(tmp_path / "small") == contents(folder)


@pytest.mark.parametrize("tail", ["bucket", "teacher", "both"])
def test_padding_has_finite_losses_and_gradients(folder: Path, tail: str) -> None:
    batch = text_batch(TEXTS, [0, 5])
    top = open_cache(folder).batch(batch.rows, batch.mask)
    student = make_teacher(scale=1.0)(batch.inputs)

    def loss(student: mx.array, mask: mx.array) -> mx.array:
        return (response.sparse_kl(normalised(student), *top, tail) * mask).sum()

    for mask in (batch.mask, mx.ones_like(batch.mask)):
        value, gradient = mx.value_and_grad(loss)(student, mask)
        assert mx.isfinite(value).item()
        assert mx.isfinite(gradient).all().item()


@pytest.mark.parametrize(
    ("k", "tail"),
    [
        (V - 1, "bucket"),
        (V, "bucket"),
        (V, "teacher"),
        (V, "both"),
    ],
)
def test_a_cache_of_all_tokens_is_the_teacher(tmp_path: Path, k: int, tail: str) -> None:
    write(tmp_path, k=k)
    batch = text_batch(TEXTS, [3, 1, 9])
    student = make_teacher(scale=1.0)(batch.inputs)
    top = open_cache(tmp_path).batch(batch.rows, batch.mask)
    found = (response.sparse_kl(normalised(student), *top, tail) * batch.mask).sum()
    expected = (response.forward_kl(student, TEACHER(batch.inputs)) * batch.mask).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def test_draws_are_the_distribution_in_expectation() -> None:
    logits = mx.array(np.random.default_rng(3).normal(0, 2, (2, 50)).astype(np.float32))
    probs = np.array(mx.softmax(logits, axis=-1)).astype(np.float64)
    mean, num_keys = np.zeros_like(probs), 2000
    for key in range(num_keys):
        drawn = np.exp(np.array(tail_draws(logits, 8, mx.random.key(key))))
        assert ((drawn > 0).sum(axis=1) <= 8).all()
        np.testing.assert_allclose(drawn.sum(axis=1), 1, rtol=1e-5)
        mean += drawn / num_keys
    top = np.argsort(-probs, axis=1)[:, :4]
    for row in range(2):
        np.testing.assert_allclose(mean[row, top[row]], probs[row, top[row]], rtol=1e-5)
    # A draw carries a quarter of the tail's mass at the most: five standard errors of the mean.
    assert np.abs(mean - probs).max() < 5 * 0.25 * (1 - probs.max()) / num_keys**0.5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", ["noise", "equal", "two"])
def test_draws_where_logits_are_equal(dtype: mx.Dtype, kind: str) -> None:
    """As many tokens as promised, and no mass is left over, however many lie at the border."""
    k, size = 16, 5000
    logits = np.random.default_rng(0).normal(0, 2.5, (32, size)).astype(np.float32)
    if kind != "noise":
        logits[:] = 0 if kind == "equal" else logits > 0
    drawn = tail_draws(mx.array(logits).astype(dtype), k, mx.random.key(1))
    assert (mx.isfinite(drawn).sum(axis=-1) <= k).all().item()
    _, log_probs, tail = top_tokens(drawn, k)
    assert not tail.any().item()
    np.testing.assert_allclose(np.exp(np.array(log_probs)).sum(axis=-1), 1, rtol=1e-5)


def test_a_cache_of_draws_is_repeatable_and_has_no_tail(tmp_path: Path, folder: Path) -> None:
    for name in ("one", "other"):
        write(tmp_path / name, tail="draws")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    cache = open_cache(tmp_path / "one")
    _, log_probs = learned_of(cache, [1])
    np.testing.assert_allclose(np.exp(np.array(log_probs)).sum(axis=-1), 1, atol=1e-5)
    with pytest.raises(InputError, match="tail"):
        write(folder, tail="draws")


@pytest.mark.parametrize("k", [1, V])
def test_draws_need_a_tail(tmp_path: Path, k: int) -> None:
    with pytest.raises(
        InputError, match=f"draws need at least 2 tokens and fewer than all, got {k}"
    ):
        write(tmp_path, k=k, tail="draws")
    with pytest.raises(InputError, match="tail must be bucket or draws, got none"):
        write(tmp_path, tail="none")


def test_k_is_at_most_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, k=1000)
    cache = open_cache(tmp_path)
    assert cache.k == V
    shard = mx.load(str(tmp_path / "shard-00000.safetensors"))
    assert isinstance(shard, dict)
    assert not shard["tail"].any().item()
    _, log_probs = learned_of(cache, [1])
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1, atol=1e-6)


def test_progress_counts_texts(tmp_path: Path) -> None:
    assert write(tmp_path) == [2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19, 20, 21]
    assert write(tmp_path) == []


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


def test_an_unread_shard_is_not_hashed(folder: Path) -> None:
    flip_last_byte(folder / "shard-00003.safetensors")
    cache = open_cache(folder)
    at_learned(cache, [0, 5, 20])
    assert write(folder, verify=False) == []
    with pytest.raises(InputError, match="its content has changed"):
        at_learned(cache, [15])


def test_few_shards_stay_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, mapped = [], []
    sha256, map_arrays = cache_files.sha256, cache_files.map_arrays

    def hashing(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    def mapping(path: Path, arrays: Any) -> Any:
        mapped.append(path.name)
        return map_arrays(path, arrays)

    monkeypatch.setattr(teacher_cache, "MAX_LOADED", 2)
    monkeypatch.setattr(cache_files, "sha256", hashing)
    monkeypatch.setattr(teacher_cache, "map_arrays", mapping)
    cache = open_cache(folder)
    first = at_learned(cache, [0])
    at_learned(cache, [5, 0, 10, 0, 5])
    again = at_learned(cache, [0])
    assert all(mx.array_equal(*pair).item() for pair in zip(first, again, strict=True))
    assert [int(name[6:11]) for name in mapped] == [0, 1, 2, 1]
    assert [int(name[6:11]) for name in hashed] == [0, 1, 2]


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


@pytest.mark.parametrize("name", ["k", "texts_per_shard", "batch_size"])
def test_sizes_are_positive(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        write(tmp_path, **{name: 0})


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="logits are not numbers in text 0"):
        write(tmp_path, teacher=lambda inputs: mx.full((*inputs.shape, V), mx.nan))
    with pytest.raises(ValueError, match="vocab_size is 300, the logits' 5"):
        write(tmp_path, teacher=lambda inputs: mx.zeros((*inputs.shape, 5)))


@pytest.mark.parametrize(("vocab_size", "most"), [(V, 262), (70_000, 390)])
def test_bytes_per_token(tmp_path: Path, vocab_size: int, most: int) -> None:
    texts = make_texts(12, vocab_size=vocab_size)
    texts += [Text(list(range(200))) for _ in range(2)]
    teacher = make_teacher(vocab_size)
    header = {**HEADER, "vocab_size": vocab_size}
    write(tmp_path, texts=texts, teacher=teacher, header=header, k=64, texts_per_shard=256)
    cache = TeacherCache.open(tmp_path, "abc", texts)
    size = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    per_token = size / sum(text.num_learned for text in texts)
    assert cache.bytes_per_token == per_token
    assert per_token <= most <= 400
    batch = text_batch(texts, [2])
    ids, log_probs = map(np.array, cache.batch([2], batch.mask))
    at = np.flatnonzero(batch.mask[0])
    for t, (expected_ids, expected, tail) in enumerate(oracle(texts[2], 64, teacher)):
        np.testing.assert_array_equal(ids[0, at[t]], expected_ids)
        np.testing.assert_allclose(log_probs[0, at[t]], expected, atol=HALF)
        assert np.exp(log_probs[0, at[t]]).sum() + tail == pytest.approx(1, abs=2e-6)
