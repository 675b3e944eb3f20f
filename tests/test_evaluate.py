"""Figures of an evaluation against slow twins and known cases."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from evaluating import BUNDLED, texts_of, tiny_folder
from mlx import nn
from mlx_lm.models import llama
from tiny_models import tiny_config, tiny_model

from mlx_distill import InputError
from mlx_distill.arrays import num_parameters
from mlx_distill.checkpoint import load
from mlx_distill.data.texts import Text
from mlx_distill.evaluation import metrics, texts
from mlx_distill.evaluation.models import Loaded
from mlx_distill.evaluation.speed import decoding_speeds
from mlx_distill.evaluation.texts import evaluate, vocabulary_widths


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def slow_figures(
    models: dict[str, nn.Module], texts: list[Text], teacher: str | None
) -> dict[str, dict[str, float]]:
    """Return every model's figures in float64, token by token, without batches or sums per text."""

    def log_probs(model: nn.Module, text: Text) -> np.ndarray:
        logits = np.array(model(mx.array([text.tokens[:-1]]))[0]).astype(np.float64)
        largest = logits.max(axis=-1, keepdims=True)
        return logits - largest - np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))

    found = {}
    for name, model in models.items():
        nats, confidences, rights, divergences, agreements = [], [], [], [], []
        for text in texts:
            mine = log_probs(model, text)
            other = log_probs(models[teacher], text) if teacher else mine
            for place in np.flatnonzero(text.learned).tolist():
                p, q = other[place - 1], mine[place - 1]
                nats.append(-q[text.tokens[place]])
                confidences.append(math.exp(q.max()))
                rights.append(int(q.argmax()) == text.tokens[place])
                divergences.append(float(sum(np.exp(p) * (p - q))))
                agreements.append(p.argmax() == q.argmax())
        error = 0.0
        for number in range(15):
            inside = [
                (c, r)
                for c, r in zip(confidences, rights, strict=True)
                if number / 15 < c <= (number + 1) / 15
            ]
            if inside:
                confidence, right = np.mean(inside, axis=0)
                error += len(inside) / len(nats) * abs(confidence - right)
        found[name] = {
            "nats_per_token": np.mean(nats),
            "perplexity": math.exp(np.mean(nats)),
            "calibration_error": error,
        }
        if teacher and name != teacher:
            found[name] |= {"kl": np.mean(divergences), "agreement": np.mean(agreements)}
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_figures_equal_the_slow_twins(batch_size: int) -> None:
    models = {name: tiny_model("llama", seed) for seed, name in enumerate(("t", "a", "b"))}
    texts = texts_of(7)
    sums = evaluate(models, texts, "t", batch_size)
    rows = metrics.report(sums, "t", num_samples=10)
    for name, expected in slow_figures(models, texts, "t").items():
        found = {key: rows[name][key]["value"] for key in expected}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), name
        assert ("kl" in rows[name]) == (name != "t")
        assert rows[name]["tokens"] == sum(text.num_learned for text in texts)
        assert sums[name]["tokens"].tolist() == [text.num_learned for text in texts]
        assert all(values.dtype == np.float64 for values in sums[name].values())


def test_calibration_of_a_known_case() -> None:
    """Four predictions at confidence 0.95, three right; two at 0.5, one right; one at 1."""
    scores = {
        "confidence": np.array([0.95] * 4 + [0.5] * 2 + [1.0]),
        "right": np.array([1, 1, 1, 0, 1, 0, 1], bool),
        "nats": np.zeros(7),
    }
    sums = metrics.text_sums(scores)
    # 0.95 and 1 share the last bin: |4.8 - 4|; the other is right.
    assert metrics.figures(sums)["calibration_error"] == pytest.approx(0.8 / 7)
    assert sums["bin_right"].sum() == 5
    assert sums["bin_confidence"][7] == pytest.approx(1.0)


def test_a_model_is_itself() -> None:
    model = tiny_model("llama")
    rows = metrics.report(evaluate({"t": model, "s": model}, texts_of(5), "t"), "t")
    assert rows["s"]["kl"] == {"value": 0, "interval": [0, 0]}
    assert rows["s"]["agreement"] == {"value": 1, "interval": [1, 1]}
    assert rows["s"]["perplexity"] == rows["t"]["perplexity"]


def test_divergence_where_a_network_bars_tokens() -> None:
    teacher = mx.array([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    student = mx.array([[0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf]])
    kl = metrics.token_scores(student, mx.array([0, 0]), teacher)["kl"]
    assert kl.tolist() == [0, math.inf]


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    logits = mx.random.normal((6, 11), key=mx.random.key(0))
    teacher = mx.random.normal((6, 11), key=mx.random.key(1))
    labels = mx.arange(6)
    one = metrics.token_scores(logits, labels, teacher)
    other = metrics.token_scores(logits + 5, labels, teacher - 3)
    for name, values in one.items():
        np.testing.assert_allclose(np.array(values), np.array(other[name]), atol=1e-5)


def test_only_learned_tokens_count() -> None:
    """Of every turn of a chat, and whatever stands between."""
    model = tiny_model("llama")
    tokens = np.random.default_rng(0).integers(97, size=14).tolist()
    marks = [place in (3, 4, 9, 13) for place in range(14)]
    sums = evaluate({"m": model}, [Text(tokens, marks), Text(tokens)])["m"]
    assert sums["tokens"].tolist() == [4, 13]
    scores = metrics.token_scores(model(mx.array([tokens[:-1]]))[0], mx.array(tokens[1:]))
    nats = np.array(scores["nats"])
    expected = [nats[[2, 3, 8, 12]].sum(), nats.sum()]
    np.testing.assert_allclose(sums["nats"], expected, rtol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 97 * 5])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    models = {name: tiny_model("llama", seed) for seed, name in enumerate("ts")}
    whole = evaluate(models, texts_of(7), "t", 3)
    monkeypatch.setattr(texts, "CHUNK_BYTES", chunk_bytes)
    parts = evaluate(models, texts_of(7), "t", 3)
    for name, sums in whole.items():
        for key, values in sums.items():
            np.testing.assert_allclose(parts[name][key], values, rtol=1e-5, err_msg=key)


def test_logits_exist_for_some_rows_at_a_time() -> None:
    """All of a batch's would take 740 MB; 70,000 tokens are more than 16 bits count."""
    config = tiny_config("llama") | {"vocab_size": 70_000, "tie_word_embeddings": True}
    models: dict[str, nn.Module] = {}
    for seed, name in enumerate("ts"):
        mx.random.seed(seed)
        models[name] = llama.Model(llama.ModelArgs.from_dict(config))
        mx.eval(models[name].parameters())
    many = [Text([69_999, *range(160)]) for _ in range(2)]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sums = evaluate(models, many, "t")
    assert mx.get_peak_memory() - before < 300e6
    assert sums["s"]["tokens"].tolist() == [160] * 2


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_scores_of_half_precision_are_float32(dtype: mx.Dtype) -> None:
    logits = mx.random.normal((5, 11), key=mx.random.key(0)).astype(dtype)
    found = metrics.token_scores(logits, mx.arange(5), 2 * logits)
    wide = logits.astype(mx.float32)
    expected = metrics.token_scores(wide, mx.arange(5), 2 * wide)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_allclose(np.array(found[name]), np.array(values), rtol=1e-6)


def test_places_without_a_label_disturb_nothing() -> None:
    logits = mx.random.normal((3, 11), key=mx.random.key(0))
    found = metrics.token_scores(logits, mx.array([4, -100, 4]))
    expected = metrics.token_scores(logits[::2], mx.array([4, 4]))
    assert found["nats"][::2].tolist() == expected["nats"].tolist()
    assert not found["right"][1].item()
    with pytest.raises(InputError, match="the texts hold token -100"):
        evaluate({"m": tiny_model("llama")}, [Text([1, -100])])


def test_a_teacher_of_another_width_is_cut() -> None:
    logits = mx.random.normal((3, 11), key=mx.random.key(0))
    teacher = mx.random.normal((3, 13), key=mx.random.key(1))
    labels = mx.arange(3)
    for one, other in ((logits, teacher), (teacher, logits)):
        found = metrics.token_scores(one, labels, other)
        expected = metrics.token_scores(one[:, :11], labels, other[:, :11])
        assert found["kl"].tolist() == expected["kl"].tolist()
        assert found["agree"].tolist() == expected["agree"].tolist()
        assert found["nats"].tolist() == metrics.token_scores(one, labels)["nats"].tolist()


# -------------------------------------------------------------------------------------- the rest


def test_vocabularies_of_different_widths_are_cut(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = load(tiny_folder(tmp_path / "wide", 0, 4128))[0]
    a, b = (load(folders[name])[0] for name in "ab")
    texts = texts_of(3, vocab_size=4096)
    assert vocabulary_widths({"a": a, "wide": wide}) == {"a": 4096, "wide": 4128}
    expected = evaluate({"t": b, "s": a}, texts, "t")["s"]
    found = evaluate({"t": b, "s": wide}, texts, "t")["s"]
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-5)
    assert not np.allclose(evaluate({"s": wide}, texts)["s"]["nats"], expected["nats"])


def test_logits_that_are_not_numbers_name_their_model() -> None:
    good: Any = tiny_model("llama")
    bad: Any = tiny_model("llama", 1)
    bad.model.norm.weight = mx.full((64,), math.nan)
    with pytest.raises(InputError, match="the logits of broken are not numbers"):
        evaluate({"fine": good, "broken": bad}, texts_of(2), "fine")


@pytest.mark.parametrize("token", [0, 50, 96])
def test_one_logit_that_is_not_a_number_is_seen(token: int) -> None:
    logits = np.zeros((1, 97), np.float32)
    logits[0, token] = math.nan
    scores = metrics.token_scores(mx.array(logits), mx.array([1]))
    assert np.isnan(np.array(scores["nats"])).all()


def test_unknown_tokens_and_teachers_are_refused() -> None:
    models = {"m": tiny_model("llama")}
    with pytest.raises(InputError, match="the texts hold token 97, a model's vocabulary ends at 9"):
        evaluate(models, [Text([1, 97])])
    with pytest.raises(InputError, match="teacher must be one of m, got t"):
        evaluate(models, [Text([1, 2])], "t")


def test_parameters_of_a_quantised_model() -> None:
    model = tiny_model("llama")
    count = num_parameters(model)
    embedding, head, layers = (
        97 * 64,
        97 * 64,
        3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64),
    )
    assert count == embedding + head + layers + 64
    for bits in (3, 4, 8):
        quantised = tiny_model("llama")
        nn.quantize(quantised, group_size=32, bits=bits)
        assert num_parameters(quantised) == count


def test_texts_do_not_end_while_speed_is_measured() -> None:
    model: Any
    model, tokenizer = load(BUNDLED)
    ends = set(tokenizer.eos_token_ids)
    model.lm_head = lambda x: mx.where(mx.arange(4096) == 2, 1.0, mx.zeros((*x.shape[:-1], 4096)))
    model.args.tie_word_embeddings = False
    one = Loaded(model, tokenizer, str(BUNDLED))
    assert 0 < decoding_speeds({"m": one}, {"m": [1, 5]}, 8)["m"] < 1e6
    assert tokenizer.eos_token_ids == ends
    with pytest.raises(InputError, match="beyond the context of m, 512"):
        decoding_speeds({"m": one}, {"m": [1, 5]}, 511)
