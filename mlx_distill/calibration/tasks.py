"""What is timed: a call of the target, a draft, and some cycles of decoding as a whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_distill.blas.openblas import drafting_threads
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.timing import Clock, Task
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.sampling import Sampling
from mlx_distill.drafters.protocol import DraftPlan, Features, FixedPlanner
from mlx_distill.speculation.caching import PromptCache
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request
from mlx_distill.target.prompt_cache import prompt_caches

# The shapes of the drafts of cycles that are timed whole: a tree, and a line.
PLAN, LINE = DraftPlan(), DraftPlan(1, 4, 5)
# Prompt of what is timed whole; with a longer one most of the time would be spent reading it.
MOST_PROMPT = 16


@dataclass(frozen=True)
class Reading:
    """A text that the target has read, and what follows it.

    Args:
        pair: A model and its drafter.
        caches: Hold the text.
        root: The token that follows.
        state: The drafter's.
    """

    pair: Pair
    caches: PromptCache
    root: mx.array
    state: Any

    @classmethod
    def of(cls, pair: Pair, context: int) -> "Reading":
        """Read a text of so many tokens."""
        tokens = mx.array(pair.tokens(context + 1))
        caches = prompt_caches(pair.model, pair.cache.max_kv_size)

        def features_of(read: mx.array) -> Features:
            _, hidden, taps = pair.target.observe(read, caches, pair.drafter.taps)
            pair.cache.quantize(caches)
            mx.eval(hidden, taps, [cache.state for cache in caches])
            return Features(hidden, None, taps)

        step, prompt = pair.cache.prefill_step_size, max(1, context - 1)
        starts = range(0, prompt, step)
        *_, features = [features_of(tokens[start : min(start + step, prompt)]) for start in starts]
        state = pair.drafter.open(tokens[:prompt], features)
        if prompt < context:  # a first draft reads the prompt, and is like no other
            last = tokens[prompt:context]
            state.draft(last, PLAN, None)
            state.accept(last.astype(mx.int32), features_of(last))
        return cls(pair, caches, tokens[-1:], state)

    def call(self, rows: int) -> Task:
        """Return what calls the target on a tree of so many nodes."""
        tokens = mx.array(self.pair.tokens(rows), mx.int32)
        parents = mx.maximum(mx.arange(rows) - 1, 0) // 2
        depth = rows.bit_length() - 1
        tree = PrefixTree.from_parents(tokens, parents.astype(mx.int32), depth)
        if self.pair.target.prefers_lines:
            tree = PrefixTree.chain(tokens)
        mx.eval(tree.tokens, tree.parents, tree.mask, tree.depths)

        def timed(clock: Clock) -> float:
            with drafting_threads():
                start = clock()
                call = self.pair.target.verify(tree, self.caches)
                mx.eval(call.logits, call.hidden)
                took = clock() - start
            call.commit([0])
            call.rewind(0)
            return took

        return _with_memory(timed)

    def draft(self, plan: DraftPlan) -> Task:
        """Return what drafts."""

        def timed(clock: Clock) -> float:
            with drafting_threads():
                start = clock()
                draft = self.state.draft(self.root, plan, None)
                if draft is not None:
                    mx.eval(draft.tokens, draft.parents, draft.depths, draft.scores)
                return clock() - start

        return _with_memory(timed)


def _with_memory(task: Task) -> Task:
    """Return what does something twice and times the second.

    Decoding begins by letting all free memory go. What comes after it makes its own anew, which can
    be a third of its time, and in the midst of a text nothing has to.
    """

    def timed(clock: Clock) -> float:
        task(clock)
        return task(clock)

    return timed


class Decoding:
    """Decodes a few cycles at a time.

    Args:
        pair: A model and its drafter.
        plan: The shape of the drafts; None decodes plainly, by mlx-lm's loop.
        sampling: How tokens are drawn.
        context: There is room for; the prompt is no longer.
        cycles: How many are timed at once.
    """

    def __init__(
        self, pair: Pair, plan: DraftPlan | None, sampling: Sampling, context: int, cycles: int
    ):
        self.cycles = cycles
        self.engine = Engine(pair.model, pair.tokenizer, None if plan is None else pair.drafter)
        self.planner = FixedPlanner(plan or PLAN)
        self.prompt = mx.array(pair.tokens(min(context, MOST_PROMPT)))
        self.sampling, self.cache = sampling, pair.cache
        # What a call verified and added to the text, the latest time.
        self.nodes, self.tokens = 0, 0.0

    def __call__(self, clock: Clock) -> float:
        """Return the seconds of a cycle."""
        most = 8 * self.cycles
        request = Request(
            self.prompt, most, self.sampling, seed=0, planner=self.planner, cache=self.cache
        )
        number = self.engine.submit(request)
        # The first cycle waits for what the first token did not wait for: it tells of no other.
        marks = [(clock(), *counts) for counts in self._counts()]
        marks = marks[1:] if len(marks) > 2 else marks
        self.engine.cancel(number)
        pairs = zip(marks[0], marks[-1], strict=True)
        took_s, calls, nodes, tokens = (last - first for first, last in pairs)
        calls = max(1, calls)
        self.nodes, self.tokens = round(nodes / calls), tokens / calls
        return took_s / calls

    def _counts(self) -> Iterator[tuple[int, int, int]]:
        """Yield calls, nodes and tokens so far, once a cycle, when its first token is there."""
        seen = -1
        while self.engine.busy and seen < self.cycles:
            for one in self.engine.step():
                if one.response.target_calls > seen:
                    seen = one.response.target_calls
                    yield seen, one.response.verified_tokens, one.response.generation_tokens
