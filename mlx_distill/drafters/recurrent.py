"""The recurrent drafter: a state that reads tokens, and a head that reads state and context.

    s_t = silu(W e(g_{t-1}) + U s_{t-1} + b),   s_0 = 0
    q(g_t | g_<t) = softmax(head([h ; s_t]))

e is the target's embedding, g_0 the certain token and h what the target's head saw when it chose
g_0; h stays the same over the draft. The head is an optional projection, residual blocks
x + silu(A x + b), and a matrix of its own with one row per token that can be drafted.

That is the reference form. A configuration switches parts of it, each by itself:

    cell "gru"       z, r, n = W e + U s;  s' = n' + z (s - n'),  n' = tanh(n_W + r n_U)
    context_state    s_0 = tanh(S h + c)
    taps             h = what the head saw + T [norm(tap_1) ; norm(tap_2) ; ...]
    context_blocks   h = blocks of attention over h at this token and those before
    head_rank        the head's last matrix is a product of two, narrow between them

Taps are what layers of the target returned at the same token; norm divides by the root mean square.
The blocks have a file of their own.

Source:
    Zhang et al. 2024, arXiv:2403.09919, section 3. The names of the parameters are those of the
    checkpoints published with it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn

from mlx_distill.drafters.context_blocks import ContextBlocks
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
from mlx_distill.limits import Between, OneOf, check_fields

Cell = Annotated[str, OneOf("elman", "gru")]
Blocks = Annotated[int, Between(0, 2)]
Window = Annotated[int, Between(1, 1024)]
BLOCK_FIELDS = ("context_blocks", "context_window", "context_heads")


@dataclass(frozen=True)
class RecurrentDrafterConfig(DrafterShape):
    """The shape of a recurrent drafter.

    Args:
        hidden_size: Width of the target's hidden states, and of the drafter's own state.
        vocab_size: Number of the target's tokens.
        exit_dim: Width of the head; 2 x hidden_size leaves out the input projection.
        num_draft_layers: Number of residual blocks.
        rnn: False adds the embeddings up instead of feeding them to the recurrence.
        embedding_size: Width of the target's embedding; None if it is hidden_size.
        head_rank: Width between the two matrices that the head ends with; None for one.
        draft_vocab_size: How many tokens can be drafted; None for all. The map of a smaller
            vocabulary is the checkpoint's ``token_ids``.
        cell: "elman" is the reference form's recurrence, "gru" a gated one.
        context_state: Whether the state starts from the context, and not from zero.
        taps: Layers of the target that the context is made of, beside what the head sees; negative
            numbers count from the last.
        context_blocks: Blocks of attention over the text that the context is made by, 0 to 2.
        context_window: How many tokens they see.
        context_heads: Heads of each block.
        sharpness: What logits are multiplied by where paths are weighed against each other; fitted
            on held-out answers.
    """

    model_type: ClassVar[str] = "recurrent_drafter"

    hidden_size: Size
    vocab_size: Size
    exit_dim: Size
    num_draft_layers: Annotated[int, Between(0, 2**31 - 1)]
    rnn: bool = True
    embedding_size: Size | None = None
    head_rank: Size | None = None
    draft_vocab_size: Size | None = None
    cell: Cell = "elman"
    context_state: bool = False
    taps: tuple[Tap, ...] = ()
    context_blocks: Blocks = 0
    context_window: Window = 256
    context_heads: Size = 1
    sharpness: Sharpness = SHARPNESS

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.rnn and (self.cell != "elman" or self.context_state):
            raise InputError("a drafter without rnn has neither a cell nor a first state")
        check_draft_vocab(self.draft_vocab_size, self.vocab_size)
        if (self.head_rank or 1) > self.exit_dim:
            raise InputError(
                f"head_rank must be at most exit_dim, {self.exit_dim}, got {self.head_rank}"
            )
        if not self.rnn and self.embedding_size not in (None, self.hidden_size):
            raise InputError("a drafter without rnn needs embeddings as wide as the hidden states")

    @property
    def without_blocks(self) -> "RecurrentDrafterConfig":
        """The same shape without context blocks."""
        bare = {name: getattr(type(self), name) for name in BLOCK_FIELDS}
        return dataclasses.replace(self, **bare)


class Past(NamedTuple):
    """Where drafts start in the texts that they belong to, for context blocks.

    Args:
        following: Embedding of the token behind each row of the texts.
        behind: How many of the rows before each belong to its text.
        places: The rows at which drafts start.
    """

    following: Float[mx.array, "R E"]
    behind: Int[mx.array, " R"]
    places: Int[mx.array, " S"]


class ResidualBlock(nn.Module):
    """x + silu(A x + b)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def __call__(self, x: Float[mx.array, "... E"]) -> Float[mx.array, "... E"]:
        """Return the block's output."""
        return x + nn.silu(self.linear(x))


class RecurrentDrafter(nn.Module):
    """The drafter's network; see the module's docstring.

    Args:
        config: Its shape.
    """

    def __init__(self, config: RecurrentDrafterConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        num_tokens = config.draft_vocab_size or config.vocab_size
        if config.exit_dim != 2 * width:
            self.input_proj = nn.Linear(2 * width, config.exit_dim)
        layers: list[nn.Module] = [
            ResidualBlock(config.exit_dim) for _ in range(config.num_draft_layers)
        ]
        if config.head_rank:
            layers.append(nn.Linear(config.exit_dim, config.head_rank, bias=False))
        last = nn.Linear(config.head_rank or config.exit_dim, num_tokens, bias=False)
        self.lm_head = [*layers, last]
        if config.rnn:
            gates = width if config.cell == "elman" else 3 * width
            self.rnn_u = nn.Linear(width, gates)
            self.rnn_w = nn.Linear(config.embedding_size or width, gates, bias=False)
        if config.context_state:
            self.first_state = nn.Linear(width, width)
        if config.taps:
            self.tap_proj = nn.Linear(len(config.taps) * width, width, bias=False)
        if config.context_blocks:
            self.blocks = ContextBlocks(
                width,
                config.embedding_size or width,
                config.context_blocks,
                config.context_heads,
                config.context_window,
            )
        if config.draft_vocab_size:
            self.token_ids = mx.arange(config.draft_vocab_size)
            self.freeze(keys=["token_ids"], recurse=False)

    def joined(self, hidden: Float[mx.array, "... D"], taps: Taps = ()) -> Float[mx.array, "... D"]:
        """Return h: what the head saw, with what the tapped layers returned."""
        return with_taps(self, hidden, taps)

    def context(self, hidden: Float[mx.array, "... D"]) -> Float[mx.array, "... C"]:
        """Return the context's share of the head's input, which a draft needs only once."""
        if "input_proj" not in self:
            return hidden
        weight = self.input_proj.weight[:, : self.config.hidden_size]
        return hidden @ weight.T + self.input_proj.bias

    def begin(self, hidden: Float[mx.array, "... D"]) -> Float[mx.array, "... D"] | None:
        """Return the state before the first token; None is zero."""
        return mx.tanh(self.first_state(hidden)) if self.config.context_state else None

    def read(self, embeddings: Float[mx.array, "... E"]) -> Float[mx.array, "... G"]:
        """Return what tokens add to the state: W e, or e itself without a recurrence."""
        return self.rnn_w(embeddings) if self.config.rnn else embeddings

    def advance(
        self, state: Float[mx.array, "... D"] | None, read: Float[mx.array, "... G"]
    ) -> Float[mx.array, "... D"]:
        """Return the state after one more token."""
        if not self.config.rnn:
            return read if state is None else state + read
        recurrent = self.rnn_u.bias if state is None else self.rnn_u(state)
        if self.config.cell == "elman":
            return nn.silu(read + recurrent)
        return gated(state, read, recurrent)

    def unrolled(
        self,
        hidden: Float[mx.array, "R D"],
        taps: Sequence[Float[mx.array, "R _"]],
        embeddings: Float[mx.array, "S L E"],
        past: Past | None = None,
    ) -> Float[mx.array, "S L X"]:
        """Return what the head is given along drafts of known tokens.

        Args:
            hidden: What the target's head saw where drafts start; with a past, at all of its rows.
            taps: What the tapped layers returned there.
            embeddings: Of the tokens that the drafts read.
            past: What context blocks read; None without blocks.
        """
        hidden = self.joined(hidden, taps)
        if past is not None:
            hidden = self.blocks(hidden, past.following, past.behind, past.places)
        context, state = self.context(hidden), self.begin(hidden)
        features = []
        for token in mx.split(self.read(embeddings), embeddings.shape[1], axis=1):
            state = self.advance(state, token.squeeze(1))
            features.append(self.features(context, state))
        return mx.stack(features, axis=1)

    def logits(
        self, context: Float[mx.array, "... C"], state: Float[mx.array, "... D"]
    ) -> Float[mx.array, "... K"]:
        """Return the logits of the tokens that can be drafted."""
        return self.head(self.features(context, state))

    @property
    def head(self) -> nn.Linear:
        """The matrix that makes the logits."""
        last = self.lm_head[-1]
        assert isinstance(last, nn.Linear)
        return last

    @property
    def heads(self) -> list[nn.Linear]:
        """All matrices that make logits."""
        return [self.head]

    def features(
        self, context: Float[mx.array, "... C"], state: Float[mx.array, "... D"]
    ) -> Float[mx.array, "... E"]:
        """Return what the head makes logits of."""
        if "input_proj" in self:
            weight = self.input_proj.weight[:, self.config.hidden_size :]
            x = context + state @ weight.T
        else:
            context = mx.broadcast_to(context, state.shape)
            x = mx.concatenate([context, state], axis=-1)
        for layer in self.lm_head[:-1]:
            x = layer(x)
        return x


def gated(
    state: Float[mx.array, "... D"] | None,
    read: Float[mx.array, "... G"],
    recurrent: Float[mx.array, "... G"],
) -> Float[mx.array, "... D"]:
    """Return the next state of a gated cell.

    Args:
        state: The one before; None is zero.
        read: W e, for the gates z and r and for what is new, side by side.
        recurrent: U s with its bias, as ``read``.

    Source:
        Cho et al. 2014, arXiv:1406.1078; r is applied behind U, so that one product makes all.
    """
    width = read.shape[-1] // 3
    # Parts by split, whose gradient is one array; slices have one of the whole's size each.
    (read, read_new), (recurrent, recurrent_new) = (
        mx.split(x, [2 * width], axis=-1) for x in (read, recurrent)
    )
    keep, reset = mx.split(mx.sigmoid(read + recurrent), 2, axis=-1)
    new = mx.tanh(read_new + reset * recurrent_new)
    return (1 - keep) * new if state is None else new + keep * (state - new)
