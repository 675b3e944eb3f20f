"""What a target computes at its own answers, kept for those who learn from it or judge by it."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_distill.data.texts import Text, text_batch
from mlx_distill.distillation.drafter import TargetView, answer_places, joined_views
from mlx_distill.distillation.responses import Response
from mlx_distill.distillation.teachers import Answers
from mlx_distill.errors import InputError
from mlx_distill.target.taps import tapped
from mlx_distill.target.target import Target


class TargetReader:
    """Reads answers with their target.

    Args:
        target: Wrote them; it has an embedding.
        taps: Numbers of the layers whose outputs are kept, too.
        batch_size: Answers read at once.
        look_back: How many tokens of a prompt, from its last, are kept, too.

    Attributes:
        answers: The target's logits, a few at a time.
    """

    def __init__(self, target: Target, taps: Sequence[int], batch_size: int, look_back: int = 0):
        assert target.embed is not None
        self.target = target
        self.embed = target.embed
        self.taps = taps
        self.batch_size = batch_size
        self.look_back = look_back
        self.answers = Answers(target.model, texts=True)

    @property
    def row_bytes(self) -> int:
        """What is kept of a token of an answer."""
        kept = (1 + len(self.taps)) * self.target.hidden_size
        kept += 0 if self.answers.body else self.target.vocab_size
        return kept * self.embed(mx.array([0])).dtype.size

    def num_rows(self, text: Text) -> int:
        """Return how many rows of a view a text is."""
        first = text.learned.index(True) if any(text.learned) else 1
        return text.num_learned + min(self.look_back, first - 1)

    def view(self, texts: Sequence[Text], by_length: bool = True) -> TargetView:
        """Return the target's view of some answers.

        Args:
            texts: The answers with their prompts.
            by_length: Read those of similar length together, and leave them in that order.
        """
        order = list(range(len(texts)))
        if by_length:
            order.sort(key=lambda row: len(texts[row].tokens))
        size = self.batch_size
        batches = (order[start : start + size] for start in range(0, len(order), size))
        return joined_views([self._batch(texts, rows) for rows in batches])

    def _batch(self, texts: Sequence[Text], rows: Sequence[int]) -> TargetView:
        # Nothing is padded beyond the longest: that could be beyond a model's last position.
        batch = text_batch(texts, rows, multiple=1)
        found, ahead = answer_places(np.array(batch.mask), self.look_back)
        places = mx.array(found)

        def taken(array: mx.array) -> mx.array:
            if array.shape[:2] != batch.inputs.shape:
                raise InputError(f"a tapped layer returns {array.shape}, which is no row per token")
            return array.reshape(-1, array.shape[-1])[places]

        if self.answers.body:
            states, outputs = self.answers.read(batch.inputs, self.taps)
            hidden = goals = taken(states)
        else:
            with tapped(self.target.model, self.taps) as outputs:
                logits, states = self.target.read(batch.inputs)
            hidden, goals = taken(states), taken(logits)
        taps = tuple(taken(outputs[layer]) for layer in self.taps)
        tokens = batch.inputs.reshape(-1)[places]
        mx.eval(hidden, goals, taps, tokens)  # what the target computed for them is let go
        return TargetView(hidden, tokens, mx.array(ahead), goals, self.embed, taps)


def text_of(response: Response) -> Text:
    """Return an answer as a text of which the answer is learned."""
    return Text.behind([*response.prompt, *response.response], len(response.prompt))
