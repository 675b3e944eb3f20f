"""Teachers of a distillation: several, a cache, one of another tokenizer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from distillers import HALF, TEXTS, V, assert_close, make, make_texts, run, small, value_and_grads
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_distill import InputError
from mlx_distill.arrays import log_probs
from mlx_distill.checkpoint import bundled
from mlx_distill.data.teacher_cache import TeacherCache, write_cache
from mlx_distill.data.texts import Text, text_batch
from mlx_distill.distillation import distiller as module
from mlx_distill.distillation.teachers import (
    CachedTeacher,
    LiveTeacher,
    RetokenizedTeacher,
    mean_logits,
)
from mlx_distill.losses import response

# --------------------------------------------------------------------------------------- ensembles


def probs_of(logits: Any) -> np.ndarray:
    values = np.exp(np.array(logits).astype(np.float64))
    return values / values.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0), (1.0, 2.0, 5.0)])
@pytest.mark.parametrize("mean", ["probs", "logits"])
def test_mean_of_several_teachers(mean: str, weights: Sequence[float] | None) -> None:
    networks = [tiny_model("llama", seed=seed) for seed in range(3)]
    batch = text_batch(TEXTS, [0, 1])
    teacher = LiveTeacher(networks, True, weights, mean)
    lesson = teacher.lesson(batch, [1])
    goal = lesson.spell(*lesson.rows).logits
    assert goal is not None
    shares = np.array(weights or (1.0, 1.0, 1.0)) / sum(weights or (1.0, 1.0, 1.0))
    every = [network(batch.inputs) for network in networks]
    if mean == "probs":
        expected = sum(w * probs_of(one) for w, one in zip(shares, every, strict=True))
    else:
        mixed = sum(w * np.array(one) for w, one in zip(shares, every, strict=True))
        expected = probs_of(mixed)
    np.testing.assert_allclose(probs_of(goal), expected, atol=1e-6)
    _, features = module.Answers(networks[0], True).read(batch.inputs, [1])
    assert mx.array_equal(lesson.features[1], features[1]).item()


def test_mean_of_heads_of_other_widths() -> None:
    found = mean_logits([mx.zeros((2, 5)), mx.ones((2, 7))], [0.5, 0.5], "logits")
    assert found.shape == (2, 5)
    np.testing.assert_allclose(probs_of(found), 0.2)


def test_ensemble_teaches(tmp_path: Path) -> None:
    """A student of the mean itself has nothing to learn; weights and mean reach the teacher."""
    teachers = [tiny_model("llama"), tiny_model("llama", seed=1)]
    losses = ["forward_kl"]
    one = run(tmp_path / "1", tiny_model("llama"), teachers, losses=losses, weights=[1.0, 1e-9])
    assert abs(one.log[0]["loss"]) < 1e-5
    both = run(tmp_path / "2", tiny_model("llama"), teachers, losses=losses)
    other = run(tmp_path / "3", tiny_model("llama"), teachers, losses=losses, mean="logits")
    assert both.log[0]["loss"] > 0.1
    assert other.log[0]["loss"] != pytest.approx(both.log[0]["loss"], rel=1e-3)


# ------------------------------------------------------------------------------ the teacher's cache


def make_cache(folder: Path, teacher: Any, texts: Sequence[Text], k: int) -> CachedTeacher:
    size = teacher(mx.array([[1]])).shape[-1]
    header = {"tokenizer_hash": "abc", "weights_hash": "def", "vocab_size": size}
    list(write_cache(folder, module.Answers(teacher, True), texts, header, k, texts_per_shard=5))
    return CachedTeacher(TeacherCache.open(folder, "abc", texts))


def test_cached_teacher_teaches_as_the_live_one(tmp_path: Path) -> None:
    """All tokens are kept, in half precision."""
    teacher = tiny_model("llama")
    cached = make_cache(tmp_path / "cache", teacher, TEXTS, V)
    live = run(tmp_path / "live", small(), teacher, losses=["forward_kl"])
    found = run(tmp_path / "cached", small(), cached, losses=["sparse_kl"])
    for ours, theirs in zip(found.log, live.log, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
        assert ours["count"] == theirs["count"]


def test_cached_teacher_of_some_tokens_against_the_live_one(tmp_path: Path) -> None:
    teacher = tiny_model("llama")
    cached = make_cache(tmp_path / "cache", teacher, TEXTS, 8)
    batch = text_batch(TEXTS, [7, 0, 2])
    live = make(["sparse_kl:k=8"], batch, small(), LiveTeacher([teacher]))
    ours = make(["sparse_kl"], batch, small(), cached)
    total, count, grads = value_and_grads(live, batch)
    found, same, others = value_and_grads(ours, batch)
    assert same == count
    assert found == pytest.approx(total, rel=5e-3)
    assert_close(others, grads, 2e-2)


def test_cache_judges_nothing_but_its_own_texts(tmp_path: Path) -> None:
    cached = make_cache(tmp_path / "cache", tiny_model("llama"), TEXTS[:6], 8)
    held_out = make_texts(20, seed=9)  # more than the cache has rows
    done = run(tmp_path, small(), cached, TEXTS[:6], losses=["sparse_kl"], valid=held_out)
    assert set(done.log[-1]["held_out"]) == {"nats", "perplexity"}
    judge = LiveTeacher([tiny_model("llama")])
    options = {"losses": ["sparse_kl"], "valid": held_out, "valid_teacher": judge}
    done = run(tmp_path / "judged", small(), cached, TEXTS[:6], **options)
    assert set(done.log[-1]["held_out"]) == {"nats", "kl", "agreement", "perplexity"}


def test_cache_cannot_give_all_logits(tmp_path: Path) -> None:
    cached = make_cache(tmp_path / "cache", tiny_model("llama"), TEXTS, 8)
    sentence = "forward_kl needs all of the teacher's logits, and a cache has the top ones; use spa"
    with pytest.raises(InputError, match=sentence):
        run(tmp_path / "1", small(), cached)
    with pytest.raises(InputError, match="hidden_mse compares features, so it needs a live"):
        run(tmp_path / "2", small(), cached, losses=["sparse_kl", "hidden_mse"])
    with pytest.raises(InputError, match="a cache holds no features; losses on features need a"):
        cached.lesson(text_batch(TEXTS, [0]), [1])
    with pytest.raises(InputError, match="a cache does not know what the student will write"):
        run(tmp_path / "3", small(), cached, losses=["sparse_kl"], on_policy=HALF)
    assert not list(tmp_path.glob("*/step-*"))


def test_cache_of_a_wider_teacher(tmp_path: Path) -> None:
    teacher = small(vocab_size=V + 31, seed=1)
    cached = make_cache(tmp_path / "cache", teacher, TEXTS, 64)
    done = run(tmp_path, small(), cached, losses=["sparse_kl"])
    assert all(math.isfinite(row["loss"]) for row in done.log)


# --------------------------------------------------------------------------- another tokenizer


@pytest.fixture(scope="module")
def ours() -> Any:
    return mlx_lm.utils.load_tokenizer(bundled("stories-14m"))


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Return a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", add_bos_token=False
    )
    return TokenizerWrapper(fast)


STORY = "Once upon a time there was a red kite."


def told(tokenizer: Any, prompt: str, answer: str, ends: bool = True) -> Text:
    asked = tokenizer.encode(prompt)
    answered = tokenizer.encode(answer, add_special_tokens=False)
    return Text.behind([*asked, *answered, *([tokenizer.eos_token_id] * ends)], len(asked))


def begins(tokenizer: Any, tokens: list[int]) -> dict[int, int]:
    """Return which token begins at each character, found by decoding all that is before it."""
    decoded = [tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(len(tokens))]
    return {len(text): n for n, text in enumerate(decoded) if not text.endswith("\ufffd")}


def test_other_tokenizers_tokens_are_aligned(ours: Any, theirs: Any) -> None:
    """A learned token meets what the teacher says where a token of its own begins, too."""
    network = small(vocab_size=258, seed=1)
    texts = [told(ours, "Once upon a time", " there was a dog."), told(ours, "Hi", " Lily!")]
    batch = text_batch(texts, [0, 1])
    hidden, known = RetokenizedTeacher(network, ours, theirs).lesson(batch).rows
    for row, story in enumerate(("Once upon a time there was a dog.", "Hi Lily!")):
        own = [*theirs.encode(story), theirs.eos_token_id]
        expected = module.Answers(network, True).hidden(mx.array([own]))[0]
        there = begins(theirs, own)
        places = {n - 1: there[at] - 1 for at, n in begins(ours, texts[row].tokens).items()}
        learned = np.flatnonzero(np.array(batch.mask[row])).tolist()
        assert known[row].sum().item() == len(learned) >= 3
        for place in learned:
            assert known[row, place].item() == 1
            np.testing.assert_allclose(hidden[row, place], expected[places[place]], atol=1e-5)


def test_other_tokenizer_without_a_beginning_says_nothing_of_the_first_token(
    ours: Any, theirs: Any
) -> None:
    """The student predicts the first word from its beginning-of-text token; bytes have none."""
    assert theirs.encode("") == []
    text = told(ours, "", STORY)
    assert text.tokens[0] == ours.bos_token_id
    teacher = RetokenizedTeacher(small(vocab_size=258, seed=1), ours, theirs)
    known = teacher.lesson(text_batch([text], [0])).rows[1]
    assert known[0, 0].item() == 0
    assert known[0, 1 : text.num_learned].tolist() == [1.0] * (text.num_learned - 1)
    assert not known[0, text.num_learned :].any().item()


def test_teacher_of_fewer_tokens_says_nothing_within_them(ours: Any, theirs: Any) -> None:
    """The student reads bytes, the teacher words."""
    text = Text([0, *theirs.encode(STORY), 1])
    batch = text_batch([text], [0])
    teacher = small(vocab_size=4096, seed=1)
    known = RetokenizedTeacher(teacher, theirs, ours).lesson(batch).rows[1]
    own = [*ours.encode(STORY), ours.eos_token_id]
    there = set(begins(ours, own)) & set(begins(theirs, text.tokens))
    assert len(there) < len(STORY) // 2
    assert known.sum().item() == len(there)


def test_sorted_distributions_are_learned_from_another_tokenizer(
    ours: Any, theirs: Any, tmp_path: Path
) -> None:
    student, network = small(vocab_size=4096), small(vocab_size=258, seed=1)
    stories = (STORY, "Ben had a dog.", "Lily saw a big cat in the park and ran.")
    texts = [told(ours, "", story) for story in stories]
    teacher = RetokenizedTeacher(network, ours, theirs)
    done = run(
        tmp_path,
        student,
        teacher,
        texts,
        losses=["sorted_l1", "hard:weight=0.1"],
        valid=texts,
        training={"steps": 6, "checkpoint_every": 6},
    )
    losses = [row["sorted_l1"] for row in done.log]
    assert all(0 <= loss <= 2 for loss in losses)
    assert set(done.log[-1]["held_out"]) == {"nats", "perplexity"}
    # Against the loss by hand, of the first text.
    batch = text_batch(texts, [0])
    made = make(["sorted_l1"], batch, small(vocab_size=4096), teacher)
    _, _, parts = made.loss(made.teach(batch))
    own = [*theirs.encode(STORY), theirs.eos_token_id]
    ours_at = made.network.student(batch.inputs)[0]
    theirs_at = network(mx.array([own]))[0]
    there = begins(theirs, own)
    pairs = [(n - 1, there[at] - 1) for at, n in begins(ours, texts[0].tokens).items() if at]
    expected = sum(
        response.sorted_l1(log_probs(ours_at[p]), log_probs(theirs_at[q])).item() for p, q in pairs
    )
    count = len(texts[0].tokens) - 1
    assert parts["sorted_l1"].item() == pytest.approx(expected / count, rel=1e-4)
    with pytest.raises(InputError, match="features of another tokenizer's tokens cannot be"):
        teacher.lesson(batch, [0])
