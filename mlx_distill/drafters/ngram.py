"""The n-gram drafter: what followed the last few tokens where the text had them before.

    text    the cat sat on the mat . the cat        draft   sat on the mat

It has no weights and costs nothing to train. Where an answer repeats its prompt (summaries, answers
from a context, edits of code) whole phrases are drafted; where nothing repeats, nothing is, and the
target decodes plainly.

Source:
    Saxena 2023, "Prompt lookup decoding"; Yang et al. 2023, arXiv:2304.04487.
"""

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.arrays import to_host
from mlx_distill.core.draft import Draft
from mlx_distill.drafters.protocol import DraftPlan, Features
from mlx_distill.errors import InputError


class NGramDrafter:
    """A ``Drafter`` for any target that looks the text's last tokens up in the text itself.

    Args:
        longest: It looks for so many last tokens first, then for fewer.
        shortest: Fewer than these are not looked for: what followed them would be chance.

    Raises:
        InputError: If the numbers are out of order.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, longest: int = 4, shortest: int = 2):
        if not 1 <= shortest <= longest <= 16:
            raise InputError(
                f"an n-gram drafter needs 1 <= shortest <= longest <= 16, "
                f"got {shortest} and {longest}"
            )
        self.sizes = range(longest, shortest - 1, -1)

    def open(self, prompt: Int[mx.array, " T"], features: Features) -> "NGramState":
        """Return the state of a text that begins with a prompt."""
        state = NGramState(self.sizes)
        state.extend(to_host(prompt))
        return state


class NGramState:
    """A text and where each of its n-grams ends.

    Args:
        sizes: Lengths of the n-grams, the longest first.
    """

    def __init__(self, sizes: range):
        self.sizes = sizes
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: list[int]) -> None:
        """Put tokens behind the text."""
        for token in tokens:
            self.tokens.append(token)
            for ngram in self._last(self.tokens):
                self._ends.setdefault(ngram, []).append(len(self.tokens))

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft | None:
        """Return what followed the last tokens where they stood before, or None."""
        text = [*self.tokens, *to_host(root)]
        for ngram in self._last(text):
            if ngram in self._ends:
                end = self._ends[ngram][-1]
                return Draft.chain(root, text[end : end + plan.draft_length])
        return None

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Put what became text behind it; this waits for the target."""
        self.extend([token for token in to_host(tokens) if token >= 0])

    def rewind(self, num_tokens: int) -> None:
        """Take the last tokens away again."""
        for _ in range(num_tokens):
            for ngram in self._last(self.tokens):
                self._ends[ngram].pop()
                if not self._ends[ngram]:
                    del self._ends[ngram]
            self.tokens.pop()

    def _last(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """Return the n-grams that end a text, the longest first."""
        return [tuple(tokens[-size:]) for size in self.sizes if size <= len(tokens)]
