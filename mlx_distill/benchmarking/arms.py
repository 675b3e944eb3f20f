"""The arms of a benchmark: what decodes a prompt, and what is measured of it.

All arms run in one process and take turns prompt by prompt, so that a machine whose speed drifts
does not decide.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx import nn
from tqdm import tqdm

from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.calibration.automatic import SWITCH, is_on
from mlx_distill.calibration.choosing import Choosing, choosing
from mlx_distill.calibration.pair import Pair
from mlx_distill.calibration.trial import MOST
from mlx_distill.core.sampling import Sampling
from mlx_distill.drafters.auto import AutoDrafter
from mlx_distill.drafters.protocol import Drafter, DraftPlan
from mlx_distill.errors import InputError
from mlx_distill.speculation.generation import stream_generate
from mlx_distill.target.target import Target

PLAIN, OURS = "mlx-lm", "mlx_distill"
DRAFT_MODEL, OUR_DRAFT_MODEL = (f"{name} with draft model" for name in (PLAIN, OURS))
# Of the tokens of a trial every second counts at the least: turns begin with some that do not.
COUNTED = 2


@dataclass
class Sample:
    """One prompt decoded by one arm.

    Args:
        tokens: The answer.
        tokens_per_s: Speed after the first token.
        first_token_s: Time to the first token.
        tokens_per_call: Tokens per call of the target.
        peak_memory_bytes: Of the arrays, during this decoding; every arm's models are loaded.
        target_calls: Calls of the target after the prompt.
        beam_tokens: Tokens of the trees' paths without shared prefixes.
        verified_tokens: Tokens that were verified.
        acceptance_by_depth: Share of the calls that accepted at least 1, 2, ... drafted tokens.
    """

    tokens: list[int]
    tokens_per_s: float
    first_token_s: float
    tokens_per_call: float
    peak_memory_bytes: int
    target_calls: int
    beam_tokens: int = 0
    verified_tokens: int = 0
    acceptance_by_depth: tuple[float, ...] = ()


@dataclass
class Bench:
    """A pair, its prompts and what is asked of it.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        drafter: Drafts for it.
        draft_model: A second model that drafts, in mlx-lm's own loop and in this one, or None.
        sampling: How tokens are drawn.
        config: How much is measured.
    """

    model: nn.Module
    tokenizer: Any
    drafter: Drafter
    draft_model: nn.Module | None
    sampling: Sampling
    config: BenchmarkConfig

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the model's activations."""
        embed = Target.of(self.model).embed
        assert embed is not None
        return embed(mx.array([0])).dtype

    def arms(self, plan: DraftPlan | None) -> dict[str, Callable[[list[int], int], Iterator[Any]]]:
        """Return what decodes a prompt, by name; each takes the prompt and a seed."""
        law, limit = self.sampling, self.config.max_tokens
        sampler = law.mlx_lm_sampler(Target.of(self.model).vocab_size)

        def plain(prompt: list[int], seed: int) -> Iterator[Any]:
            mx.random.seed(seed)
            return mlx_lm.stream_generate(
                self.model, self.tokenizer, prompt, limit, sampler=sampler
            )

        def with_draft_model(prompt: list[int], seed: int) -> Iterator[Any]:
            mx.random.seed(seed)
            return mlx_lm.stream_generate(
                self.model,
                self.tokenizer,
                prompt,
                limit,
                draft_model=self.draft_model,
                num_draft_tokens=self.config.num_draft_tokens,
                sampler=sampler,
            )

        def ours(prompt: list[int], seed: int, **drafts: Any) -> Iterator[Any]:
            settings = {"max_tokens": limit, "seed": seed, **asdict(law), **drafts}
            return stream_generate(self.model, self.tokenizer, prompt, **settings)

        drafted = partial(ours, drafter=self.drafter, plan=plan)
        if self.draft_model is None:
            return {PLAIN: plain, OURS: drafted}
        names = "num_draft_tokens", "draft_verification"
        how = {name: getattr(self.config, name) for name in names}
        our_model = partial(ours, draft_model=self.draft_model, **how)
        arms = {PLAIN: plain, DRAFT_MODEL: with_draft_model, OURS: drafted}
        return arms | {OUR_DRAFT_MODEL: our_model}

    def run(
        self, prompts: Sequence[list[int]], plan: DraftPlan | None, title: str
    ) -> dict[str, list[Sample]]:
        """Return the samples of every arm, after a prompt or more that do not count."""
        arms = self.arms(plan)
        samples: dict[str, list[Sample]] = {name: [] for name in arms}
        start = time.perf_counter()
        while True:
            for decode in arms.values():
                measure(decode, prompts[0], 0)
            if time.perf_counter() - start >= self.config.warm_up_s:
                break
        names = list(arms)
        for number, prompt in enumerate(tqdm(prompts, desc=title, unit="prompt", leave=False)):
            names.append(names.pop(0))  # no arm always follows the same other
            for name in names:
                samples[name].append(measure(arms[name], prompt, self.config.seed + number))
        return samples


def settled(
    pair: Pair, sampling: Sampling, prompts: Sequence[list[int]], max_tokens: int
) -> Choosing:
    """Return what has chosen among ways to draft, for which prompts are answered if need be.

    Args:
        pair: The target and an ``AutoDrafter``.
        sampling: How tokens are drawn.
        prompts: The last of them are answered first.
        max_tokens: The longest answer.

    Raises:
        InputError: If nothing is to be measured.
    """
    assert isinstance(pair.drafter, AutoDrafter)
    if not is_on():
        raise InputError(f"auto is found out by measuring, which {SWITCH}=0 leaves out")
    found = choosing(pair, pair.drafter, sampling.temperature > 0)
    drafting = {"drafter": pair.drafter, "cache": pair.cache, "exact_rows": pair.exact_rows}
    left, seeds, before = len(pair.drafter.arms) * MOST * COUNTED, itertools.count(), -1
    # Answers may all be so short that nothing of them counts.
    while found.trial.chosen is None and left > 0 and found.trial.tokens > before:
        before = found.trial.tokens
        for prompt in reversed(prompts):
            options = {"max_tokens": max_tokens, "seed": next(seeds), **asdict(sampling)}
            options |= drafting
            for _ in stream_generate(pair.model, pair.tokenizer, prompt, **options):
                left -= 1
            if found.trial.chosen is not None or left <= 0:
                break
    return found


def endless(tokenizer: Any) -> Any:
    """Return a tokenizer with which no text ends before all tokens are written.

    A chat that is cut may be answered with three tokens, and other prompts with one.
    """
    other = copy.copy(tokenizer)
    other.eos_token_ids = set()
    return other


def measure(
    decode: Callable[[list[int], int], Iterator[Any]], prompt: list[int], seed: int
) -> Sample:
    """Decode a prompt once."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    tokens: list[int] = []
    start = time.perf_counter()
    first = last = None
    own = 0
    for last in decode(prompt, seed):
        first = first or time.perf_counter()
        tokens.append(last.token)
        own += not last.from_draft
    end = time.perf_counter()
    if first is None or last is None:
        raise InputError("nothing was written, so there is nothing to measure")
    # Of mlx-lm: every token that was not drafted took a call, the first one that of the prefill;
    # a text may end within a draft, whose call brought no other.
    calls = getattr(last, "target_calls", own - 1 + last.from_draft)
    return Sample(
        tokens=tokens,
        tokens_per_s=(len(tokens) - 1) / max(end - first, 1e-9),
        first_token_s=first - start,
        tokens_per_call=len(tokens) / max(calls, 1),
        peak_memory_bytes=mx.get_peak_memory(),
        target_calls=max(calls, 1),
        beam_tokens=getattr(last, "beam_tokens", 0),
        verified_tokens=getattr(last, "verified_tokens", 0),
        acceptance_by_depth=getattr(last, "acceptance_by_depth", ()),
    )
