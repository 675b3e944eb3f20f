"""Questions: what is asked, what is taken for the answer, and what counts as right."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluating import BUNDLED

from mlx_distill import InputError
from mlx_distill.checkpoint import load
from mlx_distill.evaluation import answers, questions
from mlx_distill.evaluation.questions import (
    Question,
    QuestionConfig,
    answer_scores,
    question_prompt,
    read_questions,
)
from mlx_distill.speculation.generation import generate

pytestmark = pytest.mark.usefixtures("no_hub")


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
