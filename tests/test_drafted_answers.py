"""Answers are written with a drafter where that is known to be faster, and are the model's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.calibration.batches import BatchChoice, Found
from mlx_distill.calibration.pair import Pair
from mlx_distill.distillation import answer_writing, drafted_answers, responses
from mlx_distill.distillation.answer_writing import answered
from mlx_distill.distillation.responses import Response, ResponseConfig
from mlx_distill.drafters.nothing import NoDrafter

CONFIG = ResponseConfig(max_tokens=10, temperatures=(0.0, 0.9), response_batch_size=2)
TEXTS = ("Once upon a time", "Ben had a red", "One", "The old baker", "Lily and", "Tom was a")


@pytest.fixture
def prompts(bundled_pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    monkeypatch.setattr(responses, "PART", 1)
    return [bundled_pair[1].encode(text) for text in TEXTS]


def paying(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    monkeypatch.setenv("MLX_DISTILL_CALIBRATE", "1")
    monkeypatch.setattr(BatchChoice, "drafts_pay", pays)
    monkeypatch.setattr(BatchChoice, "way", lambda *_: "rows")


def test_drafted_answers(
    bundled_pair: tuple[Any, Any],
    bundled_drafter: Any,
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(name: str) -> list[Response]:
        path = tmp_path / name
        return answered(path, *bundled_pair, prompts, CONFIG, {"of": "this"}, True)

    for module in (answer_writing, drafted_answers):
        monkeypatch.setattr(module, "bundled_drafter", lambda *_: (tmp_path, bundled_drafter))
    paying(monkeypatch, False)
    plain = write("plain")
    paying(monkeypatch, True)
    drafted = write("drafted")
    assert plain[::2] == drafted[::2]  # greedy
    assert all(one.prompt == other.prompt for one, other in zip(plain, drafted, strict=True))
    headers = [
        json.loads((tmp_path / name).read_text().splitlines()[0]) for name in ("plain", "drafted")
    ]
    assert headers[0]["target"] == {"of": "this"}
    assert headers[1]["target"]["drafter"]
    # What was begun in either way goes on so, whatever pays by then.
    for name, whole in (("plain", plain), ("drafted", drafted)):
        path = tmp_path / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
        paying(monkeypatch, name == "plain")
        assert write(name) == whole


@pytest.mark.parametrize(
    ("found", "pays"),
    [
        (None, False),
        (Found(1.0, 0.9, 3.0), False),
        (Found(1.0, 0.9, 3.0, {"one": 1.0}), False),
        (Found(1.0, 0.9, 3.0, {"one": 1.05}), False),  # mlx-lm's way is faster still
        (Found(1.0, 0.9, 3.0, {"one": 1.2}), True),
    ],
)
def test_what_is_known_to_pay(
    bundled_pair: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    found: Found | None,
    pays: bool,
) -> None:
    monkeypatch.setattr(BatchChoice, "_read", lambda self: found)
    choice = BatchChoice(Pair(*bundled_pair, NoDrafter()), 4)
    choice._drafter = "one"
    assert choice.drafts_pay == pays
