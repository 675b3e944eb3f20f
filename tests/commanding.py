"""What tests of commands run them with."""

import json
from pathlib import Path
from typing import Any

import mlx_lm
import pytest


@pytest.fixture(scope="session")
def expected(bundled_pair: tuple[Any, Any]) -> str:
    """Return what the bundled model writes after the default prompt, in 24 tokens."""
    return mlx_lm.generate(*bundled_pair, "Once upon a time", max_tokens=24)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Return a JSONL file with every kind of row."""
    rows = [
        {"prompt": "Once upon a time"},
        {"text": "One day a little girl named Lily found a needle in her room. " * 5},
        {"turns": ["Ben had a red kite.", "What then?"]},
        *({"prompt": f"The {animal} was"} for animal in ("dog", "cat", "bird", "frog", "cow")),
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


WHOLE = ", there was a little girl named Lily."  # what all of the bundled model goes on with


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])
