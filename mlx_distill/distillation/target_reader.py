"""What a target computes at its own answers, kept for those who learn from it or judge by it."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_distill.data.texts import Text, TextBatch, text_batch
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
        read = [self._read(*found) for found in self._batches(texts, by_length)]
        return joined_views(read)

    def rows(self, texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a view of some answers, and how many rows follow each; none is read.

        They are in the order of ``view``, by length.
        """
        tokens, ahead = [], []
        for batch, places, follow in self._batches(texts, True):
            tokens.append(np.array(batch.inputs).reshape(-1)[places])
            ahead.append(follow)
        return np.concatenate(tokens), np.concatenate(ahead)

    def _batches(
        self, texts: Sequence[Text], by_length: bool
    ) -> Iterator[tuple[TextBatch, np.ndarray, np.ndarray]]:
        """Yield what is read at once, which of its places are kept, and how many follow each."""
        order = list(range(len(texts)))
        if by_length:
            order.sort(key=lambda row: len(texts[row].tokens))
        for start in range(0, len(order), self.batch_size):
            # Nothing is padded beyond the longest: that could be beyond a model's last position.
            batch = text_batch(texts, order[start : start + self.batch_size], multiple=1)
            yield batch, *answer_places(np.array(batch.mask), self.look_back)

    def _read(self, batch: TextBatch, found: np.ndarray, ahead: np.ndarray) -> TargetView:
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
