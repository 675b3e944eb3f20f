"""The condition that chooses stored completions by their metadata."""

from pathlib import Path

import pytest
from completion_rows import write
from test_completions import pair

from mlx_distill.data.completions import (
    CompletionFilter,
    read_completions,
)
from mlx_distill.data.condition import Undecided, compile_where
from mlx_distill.errors import InputError

METADATA = {
    "model": "x",
    "score": 0.8,
    "flagged": False,
    "tags": ["news", "en"],
    "user": {"plan": {"name": "pro"}, "age": 7},
    "nothing": None,
    "stored": {"score": "0.9", "flagged": "false", "version": "4"},
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ('model == "x" and score >= 0.8 and not flagged', True),
        ('model == "x" and score > 0.8', False),
        ('model != "x" or score < 1', True),
        ('"news" in tags', True),
        ('"sport" in tags', False),
        ('"sport" not in tags', True),
        ('model in ["x", "y"]', True),
        ('model in ("y", "z")', False),
        ('"a" in "abc"', True),
        ("0.5 < score <= 0.8", True),
        ("0.5 < score < 0.8", False),
        ("score > -1", True),
        ('user.plan.name == "pro"', True),
        ("user.age == 7", True),
        ('"plan" in user', True),
        ("nothing == None", True),
        ("flagged", False),
        ("not (flagged or nothing)", True),
        ("True", True),
        (" model == 'x'\n", True),
        ("stored.score >= 0.9", True),
        ("0.95 > stored.score > 0.85", True),
        ("not stored.flagged", True),
        ("stored.flagged == False", True),
        ("stored.version == 4", True),
        ('stored.version == "4"', True),
        ('stored.version == "4.0"', False),
        ("model == 1", False),
        ("score > 1 and missing", False),
        ("score < 1 or missing", True),
    ],
)
def test_where(where: str, expected: bool) -> None:
    assert compile_where(where)(METADATA) is expected


@pytest.mark.parametrize(
    ("where", "construct"),
    [
        ("len(tags) > 1", r"Call in len\(tags\)"),
        ("__import__('os').system('true')", "Call in __import__"),
        ("tags[0] == 'news'", "Subscript in tags"),
        ("score + 1 > 1", r"BinOp in score \+ 1"),
        ("score is None", "Is in score is None"),
        ("score if flagged else 1", "IfExp"),
        ("lambda: 1", "Lambda"),
        ("(lambda: 1).x", "Lambda"),
        ("'a'.upper == 1", "Constant in 'a'"),
        ("(score := 1)", "NamedExpr"),
        ("[x for x in tags]", "ListComp"),
        ("[model] == tags", "List in"),
        ("-score < 1", "UnaryOp in -score"),
        ("{1: 2} == user", "Dict"),
        ("f'{model}' == 'x'", "JoinedStr"),
        ("True or len(tags)", "Call"),
    ],
)
def test_where_knows_no_more(where: str, construct: str) -> None:
    """It is refused when the filter is made, before there is a row."""
    with pytest.raises(InputError, match=f"where cannot use {construct}.*it takes names"):
        CompletionFilter(where=where)


@pytest.mark.parametrize("where", ["", "score >", "a = 1", "a; b", "\0", "(" * 5000])
def test_where_is_an_expression(where: str) -> None:
    with pytest.raises(InputError, match="where is no condition"):
        CompletionFilter(where=where)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("missing == 1", "no such metadata: missing"),
        ("user.name == 1", "no such metadata: user.name"),
        ("score.real == 0.8", "no such metadata: score.real"),
        ("score.__class__", "no such metadata: score.__class__"),
        ("print", "no such metadata: print"),
        ("score > 'a'", "not comparable: score > 'a'"),
        ("nothing < 1", "not comparable: nothing < 1"),
        ("'a' in score", "not comparable: 'a' in score"),
        ("model < 1", "not comparable: model < 1"),
    ],
)
def test_where_drops_what_it_cannot_decide(where: str, reason: str) -> None:
    with pytest.raises(Undecided) as undecided:
        compile_where(where)(METADATA)
    assert str(undecided.value) == reason


def test_where_chooses_rows(tmp_path: Path) -> None:
    rows = [pair("One", score=0.9), pair("Two", score=0.1), pair("Three"), pair("Four", score="1")]
    filter = CompletionFilter(where="score >= 0.8")
    completions, report = read_completions(write(tmp_path, *rows), filter)
    assert [one.answer for one in completions] == ["One", "Four"]
    assert report.dropped == {"where is false": 1, "no such metadata: score": 1}
