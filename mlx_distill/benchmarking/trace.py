"""A profile as a file that Perfetto and chrome://tracing open (the trace event format).

Two processes stand for the two ways in which the same text was written: with the device waited for
around every part, and as it always runs, where a part is only the host's time to build it and the
device's own work does not show. In both, "waiting" is the host blocked on the device.
"""

import json
from collections.abc import Iterator
from typing import Any

from mlx_distill.benchmarking.profile import HOST, READ, Profiled, Timed

WAITED, FREE = "device waited for around every part", "as it runs (host only)"


def trace(run: Profiled) -> str:
    """Return the trace of a prompt as JSON."""
    events: list[dict[str, Any]] = []
    for process, (name, timed) in enumerate(((WAITED, run.waited), (FREE, run.free)), start=1):
        events.append(_named("process_name", name, process))
        events.append(_named("thread_name", "cycle", process))
        events += sorted(_events(timed, process), key=lambda event: (event["ts"], -event["dur"]))
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=0) + "\n"


def _events(timed: Timed, process: int) -> Iterator[dict[str, Any]]:
    """Yield the slices of a text, and the host's between them."""

    def slice_of(name: str, start_s: float, end_s: float, cycle: int) -> dict[str, Any]:
        start = 1e6 * (start_s - timed.start_s)
        place = {"ph": "X", "pid": process, "tid": 1, "cat": "cycle", "args": {"cycle": cycle}}
        return {"name": name, "ts": start, "dur": 1e6 * (end_s - start_s), **place}

    before, cycle = timed.start_s, 0
    for part in timed.slices:
        cycle += part.name == "target"
        shown = "waiting" if part.name == READ else part.name
        if part.start_s > before:
            yield slice_of(HOST, before, part.start_s, cycle)
        yield slice_of(shown, part.start_s, part.end_s, cycle)
        if part.end_s > part.built_s and part.name != READ:
            yield slice_of("waiting", part.built_s, part.end_s, cycle)
        before = part.end_s
    if timed.end_s > before:
        yield slice_of(HOST, before, timed.end_s, cycle)


def _named(kind: str, name: str, process: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": 1, "args": {"name": name}}
