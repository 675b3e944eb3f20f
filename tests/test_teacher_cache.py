"""A teacher's distributions on disk, against a slow twin; resuming, refusals, damage, size."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.data import teacher_cache
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


TEXTS = make_texts(21)
TEACHER = make_teacher()


def write(folder: Path, **options: Any) -> list[int]:
    options = {"k": 8, "texts_per_shard": 5, "batch_size": 2, "header": HEADER, **options}
    texts = options.pop("texts", TEXTS)
    return list(write_cache(folder, options.pop("teacher", TEACHER), texts, **options))


def open_cache(folder: Path) -> TeacherCache:
    return TeacherCache.open(folder, "abc", TEXTS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def oracle(text: Text, k: int, teacher: Callable[[mx.array], mx.array] = TEACHER) -> Any:
    """Return ids, log-probabilities and tail of each position, one by one, in float64."""
    for token in text.tokens[:-1]:
        logits = np.array(teacher(mx.array([[token]]))[0, 0]).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        order = np.argsort(-log_probs, kind="stable")
        yield order[:k], log_probs[order[:k]], np.exp(log_probs[order[k:]]).sum()


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
        ids, log_probs = map(np.array, cache.batch([row], len(text.tokens) - 1))
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
    lengths = [len(text.tokens) - 1 for text in TEXTS[:5]]
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
    ids, log_probs = map(np.array, open_cache(tmp_path).batch([1], 39))
    assert all(len(set(row)) == 64 for row in ids[0].tolist())
    np.testing.assert_allclose(log_probs, -math.log(V), rtol=1e-6)


@pytest.mark.parametrize("width", [1, 7, 32, 39, 64])
def test_batches_of_every_width(folder: Path, width: int) -> None:
    cache = open_cache(folder)
    rows = [20, 0, 7, 1]
    ids, log_probs = cache.batch(rows, width)
    assert ids.shape == log_probs.shape == (4, width, 8)
    assert (ids.dtype, log_probs.dtype) == (mx.int32, mx.float32)
    for place, row in enumerate(rows):
        num_positions = len(TEXTS[row].tokens) - 1
        alone = cache.batch([row], num_positions)
        known = min(width, num_positions)
        for found, expected in zip((ids, log_probs), alone, strict=True):
            assert mx.array_equal(found[place, :known], expected[0, :known])
        assert (ids[place, known:] == mx.arange(8)).all().item()
        assert mx.allclose(log_probs[place, known:], mx.array(-math.log(V))).item()


@pytest.mark.parametrize("tail", ["bucket", "teacher", "both"])
def test_padding_has_finite_losses_and_gradients(folder: Path, tail: str) -> None:
    batch = text_batch(TEXTS, [0, 5])
    top = open_cache(folder).batch(batch.rows, batch.inputs.shape[1])
    student = make_teacher(scale=1.0)(batch.inputs)

    def loss(student: mx.array, mask: mx.array) -> mx.array:
        return response.sparse_kl(student, *top, mask, tail)[0]

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
    top = open_cache(tmp_path).batch(batch.rows, batch.inputs.shape[1])
    found, count = response.sparse_kl(student, *top, batch.mask, tail)
    expected, _ = response.forward_kl(student, TEACHER(batch.inputs), batch.mask)
    assert (found / count).item() == pytest.approx((expected / count).item(), rel=1e-3)


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


def test_a_cache_of_draws_is_repeatable_and_has_no_tail(tmp_path: Path, folder: Path) -> None:
    for name in ("one", "other"):
        write(tmp_path / name, tail="draws")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    cache = open_cache(tmp_path / "one")
    _, log_probs = cache.batch([1], 39)
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
    _, log_probs = cache.batch([1], 39)
    assert mx.allclose(mx.exp(log_probs).sum(axis=-1), mx.array(1.0), atol=1e-6).item()


def test_progress_counts_texts(tmp_path: Path) -> None:
    assert write(tmp_path) == [2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19, 20, 21]
    assert write(tmp_path) == []


@pytest.mark.parametrize("batches", [1, 4, 6, 12])
def test_going_on_equals_never_stopping(tmp_path: Path, folder: Path, batches: int) -> None:
    stopped = tmp_path / "stopped"
    run = write_cache(stopped, TEACHER, TEXTS, HEADER, 8, 5, 2)
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
        open_cache(folder).batch([0, 16], 32)
    assert write(folder) == [18, 20, 21]
    assert contents(folder) == whole
    changed = {name for name, time in times(folder).items() if time != before[name]}
    assert changed == {"shard-00003.safetensors"}
    assert open_cache(folder).batch([16], 32)[0].shape == (1, 32, 8)


def test_an_unread_shard_is_not_hashed(folder: Path) -> None:
    flip_last_byte(folder / "shard-00003.safetensors")
    cache = open_cache(folder)
    cache.batch([0, 5, 20], 32)
    assert write(folder, verify=False) == []
    with pytest.raises(InputError, match="its content has changed"):
        cache.batch([15], 32)


def test_few_shards_stay_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, mapped = [], []
    sha256, map_arrays = teacher_cache._sha256, teacher_cache._map_arrays
    monkeypatch.setattr(teacher_cache, "MAX_LOADED", 2)
    monkeypatch.setattr(
        teacher_cache, "_sha256", lambda path: (hashed.append(path.name), sha256(path))[1]
    )
    monkeypatch.setattr(
        teacher_cache, "_map_arrays", lambda path: (mapped.append(path.name), map_arrays(path))[1]
    )
    cache = open_cache(folder)
    first = cache.batch([0], 8)
    cache.batch([5, 0, 10, 0, 5], 8)
    again = cache.batch([0], 8)
    assert all(mx.array_equal(*pair).item() for pair in zip(first, again, strict=True))
    assert [int(name[6:11]) for name in mapped] == [0, 1, 2, 1]
    assert [int(name[6:11]) for name in hashed] == [0, 1, 2]
    assert len(cache._loaded) == 2


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
    edit_manifest(folder, format_version=2)
    for action in (open_cache, write):
        with pytest.raises(InputError, match="has format version 2, expected 1"):
            action(folder)


@pytest.mark.parametrize(
    "fields", [{"k": "many"}, {"shards": 3}, {"shards": [{"name": "x"}]}, {"texts_per_shard": 0}]
)
def test_a_damaged_manifest_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    edit_manifest(folder, **fields)
    with pytest.raises(InputError, match=r"manifest.json is damaged; remove the folder"):
        open_cache(folder)


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
    per_token = size / sum(len(text.tokens) - 1 for text in texts)
    assert cache.bytes_per_token == per_token
    assert per_token <= most <= 400
    ids, log_probs = map(np.array, cache.batch([2], len(texts[2].tokens) - 1))
    for t, (expected_ids, expected, tail) in enumerate(oracle(texts[2], 64, teacher)):
        np.testing.assert_array_equal(ids[0, t], expected_ids)
        np.testing.assert_allclose(log_probs[0, t], expected, atol=HALF)
        assert np.exp(log_probs[0, t]).sum() + tail == pytest.approx(1, abs=2e-6)
