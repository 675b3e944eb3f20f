"""Evaluation: figures against slow twins, known cases, and the command from end to end."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tiny_models import tiny_config, tiny_model

from mlx_distill import InputError, evaluate
from mlx_distill.checkpoint import bundled, load
from mlx_distill.data.texts import Text
from mlx_distill.evaluation import metrics
from mlx_distill.speculation.generation import generate

BUNDLED = bundled("stories-14m")
STORIES = [
    "Once upon a time there was a little girl who had a red ball.",
    "Tom and his dog went to the park. They saw a big tree.",
    "The sun was hot, so Lily drank water.",
    "One day a cat found a hat. The cat put on the hat and went to see its friend, the frog.",
]


def texts_of(num_texts: int, seed: int = 0, vocab_size: int = 97) -> list[Text]:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 20, size=num_texts)
    return [
        Text.behind(random.integers(vocab_size, size=length).tolist(), 1 + number % 2)
        for number, length in enumerate(lengths)
    ]


def tiny_folder(where: Path, seed: int, vocab_size: int = 4096) -> Path:
    """Write a tiny model with the bundled tokenizer; the first rows depend on the seed alone."""
    where.mkdir()
    config = tiny_config("llama") | {"vocab_size": vocab_size}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.random.seed(seed)
    weights: dict[str, Any] = {}
    for name, value in tree_flatten(model.parameters()):
        assert isinstance(value, mx.array)
        weights[name] = 0.2 * mx.random.normal(value.shape) if value.ndim > 1 else value
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = mx.random.normal((5000, 64), key=mx.random.key(seed))
        weights[name] = 0.2 * rows[:vocab_size]
    mx.save_safetensors(str(where / "model.safetensors"), weights, {"format": "mlx"})
    (where / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, where / file)
    return where


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(where / name, seed) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "valid.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    return path


def run(*arguments: Any) -> int:
    return evaluate.main([str(argument) for argument in arguments])


# --------------------------------------------------------------------------------------- figures


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
    sums = evaluate.evaluate(models, texts, "t", batch_size)
    rows = evaluate.report(sums, "t", num_samples=10)
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
    rows = evaluate.report(evaluate.evaluate({"t": model, "s": model}, texts_of(5), "t"), "t")
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


# ------------------------------------------------------------------------------------- intervals


def sums_of(nats: np.ndarray, tokens: int = 1) -> metrics.Sums:
    """Return the sums of texts whose tokens all have the same negative log-probability."""
    return {
        "tokens": np.full(len(nats), float(tokens)),
        "nats": nats * tokens,
        "bin_confidence": np.zeros((len(nats), 15)),
        "bin_right": np.zeros((len(nats), 15)),
    }


def test_intervals_repeat_with_their_seed_and_hold_the_figure() -> None:
    sums = {"m": sums_of(np.random.default_rng(0).normal(3, 1, 40))}
    one, same, other = (evaluate.report(sums, seed=seed)["m"] for seed in (1, 1, 2))
    assert one == same
    assert one["nats_per_token"]["interval"] != other["nats_per_token"]["interval"]
    for key in ("nats_per_token", "perplexity"):
        low, high = one[key]["interval"]
        assert low < one[key]["value"] < high
    assert np.log(one["perplexity"]["interval"]) == pytest.approx(one["nats_per_token"]["interval"])


def test_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = random.normal(3, 1, 60)
        samples = metrics.resampled(values, 200, trial) / 60
        low, high = metrics.with_interval(values.mean(), samples)["interval"]
        covered += low <= 3 <= high
    # Binomial: 95 % less what a bootstrap of 60 texts lacks, 1.6 % standard deviation.
    assert 0.89 <= covered / 200 <= 0.985


def test_intervals_are_over_texts_and_not_tokens() -> None:
    nats = np.random.default_rng(0).normal(3, 1, 40)
    few, many = (evaluate.report({"m": sums_of(nats, tokens)})["m"] for tokens in (1, 100))
    assert few["nats_per_token"]["interval"] == pytest.approx(many["nats_per_token"]["interval"])


def test_long_texts_weigh_more() -> None:
    sums = sums_of(np.array([1.0, 4.0]))
    sums["tokens"], sums["nats"] = np.array([30.0, 10.0]), np.array([30.0, 40.0])
    assert evaluate.report({"m": sums})["m"]["nats_per_token"]["value"] == 70 / 40


@pytest.mark.parametrize(("num_texts", "num_samples"), [(1, 100), (5, 0)])
def test_no_intervals_without_samples(num_texts: int, num_samples: int) -> None:
    sums = {"m": sums_of(np.arange(1.0, num_texts + 1))}
    row = evaluate.report(sums, num_samples=num_samples)["m"]
    assert row["perplexity"]["interval"] is None
    assert row["perplexity"]["value"] > 0


def test_share_of_the_gap() -> None:
    noise = np.random.default_rng(0).normal(3, 1, 40)
    sums = {
        "teacher": sums_of(noise),
        "plain": sums_of(noise + 0.4),
        "half": sums_of(noise + 0.2),
        "same": sums_of(noise),
        "worse": sums_of(noise + 0.8),
    }
    rows = evaluate.report(sums, "teacher")
    shares = {name: row["gap_closed"] for name, row in rows.items() if name != "teacher"}
    assert "gap_closed" not in rows["teacher"]
    for name, share in {"plain": 0, "half": 0.5, "same": 1, "worse": -1}.items():
        assert shares[name]["value"] == pytest.approx(share)
        # The texts' noise is far larger than the gap; paired, it falls out.
        assert shares[name]["interval"] == pytest.approx([share, share])


def test_no_gap_has_no_share() -> None:
    noise = np.random.default_rng(0).normal(3, 1, 40)
    sums = {"teacher": sums_of(noise), "better": sums_of(noise - 1), "other": sums_of(noise + 1)}
    share = evaluate.report(sums, "teacher")["other"]["gap_closed"]
    assert math.isnan(share["value"])
    assert share["interval"] is None
    assert "gap_closed" not in evaluate.report({"teacher": sums["teacher"]}, "teacher")["teacher"]


# --------------------------------------------------------------------------------------- answers

# Worked by hand by the rules of SQuAD's official script: answer, references, exact match, F1.
ANSWERS = {
    "equal": ("Denver Broncos", ["Denver Broncos"], 1, 1),
    "case, article, full stop": ("the denver broncos.", ["The Denver Broncos"], 1, 1),
    "spaces": (" Denver \t Broncos ", ["Denver Broncos"], 1, 1),
    "part": ("Denver Broncos", ["Broncos"], 0, 2 / 3),
    "best of several": ("Denver", ["Carolina", "in Denver", "Denver, Colorado"], 0, 2 / 3),
    "one of several": ("Denver", ["Carolina", "Denver"], 1, 1),
    "none": ("Carolina", ["Denver"], 0, 0),
    "a word twice": ("go go", ["go"], 0, 2 / 3),
    "a word twice in both": ("go go", ["go go stop"], 0, 4 / 5),
    "punctuation within": ("U.S. dollar", ["US dollar"], 1, 1),
    "hyphens join": ("well-known", ["well known"], 0, 0),
    "article within a word": ("theatre an", ["theatre"], 1, 1),
    "nothing but an article": ("the", ["cat"], 0, 0),
    "nothing in both": ("the", ["a"], 1, 1),
    "empty": ("", ["cat"], 0, 0),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name: str) -> None:
    answer, references, exact, f1 = ANSWERS[name]
    assert metrics.exact_match(answer, references) == exact
    assert metrics.f1(answer, references) == pytest.approx(f1)


def test_questions(tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "answer": "Tom", "context": "Tom ran."},
        {"question": "Who?", "answers": ["Tom", "Tim"], "answer1": "Ben", "answer2": "Al", "id": 7},
    ]
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert evaluate.read_questions(path) == [
        evaluate.Question("Tom ran.\nWho?", ["Tom"]),
        evaluate.Question("Who?", ["Tom", "Tim", "Ben", "Al"]),
    ]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"answer": "Tom"}, "line 1: question, context and answers must be texts, got None"),
        ({"question": "Who?"}, r"line 1: expected answers or answer, got \['question'\]"),
        ({"question": "Who?", "answers": []}, "line 1: expected answers or answer"),
        ({"question": "Who?", "answers": [3]}, "must be texts, got 3"),
        ({"question": "Who?", "answer": "Tom", "context": 4}, "must be texts, got 4"),
        (None, "holds no questions"),
    ],
)
def test_refused_questions(tmp_path: Path, row: dict[str, Any] | None, sentence: str) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text("" if row is None else json.dumps(row))
    with pytest.raises(InputError, match=sentence):
        evaluate.read_questions(path)


def test_answers_are_greedy_and_end_with_the_line() -> None:
    model, tokenizer = load(BUNDLED)
    text = "Once upon a time there was a dog. His name was Max.\nWhat was his name?"
    whole = generate(model, tokenizer, text + "\n", max_tokens=evaluate.ANSWER_TOKENS)
    right = evaluate.Question(text, ["never", whole.split("\n")[0]])
    wrong = evaluate.Question(text, ["never"])
    scores = evaluate.answer_scores(model, tokenizer, [right, wrong])
    assert {name: values.tolist() for name, values in scores.items()} == {
        "exact_match": [1, 0],
        "f1": [1, 0],
    }


# -------------------------------------------------------------------------------------- the rest


def test_vocabularies_of_different_widths_are_cut(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = load(tiny_folder(tmp_path / "wide", 0, 4128))[0]
    a, b = (load(folders[name])[0] for name in "ab")
    texts = texts_of(3, vocab_size=4096)
    assert evaluate.vocabulary_widths({"a": a, "wide": wide}) == {"a": 4096, "wide": 4128}
    expected = evaluate.evaluate({"t": b, "s": a}, texts, "t")["s"]
    found = evaluate.evaluate({"t": b, "s": wide}, texts, "t")["s"]
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-5)
    assert not np.allclose(evaluate.evaluate({"s": wide}, texts)["s"]["nats"], expected["nats"])


def test_logits_that_are_not_numbers_name_their_model() -> None:
    good: Any = tiny_model("llama")
    bad: Any = tiny_model("llama", 1)
    bad.model.norm.weight = mx.full((64,), math.nan)
    with pytest.raises(InputError, match="the logits of broken are not numbers"):
        evaluate.evaluate({"fine": good, "broken": bad}, texts_of(2), "fine")


@pytest.mark.parametrize("token", [0, 50, 96])
def test_one_logit_that_is_not_a_number_is_seen(token: int) -> None:
    logits = np.zeros((1, 97), np.float32)
    logits[0, token] = math.nan
    scores = metrics.token_scores(mx.array(logits), mx.array([1]))
    assert np.isnan(np.array(scores["nats"])).all()


def test_unknown_tokens_and_teachers_are_refused() -> None:
    models = {"m": tiny_model("llama")}
    with pytest.raises(InputError, match="the texts hold token 97, a model's vocabulary ends at 9"):
        evaluate.evaluate(models, [Text([1, 97])])
    with pytest.raises(InputError, match="teacher must be one of m, got t"):
        evaluate.evaluate(models, [Text([1, 2])], "t")


def test_parameters_of_a_quantised_model() -> None:
    model = tiny_model("llama")
    count = evaluate.num_parameters(model)
    embedding, head, layers = (
        97 * 64,
        97 * 64,
        3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64),
    )
    assert count == embedding + head + layers + 64
    for bits in (3, 4, 8):
        quantised = tiny_model("llama")
        nn.quantize(quantised, group_size=32, bits=bits)
        assert evaluate.num_parameters(quantised) == count


def test_texts_do_not_end_while_speed_is_measured() -> None:
    model: Any
    model, tokenizer = load(BUNDLED)
    ends = set(tokenizer.eos_token_ids)
    model.lm_head = lambda x: mx.where(mx.arange(4096) == 2, 1.0, mx.zeros((*x.shape[:-1], 4096)))
    model.args.tie_word_embeddings = False
    one = evaluate.Loaded(model, tokenizer, str(BUNDLED))
    assert 0 < evaluate.decoding_speeds({"m": one}, {"m": [1, 5]}, 8)["m"] < 1e6
    assert tokenizer.eos_token_ids == ends
    with pytest.raises(InputError, match="beyond the context of m, 512"):
        evaluate.decoding_speeds({"m": one}, {"m": [1, 5]}, 511)


# ----------------------------------------------------------------------------------- the command


def test_command(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "qa.jsonl"
    questions.write_text('{"question": "Who ran?", "answer": "Tom"}\n' * 2)
    output = tmp_path / "out.json"
    students = [f"plain={folders['b']}", f"same={folders['a']}"]
    status = run(
        *("--teacher", folders["a"], "--student", *students, "--data", data, "--qa", questions),
        *("--bootstrap", 50, "--speed-tokens", 4, "--max-length", 16, "--json", "--output", output),
    )
    assert status == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads(output.read_text())
    for word in ("perplexity", "gap closed", "F1", "tokens/s", "teacher", "plain", "4 texts"):
        assert word in out
    rows = found["models"]
    assert list(rows) == ["teacher", "plain", "same"]
    assert rows["same"]["kl"]["value"] == 0
    assert rows["same"]["gap_closed"]["value"] in (1, None)
    for row in rows.values():
        assert row["texts"] == 4
        assert row["questions"] == 2
        assert row["exact_match"]["value"] == 0
        assert row["tokens_per_s"] > 0
        assert row["parameters"] * 4 == row["weights_bytes"]
        low, high = row["perplexity"]["interval"]
        assert low <= row["perplexity"]["value"] <= high
    size = (folders["a"] / "model.safetensors").stat().st_size
    assert rows["teacher"]["file_bytes"] == size
    assert found["config"]["bootstrap"] == 50
    assert {"mlx", "mlx-lm"} <= set(found["versions"])
    assert "processor" in found["machine"]


def test_command_alone_on_the_bundled_model(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", data, "--max-texts", 3, "--speed-tokens", 0, "--json"]
    assert run("--student", f"stories={BUNDLED}", *arguments) == 0
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[-1])["models"]["stories"]
    assert row["texts"] == 3
    assert 2 < row["perplexity"]["value"] < 60
    assert not {"kl", "agreement", "gap_closed", "tokens_per_s", "f1"} & set(row)
    assert "  perplexity " in out
    assert "  KL" not in out


def test_command_says_what_it_cuts(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tiny_folder(tmp_path / "wide", 0, 4128)
    students = [f"wide={wide}", f"narrow={folders['c']}"]
    arguments = ["--data", data, "--speed-tokens", 0, "--bootstrap", 0]
    assert run("--teacher", folders["a"], "--student", *students, *arguments) == 0
    err = capsys.readouterr().err
    assert err.count("teacher 4096, wide 4128, narrow 4096); all are cut to 4096") == 1
    assert err.count("texts are cut to 256 tokens") == 1


def test_differing_tokenizers(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders["b"], other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<more>"]
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = ["--data", data, "--speed-tokens", 0, "--bootstrap", 0]
    assert run("--teacher", folders["a"], "--student", f"s={other}", *arguments) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "perplexity per token is not comparable" in sentence
    assert "with no --teacher" in sentence
    assert run("--student", f"s={other}", f"t={folders['a']}", *arguments) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--data {data}", "no model to evaluate; name one with --student NAME=DIR"),
        ("--student {a} --data {data}", "--student takes NAME=DIR, got"),
        ("--student s={a} s={b} --data {data}", "two models are called s"),
        ("--teacher {a} --student teacher={b} --data {data}", "two models are called teacher"),
        ("--student s={a} --data {data}.no", "there is no file"),
        ("--student s={a} --data {data} --qa {data}.no", "cannot be read"),
        ("--student s={a}-no --data {data}", "there is no folder"),
        ("--student s={a} --data {data} --output {data}", "exists; name another"),
        ("--student s={a} --data {data} --output {data}/no/x", "its folder does not exist"),
        ("--student s={a} --data {data} --batch-size 0", "batch_size must be at least 1, got 0"),
        ("--student s={a} --data {data} --max-texts 0", "max_texts must be at least 1, got 0"),
        ("--student s={a} --data {data} --speed-tokens 1", "speed_tokens must be at least 2"),
        ("--student s={a} --data {data} --seed -1", "seed must be between"),
    ],
)
def test_refused(
    folders: dict[str, Path],
    data: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    sentence: str,
) -> None:
    places = {"a": folders["a"], "b": folders["b"], "data": data}
    assert run(*arguments.format(**places).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert sentence in err
