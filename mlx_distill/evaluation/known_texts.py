"""Texts that are known, as their target saw them, and drafts behind every token of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.arrays import log_probs, to_number
from mlx_distill.core.draft import Draft
from mlx_distill.core.posterior_noise import noise_behind
from mlx_distill.distillation.responses import Response
from mlx_distill.distillation.target_reader import TargetReader, text_of
from mlx_distill.drafters.protocol import (
    Drafter,
    DraftPlan,
    DraftsEverywhere,
    Features,
    LooksBack,
)
from mlx_distill.evaluation.met import Met
from mlx_distill.target.target import Target

READ_AT_ONCE = 8192  # tokens of answers and prompts, padding among them
PLACES_AT_ONCE = 256  # drafts

# Of the number of an answer, its tokens and the target's logits of them: what was added to those
# logits before the best was taken, a row per token.
Noise = Callable[[int, Int[mx.array, " T"], Float[mx.array, "T V"]], Float[mx.array, "T V"]]


@dataclass(frozen=True)
class KnownText:
    """An answer of a target.

    Args:
        row: Its number.
        prompt: What it answers.
        tokens: The answer.
        features: Of the token before each of the answer's, and of earlier ones.
        earlier: How many there are of those.
        agreed: How many of the tokens are the target's best.
        noise: What the tokens were drawn with; None if the best were taken.
    """

    row: int
    prompt: Int[mx.array, " P"]
    tokens: Int[mx.array, " T"]
    features: Features
    earlier: int
    agreed: int
    noise: Float[mx.array, "T V"] | None

    def met(self, drafter: Drafter, plan: DraftPlan) -> Met:
        """Return what drafts behind all tokens but the last have of the text."""
        if isinstance(drafter, DraftsEverywhere):
            drafts = self._at_once(drafter, plan)
        else:
            drafts = self._one_by_one(drafter, plan)
        ahead = self._ahead(plan.draft_length)
        parts, first = [], 0
        for draft, count in drafts:
            follows = ahead[first : first + count]
            parts.append(Met.nothing(count) if draft is None else Met.of(draft, follows))
            first += count
        return Met.joined(parts)

    def _ahead(self, length: int) -> Int[np.ndarray, "S L"]:
        """Return the tokens behind every place; -1 where the text has ended."""
        tokens = np.concatenate([np.array(self.tokens), np.full(length, -1)])
        return np.lib.stride_tricks.sliding_window_view(tokens[1:], length)[: self.tokens.size - 1]

    def _at_once(
        self, drafter: DraftsEverywhere, plan: DraftPlan
    ) -> Iterator[tuple[Draft | None, int]]:
        looks_back = isinstance(drafter, LooksBack) and drafter.look_back > 1
        before = self.prompt[self.prompt.size - self.earlier :]
        roots = mx.concatenate([before, self.tokens])
        for first in range(0, self.tokens.size - 1, PLACES_AT_ONCE):
            end = min(first + PLACES_AT_ONCE, self.tokens.size - 1)
            noise = self._noise(first + 1, end - first + plan.draft_length - 1)
            begin = 0 if looks_back else self.earlier + first
            rows = slice(begin, self.earlier + end)
            there = self.features.rows(rows)
            earlier = self.earlier + first - begin
            yield drafter.draft_everywhere(roots[rows], there, plan, noise, earlier), end - first

    def _one_by_one(self, drafter: Drafter, plan: DraftPlan) -> Iterator[tuple[Draft | None, int]]:
        seen, first = self.features, self.earlier
        state = drafter.open(self.prompt, seen.rows(slice(first + 1)))
        for place in range(self.tokens.size - 1):
            root = self.tokens[place : place + 1]
            draft = state.draft(root, plan, self._noise(place + 1, plan.draft_length))
            if draft is not None:
                tokens, parents = draft.tokens[None], draft.parents[None]
                depths, scores = draft.depths[None], draft.scores[None]
                draft = Draft(tokens, parents, depths, scores, draft.max_depth)
            yield draft, 1
            state.accept(root, seen.rows(slice(first + place + 1, first + place + 2)))

    def _noise(self, first: int, count: int) -> Float[mx.array, "N V"] | None:
        """Return rows of noise; behind the text's end, where they decide nothing, zeros."""
        if self.noise is None:
            return None
        rows = self.noise[first : first + count]
        return mx.pad(rows, [(0, count - rows.shape[0]), (0, 0)])


def known_texts(
    drafter: Drafter, target: Target, answers: Sequence[Response], noise: Noise | None = None
) -> Iterator[KnownText]:
    """Yield the answers of two tokens and more as their target sees them.

    Args:
        drafter: What it wants to see of the target is kept.
        target: Wrote the answers.
        answers: The answers.
        noise: What they were drawn with; None if they were written at temperature 0.
    """
    before = drafter.look_back - 1 if isinstance(drafter, LooksBack) else 0
    reader = TargetReader(target, drafter.taps, len(answers), before)
    for rows in _read_together(answers):
        view = reader.view([text_of(answers[row]) for row in rows], by_length=False)
        ends = np.flatnonzero(np.array(view.ahead) == 0)
        for row, end in zip(rows, ends.tolist(), strict=True):
            there = slice(end + 1 - len(answers[row].response), end + 1)
            tokens = mx.array(answers[row].response)
            logits = reader.answers.logits(view.goals[there])
            agreed = int(to_number((mx.argmax(logits, axis=-1) == tokens).sum()))
            drawn = None if noise is None else noise(row, tokens, logits)
            prompt = mx.array(answers[row].prompt)
            earlier = min(before, prompt.size - 1)
            seen = Features(view.hidden, None, view.taps).rows(
                slice(there.start - earlier, end + 1)
            )
            yield KnownText(row, prompt, tokens, seen, earlier, agreed, drawn)


def _read_together(answers: Sequence[Response]) -> Iterator[list[int]]:
    """Yield which answers are read at once: those of similar length, the longest first."""
    longer = [row for row, one in enumerate(answers) if len(one.response) > 1]
    size = [len(one.prompt) + len(one.response) for one in answers]
    longer.sort(key=lambda row: -size[row])
    while longer:
        count = max(1, READ_AT_ONCE // size[longer[0]])
        yield longer[:count]
        longer = longer[count:]


def posterior_noise(temperature: float, seed: int = 0) -> Noise:
    """Return what draws the noise of answers that a target drew at a temperature."""

    def noise(row: int, tokens: mx.array, logits: mx.array) -> mx.array:
        law = log_probs(log_probs(logits) / temperature)
        return temperature * noise_behind(law, tokens, mx.random.key(seed * 1_000_003 + row))

    return noise
