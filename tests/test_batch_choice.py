"""How texts are written together is whatever is fastest, and that is remembered."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny_models import tiny_model

import mlx_distill
from mlx_distill.calibration import automatic, batches
from mlx_distill.calibration.batches import BatchChoice, Found
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.store import remember
from mlx_distill.core.sampling import Sampling
from mlx_distill.drafters.nothing import NoDrafter
from mlx_distill.speculation.batch_planning import MEMORY, SHAPES, BatchPlanner
from mlx_distill.speculation.batch_writing import Failed
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.plain_batch import PlainBatch
from mlx_distill.speculation.requests import Request

PROMPTS = ("Once upon a time", "Ben had a red kite.", "One", "The old baker forgot his hat on")


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let choices be made, and remembered in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(automatic.SWITCH, "1")


@pytest.mark.parametrize(
    ("found", "drafter", "way"),
    [
        (Found(1.0, 0.98, 3.0), None, "rows"),  # a little is no reason
        (Found(1.0, 0.9, 3.0), None, "mlx-lm"),
        (Found(1.0, 0.9, 0.8), None, "alone"),
        (Found(1.0, 0.5, 3.0), "one", "rows"),  # what drafts bring is to be found out
        (Found(1.0, 0.9, 3.0, {"one": 1.2}), "one", "rows"),
        (Found(1.0, 0.9, 3.0, {"one": 1.0}), "one", "mlx-lm"),
        (Found(1.0, 0.9, 3.0, {"one": 1.2}), None, "mlx-lm"),
    ],
)
def test_the_fastest_way(found: Found, drafter: str | None, way: str) -> None:
    assert found.way(drafter) == way


def tokens_of(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Return the tokens of texts of which two join late, and the third is cancelled."""
    numbers, found = [], dict[int, list[int]]()
    waiting = list(requests)
    while waiting or engine.busy:
        for one in waiting[:2]:
            numbers.append(engine.submit(one))
            found[numbers[-1]] = []
        waiting = waiting[2:]
        for _ in range(4):
            for one in engine.step():
                found[one.request].append(one.response.token)
                if len(numbers) > 2 and one.request == numbers[2] and len(found[numbers[2]]) == 3:
                    engine.cancel(numbers[2])
    return [found[number] for number in numbers]


def test_texts_of_mlx_lm_are_those_alone(bundled_pair: tuple[Any, Any]) -> None:
    laws = Sampling(), Sampling(), Sampling(), Sampling(1.0)  # the last one goes by rows
    texts = [
        Request(
            mx.array(bundled_pair[1].encode(prompt)), 5 + 3 * place, law, place, stop=("kite.",)
        )
        for place, (prompt, law) in enumerate(zip(PROMPTS, laws, strict=True))
    ]
    expected = [tokens_of(Engine(*bundled_pair), [text])[0] for text in texts]
    expected[2] = expected[2][:3]
    engine = Engine(*bundled_pair, batch=2, plain_batches=True)
    assert tokens_of(engine, texts) == expected
    assert not engine.texts


def test_a_choice_is_made_once_and_followed(
    bundled_pair: tuple[Any, Any],
    bundled_drafter: Any,
    monkeypatch: pytest.MonkeyPatch,
    remembering: None,
) -> None:
    spreads, written = [0.9, 0.1], []
    monkeypatch.setattr(batches, "timed", lambda *_: (Found(1.0, 0.5, 4.0), spreads.pop(0)))
    join = PlainBatch.join
    monkeypatch.setattr(
        PlainBatch, "join", lambda self, text: written.append(text.number) or join(self, text)
    )
    pair = Pair(*bundled_pair, NoDrafter())
    assert BatchChoice(pair, 2).way(pair) == "rows"  # the machine was busy, so nothing is kept
    for _ in range(2):
        answers = mlx_distill.batch_generate(*bundled_pair, PROMPTS[:2], max_tokens=4)
        for answer, prompt in zip(answers, PROMPTS, strict=False):
            assert answer.text == mlx_distill.generate(*bundled_pair, prompt, max_tokens=4)
    assert len(written) == 4
    assert BatchChoice(pair, 2).way(pair) == "mlx-lm"
    drafting = Pair(*bundled_pair, bundled_drafter)
    names = [str(BatchChoice(drafting, 2)._drafter)]
    for gain, spread, way, drafts in (
        (0.9, 0.9, "rows", True),  # busy again: nothing is known of the drafts
        (0.9, 0.1, "mlx-lm", False),
        (3.0, 0.1, "rows", True),
    ):
        timed = Found(1.0, 0.5, 4.0, {} if spread > 0.5 else dict.fromkeys(names, gain))
        monkeypatch.setattr(batches, "timed", lambda *_, f=timed, s=spread: (f, s))
        choice = BatchChoice(drafting, 2)
        assert choice.way(drafting) == way
        assert choice.drafts == drafts
        if way == "mlx-lm":  # it is timed once, until that is forgotten
            assert BatchChoice(drafting, 2).found == choice.found
            choice.found = Found(1.0, 0.5, 4.0)
            choice._keep()
    for _ in range(2):  # of others and of these, 2 and then 1.5
        BatchChoice(drafting, 2).learn(1.0)
    assert BatchChoice(drafting, 2).way(drafting) == "mlx-lm"
    assert BatchChoice(pair, 2).way(pair) == "mlx-lm"  # of nobody's drafts, the same is known
    assert not spreads


def test_drafts_are_timed_and_the_planner_begins_with_that(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ROUNDS", 1)
    ticks = iter(range(10**6))
    pair = Pair(*bundled_pair, bundled_drafter)
    found, _ = batches.timed(pair, 2, "it", clock=lambda: float(next(ticks)))
    step_s = 1.0 / batches.STEPS  # everything takes a tick
    assert found.rows_s == found.plain_s == found.alone_s / 2 == step_s
    prices, tokens = zip(*found.cycles["it"], strict=True)
    assert prices == (1.0,) * len(SHAPES)
    assert all(
        1.0 < one <= 1 + shape.draft_length for one, shape in zip(tokens, SHAPES, strict=True)
    )
    assert found.gains["it"] == 1 + batches.KEPT * (max(tokens) - 1)
    choice, planner = BatchChoice(pair, 2), BatchPlanner()
    choice.found, choice._drafter = found, "it"
    choice.teach(planner, 2)
    planner.observe(2, 2, 1.0)
    assert planner.shape(0, None) == SHAPES[tokens.index(max(tokens))]
    # Of fewer texts that is known, too, until they tell.
    planner.observe(1, 1, 1.0)
    assert planner.shape(0, None) == SHAPES[tokens.index(max(tokens))]


def test_what_was_never_tried_brought_nothing_that_is_known() -> None:
    planner = BatchPlanner()
    for _ in range(2 * MEMORY):  # eight texts: a trial cannot be afforded yet
        planner.observe(8, 8, 1.0)
        assert planner.shape(0, None) is None
    assert planner.gain(8) is None


def test_nothing_is_drafted_where_that_is_known_to_bring_nothing(
    bundled_pair: tuple[Any, Any],
    bundled_drafter: Any,
    monkeypatch: pytest.MonkeyPatch,
    remembering: None,
) -> None:
    opened, make = [], bundled_drafter.open
    monkeypatch.setattr(bundled_drafter, "open", lambda *of: opened.append(1) or make(*of))
    expected = None
    for gain in (1.5, 0.9):
        monkeypatch.setattr(BatchChoice, "found", Found(1.0, 2.0, 4.0), raising=False)
        monkeypatch.setattr(BatchChoice, "way", lambda *_: "rows")
        monkeypatch.setattr(BatchChoice, "drafts", gain > 1)
        options = {"drafter": bundled_drafter, "max_tokens": 6}
        answers = mlx_distill.batch_generate(*bundled_pair, PROMPTS[:2], **options)
        tokens = [one.tokens for one in answers]
        assert tokens == (expected or tokens)
        expected = tokens
        assert len(opened) == 2  # of the first time


def test_ways_are_timed(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ROUNDS", 1)
    ticks = iter(range(10**6))
    found, _ = batches.timed(Pair(*pair, NoDrafter()), 2, clock=lambda: float(next(ticks)))
    step_s = 1.0 / batches.STEPS
    assert found == Found(step_s, step_s, 2 * step_s)


@pytest.mark.parametrize("after", [1, 4])
def test_logits_that_become_no_numbers_end_a_text(bundled_pair: Any, after: int) -> None:
    model, tokenizer = copy.deepcopy(bundled_pair[0]), bundled_pair[1]
    norm = model.model.norm
    left = [10**9]

    class Late(type(norm)):
        def __call__(self, x: mx.array) -> mx.array:
            left[0] -= 1
            return super().__call__(x) * (1.0 if left[0] >= 0 else mx.nan)

    norm.__class__ = Late
    engine = Engine(model, tokenizer, batch=2, plain_batches=True)
    for _ in range(2):
        engine.submit(Request(mx.array(tokenizer.encode("Once upon a time")), max_tokens=20))
    found: dict[int, list[int]] = {}
    errors = []
    while engine.busy:
        for one in engine.advance():
            if isinstance(one, Failed):
                errors.append(str(one.error))
                continue
            found.setdefault(one.request, []).append(one.response.token)
            if len(found) == 2 and all(len(tokens) >= after for tokens in found.values()):
                left[0] = min(left[0], 0)
    assert len(errors) == 2
    assert all("not numbers" in error for error in errors)
    assert all(set(tokens) != {0} and 0 not in tokens[1:] for tokens in found.values())


FOUND = {"rows_s": 0.01, "plain_s": 0.02, "alone_s": 0.03, "gains": {"one": 1.5}}
FOUND |= {"cycles": {"one": [[1.2, 2.0]]}}


@pytest.mark.parametrize("time", [1.0, math.inf])
def test_what_was_found_is_read_back(time: float) -> None:
    assert Found.from_dict({**FOUND, "rows_s": time}) == Found(
        time, 0.02, 0.03, {"one": 1.5}, {"one": [(1.2, 2.0)]}
    )


@pytest.mark.parametrize(
    "damage",
    [
        *({"rows_s": value} for value in ("0.01", None, True, -1, math.nan, 10**400)),
        {"plain_s": 0},
        *({"gains": value} for value in (5, [], {"one": "x"}, {"one": None}, {"one": math.nan})),
        *({"cycles": value} for value in (5, {"one": 5}, {"one": [[1]]}, {"one": [["a", 2]]})),
        *({"cycles": {"one": [pair]}} for pair in ([0, 0], [math.nan, 1], [10**400, 2])),
        {"more": 1},
    ],
)
def test_a_damaged_choice_is_made_again(
    damage: dict[str, Any],
    bundled_pair: Any,
    remembering: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    choice = BatchChoice(Pair(*bundled_pair, NoDrafter()), 2, False)
    remember(choice._known, batches.NOUN, {"found": {**FOUND, **damage}})
    assert choice._read() is None
    assert "is ignored and measured again" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mamba", "rwkv7"])
def test_mlx_lm_writes_no_batches_of_models_that_it_says_something_else_of(
    name: str, bundled_pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is text for their states: the shorter of two texts was another one than alone."""
    monkeypatch.setattr(batches, "ROUNDS", 1)
    pair = Pair(tiny_model(name, vocab_size=4096), bundled_pair[1], NoDrafter())
    assert pair.target.takes_batches
    found, _ = batches.timed(pair, 2)
    assert found.plain_s == math.inf
    assert found.way(None) != "mlx-lm"
