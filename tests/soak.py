"""Mixed requests, one to four at a time, for some minutes: status 1 for a wrong token or a drift.

    python tests/soak.py --minutes 30

Every request is one of a few kinds (greedy, drawn, filtered, with a penalty, with a stop text, with
8-bit keys), begins with one of the bundled prompts, and joins when another ends. Its tokens have to
be those of its kind and prompt that were written alone, without a drafter, before. Not collected by
pytest: it takes as long as it is told to. A line a minute: tokens per second, memory.

Speed is tokens per second of this process's processor time, which programs that run beside it take
nothing of, and a ratio to that of mlx-lm's own loop, which writes a few tokens after every request:
warm processors, which slow both, are no drift either. Speed has drifted where the last third of the
minutes is more than 10 % slower than the first, memory where it holds more than a tenth and 32 MB
above.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx_distill  # the BLAS comes first
from mlx_distill import CacheConfig, machine
from mlx_distill.benchmark import PROMPTS
from mlx_distill.calibration.automatic import planner_of
from mlx_distill.calibration.pair import Pair
from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.files import read_jsonl
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request

import mlx.core as mx  # isort: skip
import mlx_lm  # isort: skip
from mlx_lm.sample_utils import make_logits_processors  # isort: skip

MOST_AT_ONCE, MAX_TOKENS, NUM_PROMPTS, PLAIN_TOKENS = 4, 96, 12, 24
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"sampling": Sampling(1.0), "seed": 7},
    "filtered": {"sampling": Sampling(0.8, top_p=0.9, top_k=40), "seed": 3},
    "penalty": {"processors": 1.2},
    "stop text": {"stop": (" she",)},
    "8-bit keys": {"cache": CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=0)},
}


def request(pair: Pair, prompt: list[int], kind: str, planned: bool) -> Request:
    """Return what is asked for; a processor counts, so every request has its own."""
    options = dict(KINDS[kind])
    penalty = options.pop("processors", None)
    if penalty:
        processors = make_logits_processors(repetition_penalty=penalty)
        options["logits_processors"] = tuple(processors)
    if planned:
        options["planner"] = planner_of(pair, sampled="sampling" in options)
    return Request(mx.array(prompt), MAX_TOKENS, **options)


def alone(engine: Engine, one: Request) -> list[int]:
    """Return the tokens of a request that nobody else is served beside."""
    number, tokens = engine.submit(one), []
    while number in engine.texts:
        tokens += [emitted.response.token for emitted in engine.step()]
    return tokens


def served(
    pair: Pair,
    engine: Engine,
    jobs: Iterator[tuple[int, str]],
    prompts: list[list[int]],
    expected: dict[tuple[int, str], list[int]],
    end: float,
) -> Iterator[tuple[int, bool]]:
    """Yield the tokens of every request that has ended, and whether they were the right ones."""
    running: dict[int, tuple[tuple[int, str], list[int]]] = {}
    while running or time.monotonic() < end:
        wanted = 1 + int(time.monotonic() / 15) % MOST_AT_ONCE
        while len(running) < wanted and time.monotonic() < end:
            job = next(jobs)
            number = engine.submit(request(pair, prompts[job[0]], job[1], planned=True))
            running[number] = job, []
        for emitted in engine.step():
            running[emitted.request][1].append(emitted.response.token)
        for number in set(running) - set(engine.texts):
            job, tokens = running.pop(number)
            yield len(tokens), tokens == expected[job]


class PlainClock:
    """Times mlx-lm's loop between the requests.

    Args:
        pair: Its model writes.
        prompt: What it begins with.
    """

    def __init__(self, pair: Pair, prompt: list[int]):
        self.pair, self.prompt = pair, prompt
        self.tokens, self.decoding_s, self.spent_s = 0, 0.0, 0.0  # of the processor

    def write(self) -> None:
        """Write some tokens; the first one, which reads the prompt, does not count."""
        start, first = time.process_time(), None
        for _ in mlx_lm.stream_generate(
            self.pair.model, self.pair.tokenizer, self.prompt, PLAIN_TOKENS
        ):
            self.tokens += first is not None
            first = first or time.process_time()
        end = time.process_time()
        self.decoding_s += end - (first or end)
        self.spent_s += end - start


@dataclass
class Minute:
    """What is counted in a minute, and what it comes to."""

    plain: PlainClock
    tokens: int = 0
    start: float = field(default_factory=time.perf_counter)
    start_processor: float = field(default_factory=time.process_time)

    @property
    def took_s(self) -> float:
        """How long it has lasted."""
        return time.perf_counter() - self.start

    def row(self, number: int, requests: int, wrong: int) -> dict[str, float]:
        """Return its figures."""
        processor_s = time.process_time() - self.start_processor - self.plain.spent_s
        return {
            "minute": number,
            "requests": requests,
            "wrong": wrong,
            "tokens": self.tokens,
            "seconds": self.took_s,
            "processor_s": processor_s,
            "plain_tokens": self.plain.tokens,
            "plain_processor_s": self.plain.decoding_s,
            "resident_bytes": machine.peak_resident_bytes(),
            "array_bytes": mx.get_active_memory(),
            "cache_bytes": mx.get_cache_memory(),
        }


def drifts(rows: list[dict[str, float]]) -> list[str]:
    """Return what got worse from the first third of the minutes to the last.

    Of speed, thirds are taken as a whole: minutes in which other programs run write few tokens.
    """
    third = max(1, len(rows) // 3)
    ends = rows[:third], rows[-third:]

    def of(name: str, some: list[dict[str, float]]) -> float:
        """Return the tokens per second of the processor."""
        return sum(row[f"{name}tokens"] for row in some) / sum(
            row[f"{name}processor_s"] for row in some
        )

    found = []
    first, last = (of("", some) / of("plain_", some) for some in ends)
    if last < 0.9 * first:
        found.append(f"speed: {first:.2f} of mlx-lm's at first, {last:.2f} at last")
    for name in ("array_bytes", "resident_bytes"):
        first, last = (statistics.median(row[name] for row in some) for some in ends)
        if last > 1.1 * first + 32e6:
            found.append(f"{name}: {first / 1e6:.0f} MB at first, {last / 1e6:.0f} MB at last")
    return found


def main() -> int:
    """Serve requests, print a line a minute; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=bundled("stories-14m"))
    parser.add_argument("--drafter", default=bundled("stories-14m-redrafter"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, help="JSON of a row per minute")
    arguments = parser.parse_args()
    model, tokenizer = mlx_distill.load(arguments.model)
    drafter = mlx_distill.load_drafter(arguments.drafter, model, tokenizer)
    pair = Pair(model, tokenizer, drafter)
    rows = itertools.islice(read_jsonl(PROMPTS), NUM_PROMPTS)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for _, row in rows]
    every = list(itertools.product(range(NUM_PROMPTS), KINDS))
    plain = Engine(model, tokenizer)
    expected = {job: alone(plain, request(pair, prompts[job[0]], job[1], False)) for job in every}
    chosen = random.Random(0)
    jobs = iter(lambda: chosen.choice(every), None)
    rows_found, wrong, requests = [], 0, 0
    ended = served(
        pair,
        Engine(model, tokenizer, drafter),
        jobs,
        prompts,
        expected,
        time.monotonic() + 60 * arguments.minutes,
    )
    minute = Minute(PlainClock(pair, prompts[0]))
    for count, right in ended:
        requests, wrong = requests + 1, wrong + (not right)
        minute.tokens += count
        minute.plain.write()
        if minute.took_s >= 60:
            rows_found.append(minute.row(len(rows_found) + 1, requests, wrong))
            print(json.dumps(rows_found[-1]), flush=True)
            minute = Minute(PlainClock(pair, prompts[0]))
    drift = drifts(rows_found) if rows_found else []
    print(f"{requests} requests, {wrong} wrong; drift: {'; '.join(drift) or 'none'}")
    if arguments.output:
        result = {
            "minutes": arguments.minutes,
            "requests": requests,
            "wrong": wrong,
            "drift": drift,
            "rows": rows_found,
            **machine.provenance(),
        }
        arguments.output.write_text(json.dumps(result, indent=1))
    return int(wrong > 0 or bool(drift))


if __name__ == "__main__":
    sys.exit(main())
