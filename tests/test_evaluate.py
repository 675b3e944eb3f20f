"""Evaluation: figures against slow twins, known cases, and the command from end to end."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tiny_models import tiny_config, tiny_model

from mlx_distill import InputError, checkpoint
from mlx_distill import evaluate as verb
from mlx_distill.arrays import num_parameters
from mlx_distill.checkpoint import bundled, load
from mlx_distill.data.texts import Text
from mlx_distill.evaluation import answers, metrics, questions, texts
from mlx_distill.evaluation.evaluation import EvaluationConfig, measure
from mlx_distill.evaluation.models import Loaded
from mlx_distill.evaluation.questions import (
    Question,
    QuestionConfig,
    answer_scores,
    question_prompt,
    read_questions,
)
from mlx_distill.evaluation.speed import decoding_speeds
from mlx_distill.evaluation.texts import evaluate, vocabulary_widths
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
    return verb.main([str(argument) for argument in arguments])


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
    """All of a batch's would be 147 MB per model; 70,000 tokens are more than 16 bits count."""
    config = tiny_config("llama") | {"vocab_size": 70_000, "tie_word_embeddings": True}
    models: dict[str, nn.Module] = {}
    for seed, name in enumerate("ts"):
        mx.random.seed(seed)
        models[name] = llama.Model(llama.ModelArgs.from_dict(config))
        mx.eval(models[name].parameters())
    many = [Text([69_999, *range(262)]) for _ in range(2)]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sums = evaluate(models, many, "t")
    assert mx.get_peak_memory() - before < 300e6
    assert sums["s"]["tokens"].tolist() == [262] * 2


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
    one, same, other = (metrics.report(sums, seed=seed)["m"] for seed in (1, 1, 2))
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
    few, many = (metrics.report({"m": sums_of(nats, tokens)})["m"] for tokens in (1, 100))
    assert few["nats_per_token"]["interval"] == pytest.approx(many["nats_per_token"]["interval"])


def test_long_texts_weigh_more() -> None:
    sums = sums_of(np.array([1.0, 4.0]))
    sums["tokens"], sums["nats"] = np.array([30.0, 10.0]), np.array([30.0, 40.0])
    assert metrics.report({"m": sums})["m"]["nats_per_token"]["value"] == 70 / 40


@pytest.mark.parametrize(("num_texts", "num_samples"), [(1, 100), (5, 0)])
def test_no_intervals_without_samples(num_texts: int, num_samples: int) -> None:
    sums = {"m": sums_of(np.arange(1.0, num_texts + 1))}
    row = metrics.report(sums, num_samples=num_samples)["m"]
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
    rows = metrics.report(sums, "teacher")
    shares = {name: row["gap_closed"] for name, row in rows.items() if name != "teacher"}
    assert "gap_closed" not in rows["teacher"]
    for name, share in {"plain": 0, "half": 0.5, "same": 1, "worse": -1}.items():
        assert shares[name]["value"] == pytest.approx(share)
        # The texts' noise is far larger than the gap; paired, it falls out.
        assert shares[name]["interval"] == pytest.approx([share, share])


def test_no_gap_has_no_share() -> None:
    noise = np.random.default_rng(0).normal(3, 1, 40)
    sums = {"teacher": sums_of(noise), "better": sums_of(noise - 1), "other": sums_of(noise + 1)}
    share = metrics.report(sums, "teacher")["other"]["gap_closed"]
    assert math.isnan(share["value"])
    assert share["interval"] is None
    assert "gap_closed" not in metrics.report({"teacher": sums["teacher"]}, "teacher")["teacher"]


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
    assert answers.exact_match(answer, references) == exact
    assert answers.f1(answer, references) == pytest.approx(f1)


def test_questions(tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "answer": "Tom", "context": "Tom ran."},
        {"question": "Who?", "answers": ["Tom", "Tim"], "answer1": "Ben", "answer2": "Al", "id": 7},
    ]
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert read_questions(path) == [
        Question("Tom ran.\nWho?", ["Tom"]),
        Question("Who?", ["Tom", "Tim", "Ben", "Al"]),
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
        read_questions(path)


def test_answers_are_greedy_and_end_with_the_line() -> None:
    model, tokenizer = load(BUNDLED)
    text = "Once upon a time there was a dog. His name was Max.\nWhat was his name?"
    whole = generate(model, tokenizer, text + "\n", max_tokens=QuestionConfig().qa_tokens)
    right = Question(text, ["never", whole.split("\n")[0]])
    wrong = Question(text, ["never"])
    scores, too_long = answer_scores(model, tokenizer, [right, wrong])
    assert too_long == 0
    assert {name: values.tolist() for name, values in scores.items()} == {
        "exact_match": [1, 0],
        "f1": [1, 0],
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", "Paris"),
        ("\n\n  Paris\nis", "Paris\nis"),
        ("<think>", None),
        ("\n<think>It is\n Lyon", None),
        ("<think>\n\n</think>\n\nParis", "Paris"),
        ("<think>Lyon?</think>\n<think>No.</think> Paris\n", "Paris\n"),
        ("Paris <think>", "Paris <think>"),
        (" \n", ""),
    ],
)
def test_what_is_spoken(text: str, expected: str | None) -> None:
    assert answers.spoken(text) == expected


def test_thoughts_have_the_models_own_marks() -> None:
    assert answers.spoken("<a>no</a> yes", ("<a>", "</a>")) == "yes"
    assert answers.spoken("<think>no</think>", ("<a>", "</a>")) == "<think>no</think>"


class Script:
    """Stands in for ``stream_generate``: hands out pieces as long as it is asked."""

    def __init__(self, pieces: list[str]):
        self.pieces, self.given = pieces, 0

    def __call__(self, model: Any, tokenizer: Any, prompt: Any, max_tokens: int) -> Any:
        for piece in self.pieces[:max_tokens]:
            self.given += 1
            yield SimpleNamespace(text=piece)


THOUGHT = ["<think>", *["Lyon?\n"] * 50, "</think>", "\n", "Paris", "\n", "Lyon"]


@pytest.mark.parametrize(
    ("pieces", "asked", "f1", "given"),
    [
        (["\n", "\n", "Par", "is", ".\n", "Lyon"], {}, 1, 5),  # a template that ends with the role
        (THOUGHT, {}, 1, 55),
        (THOUGHT, {"qa_thought_tokens": 10}, 0, 42),
        (["Paris"] * 50, {"qa_tokens": 1}, 1, 1),
        (["\n"] * 50, {"qa_tokens": 8}, 0, 8),
    ],
)
def test_answers_behind_blanks_and_thoughts(
    monkeypatch: pytest.MonkeyPatch, pieces: list[str], asked: dict[str, Any], f1: int, given: int
) -> None:
    model, tokenizer = load(BUNDLED)
    script = Script(pieces)
    monkeypatch.setattr(questions, "stream_generate", script)
    question = Question("The capital of France?", ["Paris"])
    scores, _ = answer_scores(model, tokenizer, [question], QuestionConfig(**asked))
    assert scores["f1"].tolist() == [f1]
    assert script.given == given


def test_a_template_may_open_the_thought_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(BUNDLED)
    monkeypatch.setattr(questions, "stream_generate", Script(["Lyon?", "\n", "</think>", "Paris"]))
    scores, _ = answer_scores(model, tokenizer, [Question("Where? <think>", ["Paris"])])
    assert scores["exact_match"].tolist() == [1]


def test_questions_without_room_are_counted() -> None:
    model, tokenizer = load(BUNDLED)
    asked = [Question("Tom ran. " * 200, ["Tom"]), Question("Who ran?", ["Tom"])]
    scores, too_long = answer_scores(model, tokenizer, asked)
    assert (len(scores["f1"]), too_long) == (1, 1)


def test_chat_models_are_told_to_be_short() -> None:
    _, tokenizer = load(BUNDLED)
    question = Question("Who ran?", ["Tom"])
    config = QuestionConfig()
    assert tokenizer.decode(question_prompt(tokenizer, question, config)) == "<s> Who ran?\n"
    _, tokenizer = load(BUNDLED)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ end }}"
    tokenizer.has_chat_template = True
    for instruction, expected in (("Be short.", "[Who ran?\nBe short.]!"), ("", "[Who ran?]!")):
        config = QuestionConfig(qa_instruction=instruction)
        ids = question_prompt(tokenizer, question, config, {"end": "!"})
        assert tokenizer.decode(ids).replace("<s>", "").strip() == expected


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


# ----------------------------------------------------------------------------------- the command


def test_command(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "qa.jsonl"
    asked.write_text('{"question": "Who ran?", "answer": "Tom"}\n' * 2)
    output = tmp_path / "out.json"
    students = [f"plain={folders['b']}", f"same={folders['a']}"]
    status = run(
        *("--teacher", folders["a"], "--student", *students, "--data", data, "--qa", asked),
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


def test_command_on_weights_as_a_gpu_loads_them(
    tiny_on_a_gpu: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "qa.jsonl"
    asked.write_text('{"question": "Who ran?", "answer": "Tom"}')
    flags = ["--data", data, "--qa", asked, "--speed-tokens", 2, "--json", "--bootstrap", 9]
    assert run("--teacher", tiny_on_a_gpu, "--student", f"s={tiny_on_a_gpu}", *flags) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    assert rows["s"]["kl"]["value"] == 0
    assert rows["s"]["parameters"] * 4 > rows["s"]["weights_bytes"]
    model, _ = checkpoint.load(tiny_on_a_gpu)
    model.set_dtype(mx.float32)
    wide = Loaded(model, load(tiny_on_a_gpu)[1], str(tiny_on_a_gpu))
    expected = measure({"s": wide}, data, EvaluationConfig(speed_tokens=0, bootstrap=0))["s"]
    for name, tolerance in (("nats_per_token", 2e-3), ("calibration_error", 0.02)):
        found = rows["s"][name]["value"]
        assert found == pytest.approx(expected[name]["value"], rel=tolerance, abs=tolerance)


def test_stored_answers_are_filtered_and_a_cut_one_has_no_end(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "Who ran?", "completion": "Tom ran home.", "finish_reason": end}
        for end in ("stop", "length")
    ]
    file = tmp_path / "stored.jsonl"
    counts = []
    for row in rows:
        file.write_text(json.dumps(row) + "\n")
        flags = ["--data", file, "--data-layout", "completions", "--no-drop-truncated", "--json"]
        assert run("--student", f"a={folders['a']}", *flags, "--speed-tokens", 0) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["a"]
        counts.append(figures["tokens"])
    assert counts[0] == counts[1] + 1  # the end
    assert run("--student", f"a={folders['a']}", *flags[:4]) == 2
    assert "truncated" in capsys.readouterr().err


def test_adapters_by_name(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"lora_a": (64, 2), "lora_b": (2, 64)}
    prefix = "model.layers.2.self_attn.q_proj"
    weights = {f"{prefix}.{name}": mx.random.normal(shape) for name, shape in shapes.items()}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    students = [f"{name}={folders['a']}" for name in ("plain", "tuned")]
    flags = ["--data", data, "--speed-tokens", 0, "--bootstrap", 0, "--json"]
    adapter = ["--adapter-path", f"tuned={tmp_path}"]
    assert run("--teacher", folders["a"], "--student", *students, *flags, *adapter) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    assert rows["plain"]["kl"]["value"] == 0
    assert rows["tuned"]["kl"]["value"] > 0


def test_names_are_no_markup(
    folders: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", data, "--speed-tokens", 0, "--bootstrap", 0]
    assert run("--student", f"[/x][bold]={folders['a']}", *flags) == 0
    assert "[/x][bold]" in capsys.readouterr().out


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
        ("--student s={a} --data {data} --speed-tokens 1", "speed_tokens must be 0, or between 2"),
        ("--student s={a} --data {data} --seed -1", "seed must be at least 0"),
        (
            "--student s={a} --data {data} --bootstrap 1000000000000",
            "bootstrap must be between 0 and 1,000,000",
        ),
        ("--student s={a} --data {data} --qa-tokens 0", "qa_tokens must be at least 1, got 0"),
        ("--student s={a} --data {data} --adapter-path t={b}", "takes each of s once, got t"),
        ("--student s={a} --data {data} --adapter-path {b}", "--adapter-path takes NAME=DIR"),
        ("--student s={a} --data {data} --chat-template-config 1", "must be a JSON object"),
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
