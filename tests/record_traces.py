"""Record what the bundled drafter drafts at every place of some texts, and what of it was right.

    python tests/record_traces.py tests/draft_traces.json

See ``mlx_distill.benchmarking.traces`` for what a trace holds.
"""

import json
import sys
from pathlib import Path

import mlx_distill  # the BLAS comes first

# isort: split
from mlx_distill.benchmarking.traces import record_trace
from mlx_distill.checkpoint import bundled

PROMPTS = ("Once upon a time there was a baker", "Ben had a red kite. One day", "The old owl said")


def main(file: Path) -> None:
    """Write the traces of the bundled pair."""
    pair = mlx_distill.load(bundled("stories-14m"))
    drafter = mlx_distill.load_drafter(bundled("stories-14m-redrafter"), *pair)
    prompts = [pair[1].encode(prompt) for prompt in PROMPTS]
    traces = [record_trace(pair, drafter, ids, law) for law in (0.0, 1.0) for ids in prompts]
    rows = ",\n".join(json.dumps(trace, separators=(",", ":")) for trace in traces)
    file.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
