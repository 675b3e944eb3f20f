"""Record what a drafter drafts at every place of some texts, and what of it was right.

    python tests/record_traces.py tests/draft_traces.json

A trace holds a text's places one after the other: of the draft that begins there the likeliest
nodes as parents, the likeliest first, and which of them the text went on with. So it tells what any
smaller shape of draft would have come to, wherever its cycles begin.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx_distill  # the BLAS comes first

# isort: split
import mlx.core as mx

from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import TextNoise
from mlx_distill.drafters.protocol import DraftPlan, Features
from mlx_distill.target.target import Target

PLAN = DraftPlan(8, 8)
NODES = 33
PROMPTS = ("Once upon a time there was a baker", "Ben had a red kite. One day", "The old owl said")


def record(pair: tuple[Any, Any], drafter: Any, prompt: str, temperature: float) -> dict[str, Any]:
    """Return the trace of a text."""
    target = Target.of(pair[0])
    options: dict[str, Any] = {"temperature": temperature, "seed": 1, "max_tokens": 150}
    start = pair[1].encode(prompt)
    answer = [r.token for r in mlx_distill.stream_generate(*pair, start, **options)]
    text = [*start, *answer]
    _, hidden = target.read(mx.array([text]))
    noise = TextNoise(mx.random.key(1), target.vocab_size) if temperature else None
    places = []
    for number in range(1, len(answer)):
        root = len(start) + number - 1  # the certain token, the text's token number - 1
        state = drafter.open(mx.array(text[:root]), Features(hidden[0, :root]))
        rows = None if noise is None else temperature * noise.rows(number, PLAN.draft_length)
        places.append(_place(state.draft(mx.array(text[root : root + 1]), PLAN, rows), text[root:]))
    return {"temperature": temperature, "places": places}


def _place(draft: Any, text: list[int]) -> list[list[int]]:
    """Return the parents of a draft's likeliest nodes, and which of them the text went on with."""
    scores, depths = draft.scores.tolist(), draft.depths.tolist()
    tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
    order = sorted(range(len(tokens)), key=lambda node: (-scores[node], depths[node]))[:NODES]
    rank = {node: place for place, node in enumerate(order)}
    path = [0]
    for node in sorted(order, key=lambda one: depths[one])[1:]:
        depth = depths[node]
        if parents[node] == order[path[-1]] and tokens[node : node + 1] == text[depth : depth + 1]:
            path.append(rank[node])
    return [[rank[parents[node]] for node in order], path[1:]]


def main(file: Path) -> None:
    """Write the traces of the bundled pair."""
    pair = mlx_distill.load(bundled("stories-14m"))
    drafter = mlx_distill.load_drafter(bundled("stories-14m-redrafter"), *pair)
    traces = [record(pair, drafter, prompt, law) for law in (0.0, 1.0) for prompt in PROMPTS]
    rows = ",\n".join(json.dumps(trace, separators=(",", ":")) for trace in traces)
    file.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
