"""How several texts of a target are written fastest: timed once, and remembered.

    rows     our batches, in which drafts may be verified, too
    mlx-lm   mlx-lm's own generator of batches, for texts that need nothing else
    alone    one text after the other

The ways take turns of some steps each. Where a drafter is given, rows with its drafts are among
them: what they bring says whether anything is drafted, and what the planner begins with.

One file per machine, MLX version, target and number of texts, beside the calibrations.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_distill.calibration.automatic import is_on
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.store import drafter_hash, identity, recall, remember, say
from mlx_distill.calibration.timing import LOADED, Clock, time_in_turn, typical_spread
from mlx_distill.core.sampling import GREEDY, Sampling
from mlx_distill.drafters.ngram import NGramDrafter
from mlx_distill.drafters.nothing import NoDrafter
from mlx_distill.drafters.protocol import DraftPlan, FixedPlanner
from mlx_distill.errors import InputError
from mlx_distill.limits import is_finite
from mlx_distill.speculation.batch_planning import SHAPES, BatchPlanner
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request
from mlx_distill.target.batch.merged import takes_merged

Way: TypeAlias = Literal["rows", "mlx-lm", "alone"]
FORMAT, NOUN = 3, "choice of a batch"
_ATTRIBUTE = "_mlx_distill_batch_choices"
# Of what is timed: the prompt, the steps of a turn and those before them that are not timed; the
# longest text, and the turns. What is not begun after so many seconds is left out.
CONTEXT, STEPS, SETTLING, MOST_TOKENS = 32, 4, 1, 512
ROUNDS, LIMIT_S, MOST_S = 12, 6.0, 20.0
# Of what drafts bring the text that is timed, others are taken to have so much: the bundled pair's
# promise of 1.49 for four texts came to 1.25, that of 1.29 for eight to nothing. And they have to
# bring so many times as many tokens, or nothing is drafted: a planner that parks costs something.
KEPT, PAYS = 0.5, 1.15
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
        cycles: By drafter, of every shape what a cycle takes, in plain steps as rows, and the
            tokens that it adds to a text.
    """

    rows_s: float
    plain_s: float
    alone_s: float
    gains: dict[str, float] = field(default_factory=dict)
    cycles: dict[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> "Found":
        """Return what ``asdict`` made a dictionary of.

        Raises:
            InputError: If something is missing, or is no time, gain or cycle.
        """
        names = [one.name for one in fields(cls)]
        if not isinstance(values, dict) or values.keys() != set(names):
            raise InputError("it holds no times")
        rows_s, plain_s, alone_s, gains, cycles = (values[name] for name in names)
        if not all(one == math.inf or _is_above_0(one) for one in (rows_s, plain_s, alone_s)):
            raise InputError("it holds no times")
        if not isinstance(gains, dict) or not all(map(_is_above_0, gains.values())):
            raise InputError("it holds no gains")
        if not isinstance(cycles, dict) or not all(map(_are_cycles, cycles.values())):
            raise InputError("it holds no cycles")
        found = cls(rows_s, plain_s, alone_s, gains)
        for drafter, pairs in cycles.items():
            found.cycles[drafter] = [(price, tokens) for price, tokens in pairs]
        return found

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
        sampled: Whether tokens are drawn, and not the likeliest.
    """

    def __init__(self, pair: Pair, num_texts: int, sampled: bool = False):
        self.num_texts, self.sampled, self._drafter = num_texts, sampled, None
        # What n-grams find in the text that is timed says nothing of other texts.
        self._foretells = not isinstance(pair.drafter, NoDrafter | NGramDrafter)
        if not isinstance(pair.drafter, NoDrafter):
            name = f"{type(pair.drafter).__name__} {drafter_hash(pair.drafter)}".strip()
            self._drafter = f"{name} drawn" if sampled else name
        undrafted = replace(pair, drafter=NoDrafter())
        self._known = identity(undrafted) | {"batches": FORMAT, "texts": num_texts}
        self.found = self._read()

    def way(self, pair: Pair) -> Way:
        """Return the fastest way; at the first use it is timed."""
        self.found = self.found or self._read()  # others may have timed it by now
        if self.found is None or (self._foretells and self._drafter not in self.found.gains):
            say(f"timing batches of {self.num_texts} texts, for some seconds")
            self._time(pair)
        assert self.found is not None
        return self.found.way(self._drafter)

    def _time(self, pair: Pair) -> None:
        law = Sampling(temperature=1.0) if self.sampled else GREEDY
        drafter = self._drafter if self._foretells else None
        found, spread = timed(pair, self.num_texts, drafter, law)
        if spread > LOADED:  # other programs have decided that
            found = Found(found.rows_s, math.inf, math.inf)
        before = self.found or found
        self.found = replace(
            found, gains={**before.gains, **found.gains}, cycles={**before.cycles, **found.cycles}
        )
        if spread <= LOADED:
            self._keep()

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted: unless that is known to bring nothing."""
        found, drafter = self.found, self._drafter
        return found is None or drafter is None or found.gains.get(drafter, math.inf) >= PAYS

    def teach(self, planner: BatchPlanner, num_texts: int) -> None:
        """Let a planner begin with what was timed."""
        if self.found is None or self._drafter not in self.found.cycles:
            return
        cycles = self.found.cycles[self._drafter]
        planner.begin_with(num_texts, dict(zip(SHAPES, cycles, strict=False)))

    @property
    def drafts_pay(self) -> bool:
        """Whether rows with drafts are known to be the fastest way, by what drafts brought."""
        found, drafter = self.found or self._read(), self._drafter
        if found is None or drafter is None or found.gains.get(drafter, 0.0) <= 1:
            return False
        return found.way(drafter) == "rows"

    def learn(self, gain: float | None) -> None:
        """Take note of what drafts have brought these texts; others' count as much."""
        found, drafter = self._read(), self._drafter
        if gain is not None and drafter is not None and found is not None:
            gain = (gain + found.gains.get(drafter, gain)) / 2
            self.found = replace(found, gains={**found.gains, drafter: gain})
            self._keep()

    def _read(self) -> Found | None:
        return recall(self._known, NOUN, lambda values: Found.from_dict(values["found"]))

    def _keep(self) -> None:
        assert self.found is not None
        remember(self._known, NOUN, {"found": asdict(self.found)})


def _is_above_0(value: object) -> bool:
    return is_finite(value) and value > 0


def _are_cycles(values: object) -> bool:
    """Return whether these are pairs of a price and of tokens."""
    pairs = values if isinstance(values, list | tuple) else [None]
    return all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_above_0, pair))
        for pair in pairs
    )


def timed(
    pair: Pair,
    num_texts: int,
    drafter: str | None = None,
    law: Sampling = GREEDY,
    clock: Clock = time.perf_counter,
) -> tuple[Found, float]:
    """Return what steps of so many texts take, and how far the times of one way differ.

    Args:
        pair: A model and its drafter.
        num_texts: That are written at the same time.
        drafter: What its drafts are noted under; None if nothing is to be drafted.
        law: How tokens are drawn where something is drafted.
        clock: Returns the seconds since some time.
    """
    tasks: dict[Way | DraftPlan, _Steps] = {
        "rows": _Steps(pair, num_texts, num_texts),
        **(
            {"mlx-lm": _Steps(pair, num_texts, num_texts, plain=True)}
            if takes_merged(pair.model)
            else {}
        ),
        **{
            shape: _Steps(pair, num_texts, num_texts, shape, law)
            for shape in (SHAPES if drafter is not None else ())
        },
        "alone": _Steps(pair, 1, 1),
    }
    try:
        times = time_in_turn(tasks, ROUNDS, LIMIT_S, clock, until=clock() + MOST_S)
    finally:
        for task in tasks.values():
            task.close()
    seconds = {name: one.median_s for name, one in times.items()}
    rows_s, alone_s = seconds["rows"], num_texts * seconds.get("alone", math.inf)
    found = Found(rows_s, seconds.get("mlx-lm", math.inf), alone_s)
    cycles = [
        (seconds[shape] / rows_s, tasks[shape].tokens) for shape in SHAPES if shape in seconds
    ]
    if drafter is not None and cycles:
        gain = 1 + KEPT * (max(tokens / price for price, tokens in cycles) - 1)
        found = replace(found, gains={drafter: gain}, cycles={drafter: cycles})
    return found, typical_spread(times.values())


class _Steps:
    """A task: some steps of texts that are written together, which go on the next time.

    Args:
        pair: A model and its drafter.
        num_texts: Are written.
        batch: So many at a time.
        plan: What is drafted; None for nothing.
        law: How tokens are drawn.
        plain: Whether mlx-lm's own generator writes.
    """

    def __init__(
        self,
        pair: Pair,
        num_texts: int,
        batch: int,
        plan: DraftPlan | None = None,
        law: Sampling = GREEDY,
        *,
        plain: bool = False,
    ):
        drafter = None if plan is None else pair.drafter
        self._engine = Engine(pair.model, pair.tokenizer, drafter, batch=batch, plain_batches=plain)
        text, planner = pair.tokens(CONTEXT + num_texts), FixedPlanner(plan or DraftPlan())
        self._requests = [
            Request(
                mx.array(text[place : place + CONTEXT], mx.int32),
                max_tokens=MOST_TOKENS,
                sampling=law,
                seed=place,
                planner=planner,
                cache=pair.cache,
            )
            for place in range(num_texts)
        ]
        self._made = self._tokens = 0

    def __call__(self, clock: Clock) -> float:
        """Return the seconds of a step."""
        if len(self._engine.texts) < len(self._requests):  # at first, and where some have ended
            self.close()
            for request in self._requests:
                self._engine.submit(request)
            self._engine.step()
        for _ in range(SETTLING):
            self._engine.step()
        start = clock()
        self._tokens += sum(len(self._engine.step()) for _ in range(STEPS))
        took = clock() - start
        self._made += STEPS * len(self._requests)
        mx.synchronize(generation_stream)  # what is on its way is not the next one's
        return took / STEPS

    @property
    def tokens(self) -> float:
        """How many tokens a step adds to a text."""
        return self._tokens / self._made

    def close(self) -> None:
        """End the texts."""
        self._engine.close()


def batch_choice(pair: Pair, num_texts: int, sampled: bool = False) -> BatchChoice | None:
    """Return what chooses how texts of a pair are written; None where nothing is to be measured."""
    if not is_on() or num_texts < 2 or pair.exact_rows or not pair.target.takes_batches:
        return None
    known: dict[object, BatchChoice] | None = pair.model.__dict__.get(_ATTRIBUTE)
    if known is None:
        known = {}
        object.__setattr__(pair.model, _ATTRIBUTE, known)
    num_texts = 2 ** (num_texts - 1).bit_length()  # what was found serves a few texts fewer
    key = type(pair.drafter), drafter_hash(pair.drafter), pair.cache, num_texts, sampled
    if key not in known:
        known[key] = BatchChoice(pair, num_texts, sampled)
    return known[key]
