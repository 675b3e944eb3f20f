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
from mlx_distill.drafters.protocol import Drafter, DraftPlan, DraftsEverywhere, Features
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
        features: Of the token before each of the answer's.
        agreed: How many of the tokens are the target's best.
        noise: What the tokens were drawn with; None if the best were taken.
    """

    row: int
    prompt: Int[mx.array, " P"]
    tokens: Int[mx.array, " T"]
    features: Features
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
        for first in range(0, self.tokens.size - 1, PLACES_AT_ONCE):
            end = min(first + PLACES_AT_ONCE, self.tokens.size - 1)
            noise = self._noise(first + 1, end - first + plan.draft_length - 1)
            there = self._features(slice(first, end))
            yield drafter.draft_everywhere(self.tokens[first:end], there, plan, noise), end - first

    def _one_by_one(self, drafter: Drafter, plan: DraftPlan) -> Iterator[tuple[Draft | None, int]]:
        state = drafter.open(self.prompt, self._features(slice(0, 1)))
        for place in range(self.tokens.size - 1):
            root = self.tokens[place : place + 1]
            draft = state.draft(root, plan, self._noise(place + 1, plan.draft_length))
            if draft is not None:
                tokens, parents = draft.tokens[None], draft.parents[None]
                depths, scores = draft.depths[None], draft.scores[None]
                draft = Draft(tokens, parents, depths, scores, draft.max_depth)
            yield draft, 1
            state.accept(root, self._features(slice(place + 1, place + 2)))

    def _features(self, rows: slice) -> Features:
        return Features(
            self.features.states[rows], None, tuple(x[rows] for x in self.features.taps)
        )

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
    reader = TargetReader(target, drafter.taps, len(answers))
    for rows in _read_together(answers):
        view = reader.view([text_of(answers[row]) for row in rows], by_length=False)
        ends = np.flatnonzero(np.array(view.ahead) == 0)
        for row, end in zip(rows, ends.tolist(), strict=True):
            there = slice(end + 1 - len(answers[row].response), end + 1)
            tokens = mx.array(answers[row].response)
            logits = reader.answers.logits(view.goals[there])
            agreed = int(to_number((mx.argmax(logits, axis=-1) == tokens).sum()))
            drawn = None if noise is None else noise(row, tokens, logits)
            features = Features(view.hidden[there], None, tuple(tap[there] for tap in view.taps))
            yield KnownText(row, mx.array(answers[row].prompt), tokens, features, agreed, drawn)


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
