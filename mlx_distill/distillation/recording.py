"""What a target computes of a text while it is written, kept for those who learn from it.

A drafter is shown all of that anyway: what the head saw at every token, from which its distribution
follows, and what the tapped layers returned. So nothing is computed for it; a part of the rows is
taken as they come, and the host looks at them when the text has ended.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.arrays import all_finite, to_host
from mlx_distill.core.draft import Draft
from mlx_distill.drafters.protocol import DraftPlan, DraftState, Features

MOST_ROWS = 4096  # of a text; what follows is not kept
GATHERED = 16  # calls whose rows are taken together: until then those of rejected nodes are there


@dataclass(frozen=True)
class HeardText:
    """A text that was written, with what the target computed at each of its tokens.

    Args:
        tokens: The end of the prompt, and the answer.
        hidden: What the target's head saw.
        taps: What the tapped layers returned.
        num_prompt: How many of the tokens are the prompt's, at least 1.
    """

    tokens: list[int]
    hidden: Float[mx.array, "T D"]
    taps: tuple[Float[mx.array, "T _"], ...]
    num_prompt: int

    def until(self, ends: set[int]) -> "HeardText":
        """Return the text before its first end; what follows in a call was never written."""
        answer = self.tokens[self.num_prompt :]
        count = next((place for place, token in enumerate(answer) if token in ends), len(answer))
        rows = slice(min(self.num_prompt + count, MOST_ROWS))
        taps = tuple(tap[rows] for tap in self.taps)
        return HeardText(self.tokens[rows], self.hidden[rows], taps, self.num_prompt)

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are; others would stay in the moments of whoever learns from them."""
        return all_finite(self.hidden, *self.taps)

    @property
    def ahead(self) -> list[int]:
        """How many tokens of the answer follow each, as a ``TargetView`` counts them."""
        count = len(self.tokens)
        return [-1] * (self.num_prompt - 1) + list(range(count - self.num_prompt, -1, -1))


class _Part(NamedTuple):
    """What one call made text; arrays may have rows behind the last token."""

    tokens: mx.array
    hidden: mx.array
    taps: tuple[mx.array, ...]


class Recording:
    """A text's drafting state that also keeps what it is shown.

    Args:
        state: Drafts.
        prompt: The tokens before the first root.
        features: Those of the last of them.
    """

    def __init__(self, state: DraftState, prompt: Int[mx.array, " T"], features: Features):
        self._state = state
        count = min(prompt.size, features.hidden.shape[0])
        hidden, taps = features.hidden[-count:], tuple(tap[-count:] for tap in features.tapped)
        self._parts: list[_Part | int] = [_Part(prompt[-count:], hidden, taps)]
        self._num_prompt, self._num_rows = count, count

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft | None:
        """Return what the state drafts."""
        return self._state.draft(root, plan, noise)

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Keep what a call made text, and show it to the state."""
        self._state.accept(tokens, features)
        if self._num_rows < MOST_ROWS:
            self._num_rows += tokens.size
            self._parts.append(_Part(tokens, features.hidden, features.tapped))
            if len(self._parts) % GATHERED == 0:
                mx.async_eval([part for part in self._parts[-GATHERED:] if isinstance(part, _Part)])

    def rewind(self, num_tokens: int) -> None:
        """Forget the last tokens."""
        self._state.rewind(num_tokens)
        self._parts.append(num_tokens)

    def text(self) -> HeardText:
        """Return the text so far; this waits for the device."""
        parts = list(self._whole_parts())
        tokens = [token for ids, _, _ in parts for token in ids]
        hidden = mx.concatenate([states for _, states, _ in parts])
        taps = tuple(mx.concatenate(list(tap)) for tap in zip(*(p[2] for p in parts), strict=True))
        mx.eval(hidden, taps)
        return HeardText(tokens, hidden, taps, self._num_prompt)

    def _whole_parts(self) -> Iterator[tuple[list[int], mx.array, tuple[mx.array, ...]]]:
        """Yield the tokens of every part and their rows, without those that were forgotten."""
        kept: list[tuple[list[int], _Part]] = []
        for part in self._parts:
            if isinstance(part, _Part):
                kept.append(([token for token in to_host(part.tokens) if token >= 0], part))
                continue
            for place in range(len(kept) - 1, 0, -1):  # the prompt is never forgotten
                ids, rows = kept[place]
                kept[place] = ids[: max(0, len(ids) - part)], rows
                part -= min(part, len(ids))
        for ids, part in kept:
            count = slice(len(ids))
            yield ids, part.hidden[count], tuple(tap[count] for tap in part.taps)
