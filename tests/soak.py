"""Mixed requests, one to four at a time, for some minutes: status 1 for a wrong token or a leak.

    python tests/soak.py --minutes 30

Every request is one of a few kinds (greedy, drawn, filtered, with a penalty, with a stop text, with
8-bit keys), begins with one of the bundled prompts, and joins when another ends. Its tokens have to
be those of its kind and prompt that were written alone, without a drafter, before. Not collected by
pytest: it takes as long as it is told to. A line a minute: tokens per second, memory.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_distill  # the BLAS comes first
from mlx_distill import CacheConfig, machine
from mlx_distill.benchmark import PROMPTS
from mlx_distill.calibration.automatic import planner_of
from mlx_distill.calibration.measuring import Pair
from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.files import read_jsonl
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request

import mlx.core as mx  # isort: skip
from mlx_lm.sample_utils import make_logits_processors  # isort: skip

MOST_AT_ONCE, MAX_TOKENS, NUM_PROMPTS = 4, 96, 12
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
        wanted = 1 + int(time.monotonic() / 20) % MOST_AT_ONCE
        while len(running) < wanted and time.monotonic() < end:
            job = next(jobs)
            number = engine.submit(request(pair, prompts[job[0]], job[1], planned=True))
            running[number] = job, []
        for emitted in engine.step():
            running[emitted.request][1].append(emitted.response.token)
        for number in set(running) - set(engine.texts):
            job, tokens = running.pop(number)
            yield len(tokens), tokens == expected[job]


def main() -> int:
    """Serve requests, print a line a minute; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    start = minute = time.monotonic()
    found, wrong, requests, tokens = [], 0, 0, 0
    ended = served(
        pair,
        Engine(model, tokenizer, drafter),
        jobs,
        prompts,
        expected,
        start + 60 * arguments.minutes,
    )
    for count, right in ended:
        requests, tokens, wrong = requests + 1, tokens + count, wrong + (not right)
        now = time.monotonic()
        if now - minute >= 60:
            row = {
                "minute": round((now - start) / 60),
                "requests": requests,
                "wrong": wrong,
                "tokens_per_s": tokens / (now - minute),
                "resident_bytes": machine.peak_resident_bytes(),
                "array_bytes": mx.get_active_memory(),
                "cache_bytes": mx.get_cache_memory(),
            }
            found.append(row)
            print(json.dumps(row), flush=True)
            minute, tokens = now, 0
    print(f"{requests} requests, {wrong} wrong")
    if arguments.output:
        arguments.output.write_text(json.dumps({"rows": found, **machine.provenance()}, indent=1))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
