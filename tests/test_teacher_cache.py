"""A teacher's distributions on disk, against a slow twin; resuming, refusals, damage, size."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from caches import (
    HALF,
    HEADER,
    TEACHER,
    TEXTS,
    V,
    at_learned,
    contents,
    flip_last_byte,
    learned_of,
    make_teacher,
    make_texts,
    open_cache,
    oracle,
    write,
)

from mlx_distill.arrays import log_probs as normalised
from mlx_distill.data import cache_files, teacher_cache
from mlx_distill.data.teacher_cache import TeacherCache, tail_draws, top_tokens
from mlx_distill.data.texts import Text, text_batch
from mlx_distill.errors import InputError
from mlx_distill.losses import response


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
    texts.append(Text(list(range(200))))
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
