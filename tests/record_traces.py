"""Record what a bundled drafter drafts at every place of some texts, and what of it was right.

    python tests/record_traces.py tests/draft_traces.json              the stories pair
    python tests/record_traces.py tests/chat_traces.json MODEL         a chat model with its drafter

See ``mlx_distill.benchmarking.traces`` for what a trace holds.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx_distill  # the BLAS comes first

# isort: split
from mlx_distill.benchmarking.traces import record_trace
from mlx_distill.checkpoint import bundled
from mlx_distill.drafters.registry import bundled_drafter

STORIES = ("Once upon a time there was a baker", "Ben had a red kite. One day", "The old owl said")
CHATS = ("Explain why the sky is blue.", "Write a function that reverses a list.")
# A chat model is slower, and its texts are as long as they need to be to tell.
TOKENS = {STORIES: 150, CHATS: 80}


def asked(tokenizer: Any, prompt: str) -> list[int]:
    """Return a chat's prompt as the model's template writes it."""
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True)


def main(file: Path, name: str | None = None) -> None:
    """Write the traces of a bundled drafter."""
    pair = mlx_distill.load(name or bundled("stories-14m"))
    found = bundled_drafter(*pair)
    if found is None:
        raise SystemExit("no bundled drafter fits the model")
    texts = CHATS if name else STORIES
    encode = pair[1].encode if texts is STORIES else lambda prompt: asked(pair[1], prompt)
    prompts = [encode(prompt) for prompt in texts]
    traces = [
        record_trace(pair, found[1], ids, law, TOKENS[texts])
        for law in (0.0, 1.0)
        for ids in prompts
    ]
    rows = ",\n".join(json.dumps(trace, separators=(",", ":")) for trace in traces)
    file.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
