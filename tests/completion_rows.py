"""Rows of stored completions, and what is read of them."""

import json
from pathlib import Path
from typing import Any

from mlx_distill.data.completion_layouts import Completion
from mlx_distill.data.completions import (
    CompletionFilter,
    read_completions,
)

HI = {"role": "user", "content": "Hi"}


HELLO = {"role": "assistant", "content": "Hello!"}


KIND = {"role": "system", "content": "Be kind."}


CHAT = [HI, HELLO]


KIND_CHAT = [KIND, HI, HELLO]


ALL = CompletionFilter(drop_duplicates=False, drop_refusals=False, drop_truncated=False)


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "stored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, *rows: Any, filter: CompletionFilter = ALL) -> list[Completion]:
    return read_completions(write(folder, *rows), filter)[0]


def reasons(folder: Path, *rows: Any, filter: CompletionFilter = ALL) -> dict[str, int]:
    """Return why rows are dropped; one that is kept goes along, so that something is left."""
    kept = {"prompt": "Is this kept?", "completion": "Of course, it is always there."}
    completions, report = read_completions(write(folder, *rows, kept), filter)
    assert report.kept == len(completions)
    assert completions[-1].answer == kept["completion"]
    return dict(report.dropped)


def parts(*texts: str, **more: Any) -> list[dict[str, Any]]:
    return [{**more, "text": text} for text in texts]


def choice(content: Any, reason: str = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more}
    return {"index": 0, "message": message, "finish_reason": reason}


def log(request: Any, response: Any, **more: Any) -> dict[str, Any]:
    return {
        "schemaType": "ModelInvocationLog",
        "schemaVersion": "1.0",
        "modelId": "amazon.nova-pro-v1:0",
        "input": {"inputContentType": "application/json", "inputBodyJson": request},
        "output": {"outputContentType": "application/json", "outputBodyJson": response},
        **more,
    }
