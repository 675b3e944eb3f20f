"""A recurrent drafter's network ready for decoding: each step in as few operations as it can be.

A state is multiplied by its half P of the input projection, by what the first block A makes of
that, and by the recurrence U. They are one matrix here, [P | P A | U]; what the context gives is
added by the operation that comes next anyway:

    joint = state [P | P A | U]                             one product
    x = joint_1 + c;   x + silu(joint_2 + c A + a)          one fused operation
    state' = silu(W e(g) + b + joint_3)                     one fused operation

Where the memory allows it, W e(g) is tabulated for the tokens that can be drafted, and the joint of
the first step, which the root alone decides, for all tokens.
"""

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Integer
from mlx import nn

from mlx_distill.drafters.recurrent import RecurrentDrafter, ResidualBlock

Context = tuple[mx.array, mx.array]  # the hidden state, and what the joined matrices make of it


@dataclass(frozen=True)
class Joined:
    """Matrices side by side.

    Args:
        of_hidden: What the context is multiplied by: for the projection and the first block.
        bias: Added to that.
        of_state: What a state is multiplied by: for the same and for the recurrence.
        widths: Of the parts, 0 for what the network does not have.
    """

    of_hidden: Float[mx.array, "D C"]
    bias: Float[mx.array, " C"]
    of_state: Float[mx.array, "D J"]
    widths: tuple[int, int, int]


class Steps:
    """The steps of a drafter that does not change any more.

    Args:
        network: The drafter's network.
        embed: The target's input embedding.
        table_bytes: Up to this size each, tables are made.
    """

    def __init__(self, network: RecurrentDrafter, embed: nn.Module, table_bytes: int):
        self.network = network
        self.embed = embed
        self.token_ids = network.token_ids if network.config.draft_vocab_size else None
        self.joined = join(network)
        self._reads = self._firsts = None
        row_bytes = network.head.weight.dtype.size
        if network.head.weight.shape[0] * network.config.hidden_size * row_bytes <= table_bytes:
            self._reads = self._read(mx.arange(network.head.weight.shape[0]))
        num_tokens = embed["weight"].shape[0]  # the root can be any of the target's
        alone = network.config.rnn and "input_proj" in network
        if alone and num_tokens * sum(self.joined.widths) * row_bytes <= table_bytes:
            read = network.read(embed(mx.arange(num_tokens)))
            self._firsts = network.advance(None, read) @ self.joined.of_state
        # A compiled draft would make them every time, and on the stream of this thread only.
        joined = (self.joined.of_hidden, self.joined.bias, self.joined.of_state)
        mx.eval(joined, [x for x in (self._reads, self._firsts) if x is not None])

    def context(self, hidden: Float[mx.array, " D"]) -> Context:
        """Return what a draft needs of the hidden state, once."""
        hidden = hidden[None]
        return hidden, mx.addmm(self.joined.bias, hidden, self.joined.of_hidden)

    def first(
        self, root: Integer[mx.array, " 1"], context: Context
    ) -> tuple[Float[mx.array, "1 E"], Float[mx.array, "1 D"]]:
        """Return what the head makes logits of after the root, and what is carried on."""
        if self._firsts is not None:
            return self._features(None, self._firsts[root], context)
        state = self.network.advance(None, self.network.read(self.embed(root)))
        return self._features(state, state @ self.joined.of_state, context)

    def next(
        self,
        columns: Integer[mx.array, " W"],
        carried: Float[mx.array, "W D"],
        context: Context,
    ) -> tuple[Float[mx.array, "W E"], Float[mx.array, "W D"]]:
        """Return the same after drafted tokens, which columns of the logits stand for."""
        read = self._read(columns) if self._reads is None else self._reads[columns]
        if self.network.config.rnn:
            state = nn.silu(read + self.network.rnn_u.bias + carried)
        else:
            state = read + carried
        return self._features(state, state @ self.joined.of_state, context)

    def _read(self, columns: Integer[mx.array, " W"]) -> Float[mx.array, "W D"]:
        tokens = columns if self.token_ids is None else self.token_ids[columns]
        return self.network.read(self.embed(tokens))

    def _features(
        self, state: mx.array | None, joint: Float[mx.array, "W J"], context: Context
    ) -> tuple[mx.array, mx.array]:
        hidden, shares = context
        projected, blocked, _ = self.joined.widths
        if projected:
            x = joint[:, :projected] + shares[:, :projected]
        else:
            assert state is not None
            x = mx.concatenate([mx.broadcast_to(hidden, state.shape), state], axis=-1)
        blocks = self.network.lm_head[:-1]
        if blocked:
            both = slice(projected, projected + blocked)
            x = x + nn.silu(joint[:, both] + shares[:, both])
        for block in blocks[1:]:
            x = block(x)
        if self.network.config.rnn:
            return x, joint[:, projected + blocked :]
        assert state is not None
        return x, state


def join(network: RecurrentDrafter) -> Joined:
    """Return a network's joined matrices; their products are made in float32."""
    width, dtype = network.config.hidden_size, network.head.weight.dtype
    weight = mx.eye(2 * width)  # without a projection, hidden state and state side by side
    bias = mx.zeros((2 * width,))
    parts = []
    if "input_proj" in network:
        weight = network.input_proj.weight.T.astype(mx.float32)
        bias = network.input_proj.bias.astype(mx.float32)
        parts.append((weight, bias))
    block = network.lm_head[0]
    if isinstance(block, ResidualBlock):
        by = block.linear.weight.T.astype(mx.float32)
        parts.append((weight @ by, bias @ by + block.linear.bias))
    of_state = [matrix[width:] for matrix, _ in parts]
    if network.config.rnn:
        of_state.append(network.rnn_u.weight.T)
    widths = (
        network.config.exit_dim if "input_proj" in network else 0,
        network.config.exit_dim if isinstance(block, ResidualBlock) else 0,
        width if network.config.rnn else 0,
    )
    nothing = mx.zeros((width, 0))
    arrays = (
        mx.concatenate([*(matrix[:width] for matrix, _ in parts), nothing], axis=1),
        mx.concatenate([*(bias for _, bias in parts), mx.zeros((0,))]),
        mx.concatenate([*of_state, nothing], axis=1),
    )
    of_hidden, bias, of_state = (mx.contiguous(x.astype(dtype)) for x in arrays)
    return Joined(of_hidden, bias, of_state, widths)
