"""How several texts of a target are written fastest: timed once, and remembered.

    rows     our batches, in which drafts may be verified, too
    mlx-lm   mlx-lm's own generator of batches, for texts that need nothing else
    alone    one text after the other

One file per machine, MLX version, target and number of texts, beside the calibrations.
"""

import math
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, TypeAlias

import mlx.core as mx

from mlx_distill.calibration.automatic import is_on
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.store import drafter_hash, identity, recall, remember, say
from mlx_distill.calibration.timing import LOADED, Clock, Task, time_in_turn, typical_spread
from mlx_distill.drafters.nothing import NoDrafter
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request

Way: TypeAlias = Literal["rows", "mlx-lm", "alone"]
FORMAT, NOUN = 1, "choice of a batch"
_ATTRIBUTE = "_mlx_distill_batch_choices"
# Of what is timed: the prompt, the steps of a run and those of them before it is in its stride.
CONTEXT, STEPS, SETTLING = 32, 12, 3
ROUNDS, LIMIT_S = 5, 4.0
# Rows stay unless something else takes so much less time: they alone can be drafted for.
CLEARLY = 0.97


@dataclass(frozen=True)
class Found:
    """What was found about batches of so many texts.

    Args:
        rows_s: Seconds of a plain step of all of them, as rows.
        plain_s: The same of mlx-lm's own generator.
        alone_s: Seconds of as many steps one after the other.
        gains: How many times as many tokens drafts bring in that time, by drafter; without those of
            which that is not known.
    """

    rows_s: float
    plain_s: float
    alone_s: float
    gains: dict[str, float] = field(default_factory=dict)

    def way(self, drafter: str | None) -> Way:
        """Return the fastest way.

        Where something else is faster than plain rows, what drafts bring there is found out first.

        Args:
            drafter: Who drafts; None for nobody.
        """
        gain = 1.0 if drafter is None else self.gains.get(drafter)
        if gain is None:
            return "rows"
        rows_s = CLEARLY * self.rows_s / max(1.0, gain)
        if min(self.plain_s, self.alone_s) >= rows_s:
            return "rows"
        return "mlx-lm" if self.plain_s <= self.alone_s else "alone"


class BatchChoice:
    """Chooses how texts are written together.

    Args:
        pair: A model and its drafter; ``NoDrafter`` for none.
        num_texts: That are written at the same time.
    """

    def __init__(self, pair: Pair, num_texts: int):
        self.num_texts, self._drafter = num_texts, None
        if not isinstance(pair.drafter, NoDrafter):
            self._drafter = f"{type(pair.drafter).__name__} {drafter_hash(pair.drafter)}".strip()
        undrafted = replace(pair, drafter=NoDrafter())
        self._known = identity(undrafted) | {"batches": FORMAT, "texts": num_texts}
        self.found = self._read()

    def way(self, pair: Pair) -> Way:
        """Return the fastest way; at the first use it is timed."""
        self.found = self.found or self._read()  # others may have timed it by now
        if self.found is None:
            say(f"timing batches of {self.num_texts} texts once, for some seconds")
            self.found, spread = timed(pair, self.num_texts)
            if spread > LOADED:  # other programs have decided that
                self.found = replace(self.found, plain_s=math.inf, alone_s=math.inf)
            else:
                self._keep()
        return self.found.way(self._drafter)

    @property
    def drafts_pay(self) -> bool:
        """Whether rows with drafts are known to be the fastest way, by what drafts brought."""
        found, drafter = self.found or self._read(), self._drafter
        if found is None or drafter is None or found.gains.get(drafter, 0.0) <= 1:
            return False
        return found.way(drafter) == "rows"

    def learn(self, gain: float | None) -> None:
        """Take note of what drafts have brought."""
        found, drafter = self._read(), self._drafter
        if gain is not None and drafter is not None and found is not None:
            self.found = replace(found, gains={**found.gains, drafter: gain})
            self._keep()

    def _read(self) -> Found | None:
        return recall(self._known, NOUN, lambda values: Found(**values["found"]))

    def _keep(self) -> None:
        assert self.found is not None
        remember(self._known, NOUN, {"found": asdict(self.found)})


def timed(pair: Pair, num_texts: int, clock: Clock = time.perf_counter) -> tuple[Found, float]:
    """Return what steps of so many texts take, and how far the times of one way differ."""
    tasks: dict[Way, Task] = {
        "rows": _steps(pair, num_texts, num_texts, plain=False),
        "mlx-lm": _steps(pair, num_texts, num_texts, plain=True),
        "alone": _steps(pair, 1, 1, plain=False),
    }
    times = time_in_turn(tasks, ROUNDS, LIMIT_S, clock)
    rows_s, plain_s, alone_s = (times[way].median_s for way in tasks)
    return Found(rows_s, plain_s, num_texts * alone_s), typical_spread(times.values())


def _steps(pair: Pair, num_texts: int, batch: int, *, plain: bool) -> Task:
    """Return what writes some tokens of texts together, and returns the seconds of a step."""
    prompt = mx.array(pair.tokens(CONTEXT), mx.int32)
    request = Request(prompt, max_tokens=SETTLING + STEPS + 2, cache=pair.cache)

    def run(clock: Clock) -> float:
        engine = Engine(pair.model, pair.tokenizer, batch=batch, plain_batches=plain)
        try:
            for _ in range(num_texts):
                engine.submit(request)
            seconds = []
            for _ in range(SETTLING + STEPS):
                start = clock()
                engine.step()
                seconds.append(clock() - start)
        finally:
            engine.close()
        return statistics.median(seconds[SETTLING:])

    return run


def batch_choice(pair: Pair, num_texts: int) -> BatchChoice | None:
    """Return what chooses how texts of a pair are written; None where nothing is to be measured."""
    if not is_on() or num_texts < 2 or pair.exact_rows or not pair.target.takes_batches:
        return None
    known: dict[object, BatchChoice] | None = pair.model.__dict__.get(_ATTRIBUTE)
    if known is None:
        known = {}
        object.__setattr__(pair.model, _ATTRIBUTE, known)
    num_texts = 2 ** (num_texts - 1).bit_length()  # what was found serves a few texts fewer
    key = type(pair.drafter), drafter_hash(pair.drafter), pair.cache, num_texts
    if key not in known:
        known[key] = BatchChoice(pair, num_texts)
    return known[key]
