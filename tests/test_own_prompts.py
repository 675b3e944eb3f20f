"""Prompts that a model writes itself: what is kept of them, and who cannot write any."""

from pathlib import Path

import pytest
from conftest import ModelIn
from damage import Run

from mlx_distill import train_drafter
from mlx_distill.data.user_turns import fault, key, rare_scripts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("How do I keep tomato plants alive?", None),
        ("Wie spät ist es in Tokio?", None),
        ("今天天气怎么样", None),
        ("Yes.", "shorter than 3 words"),
        ("What \ufffd is this thing", "not text"),
        ("What is a \u0434\u043e\u043c\u0438\u043a in English", "in no one script"),
        ("go on and " * 10, "repeating itself"),
        ("Please help me now!!!!!!!!!!!!!!!!!!", "repeating itself"),
    ],
)
def test_why_a_turn_is_no_prompt(text: str, reason: str | None) -> None:
    assert fault(text) == reason


def test_scripts_and_beginnings() -> None:
    assert rare_scripts(["Where is it?"] * 30 + ["где это стоит"]) == {"CYRILLIC"}
    assert key("Why is the sky blue, please?") == key("why is the SKY blue please")


def test_a_model_without_a_template_asks_for_prompts(
    model_in: ModelIn, tmp_path: Path, refused: Run
) -> None:
    output = ["--model", model_in("tiny", "float16"), "--output", tmp_path / "drafter"]
    assert "no chat template" in refused(train_drafter.main, *output)
    assert list(tmp_path.iterdir()) == []
