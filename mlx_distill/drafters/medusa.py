"""Medusa heads: several heads beside the target's own, each for a token further ahead.

    h            what the target's head saw when it chose the certain token g_0
    x_i = h after residual blocks x + silu(A x + b) of head i
    q_i(g_i) = softmax(W x_i),   i = 1, 2, ...

No head sees what the others draft, not even g_0: all of them are one batch of small products, and a
path is as likely as the product of its tokens. What a recurrent drafter knows of the tokens before
is lost, what its steps cost is saved.

The blocks begin as zeros and W as the target's head, so that every head begins as the target's own.
One W serves all heads, and can hold the rows of some tokens only; the published form has one for
each (``shared_head`` false). As the recurrent drafter, they may see layers beside the head's input.

Source:
    Cai et al. 2024, arXiv:2401.10774, section 2.1.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import mlx.core as mx
from jaxtyping import Float
from mlx import nn

from mlx_distill.drafters.recurrent import ResidualBlock
from mlx_distill.drafters.shape import (
    SHARPNESS,
    DrafterShape,
    Sharpness,
    Size,
    Tap,
    check_draft_vocab,
)
from mlx_distill.drafters.tap_input import Taps, with_taps
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, check_fields

Heads = Annotated[int, Between(1, 64)]
Layers = Annotated[int, Between(0, 64)]


@dataclass(frozen=True)
class MedusaConfig(DrafterShape):
    """The shape of Medusa heads.

    Args:
        hidden_size: Width of the target's hidden states, and of the heads.
        vocab_size: Number of the target's tokens.
        num_heads: How many there are: the longest draft, in tokens.
        num_draft_layers: Residual blocks of each.
        shared_head: Whether one matrix makes the logits of all heads, or each has its own.
        draft_vocab_size: How many tokens can be drafted; None for all. The map of a smaller
            vocabulary is the checkpoint's ``token_ids``.
        taps: Layers of the target that the heads see beside what its head does; negative numbers
            count from the last.
        sharpness: What logits are multiplied by where paths are weighed against each other; fitted
            on held-out answers.
        hit_rates: For every head, how often its first, second, ... choice is the target's best, on
            held-out answers; a static tree is made by these. Empty where nothing was measured.
    """

    model_type: ClassVar[str] = "medusa_heads"
    fitted: ClassVar[tuple[str, ...]] = ("sharpness", "hit_rates")

    hidden_size: Size
    vocab_size: Size
    num_heads: Heads
    num_draft_layers: Layers = 1
    shared_head: bool = True
    draft_vocab_size: Size | None = None
    taps: tuple[Tap, ...] = ()
    sharpness: Sharpness = SHARPNESS
    hit_rates: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        check_draft_vocab(self.draft_vocab_size, self.vocab_size)
        _check_rates(self.hit_rates, self.num_heads)


class MedusaHeads(nn.Module):
    """The network; see the module's docstring.

    Args:
        config: Its shape.
    """

    def __init__(self, config: MedusaConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        num_tokens = config.draft_vocab_size or config.vocab_size
        self.blocks = [
            [_block_of_zeros(width) for _ in range(config.num_draft_layers)]
            for _ in range(config.num_heads)
        ]
        matrices = 1 if config.shared_head else config.num_heads
        self.lm_head = [nn.Linear(width, num_tokens, bias=False) for _ in range(matrices)]
        if config.taps:
            self.tap_proj = nn.Linear(len(config.taps) * width, width, bias=False)
        if config.draft_vocab_size:
            self.token_ids = mx.arange(config.draft_vocab_size)
            self.freeze(keys=["token_ids"], recurse=False)

    @property
    def head(self) -> nn.Linear:
        """The matrix that makes the logits; of several, the first head's."""
        return self.lm_head[0]

    @property
    def heads(self) -> list[nn.Linear]:
        """All matrices that make logits."""
        return self.lm_head

    def joined(self, hidden: Float[mx.array, "... D"], taps: Taps = ()) -> Float[mx.array, "... D"]:
        """Return h: what the head saw, with what the tapped layers returned."""
        return with_taps(self, hidden, taps)

    def features(self, number: int, hidden: Float[mx.array, "... D"]) -> Float[mx.array, "... D"]:
        """Return what a head, counted from 0, makes logits of."""
        for block in self.blocks[number]:
            hidden = block(hidden)
        return hidden

    def unrolled(
        self,
        hidden: Float[mx.array, "S D"],
        taps: Sequence[Float[mx.array, "S _"]],
        embeddings: Float[mx.array, "S L _"],
        past: object = None,
    ) -> Float[mx.array, "S L D"]:
        """Return what the first L heads make logits of, along drafts.

        Args:
            hidden: What the target's head saw where the drafts start.
            taps: What the tapped layers returned there.
            embeddings: Of the tokens that the drafts read; the heads see none of them.
            past: What context blocks would read; heads have none.
        """
        hidden = self.joined(hidden, taps)
        heads = range(embeddings.shape[1])
        return mx.stack([self.features(number, hidden) for number in heads], axis=1)


def _block_of_zeros(width: int) -> ResidualBlock:
    """Return a block that changes nothing yet."""
    block = ResidualBlock(width)
    block.linear.weight = mx.zeros_like(block.linear.weight)
    block.linear.bias = mx.zeros_like(block.linear.bias)
    return block


def _check_rates(rates: tuple[Any, ...], num_heads: int) -> None:
    """Raise InputError unless there are as many shares for every head, or none at all."""
    rows = [row for row in rates if isinstance(row, tuple) and row]
    numbers = [share for row in rows for share in row]
    shares = all(type(share) in (int, float) and 0 <= share <= 1 for share in numbers)
    if rates and (len(rows) != num_heads or len({*map(len, rows)}) > 1 or not shares):
        raise InputError(
            f"hit_rates must hold as many shares between 0 and 1 for each of {num_heads} heads"
        )
