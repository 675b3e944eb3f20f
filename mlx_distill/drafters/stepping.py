"""A recurrent drafter's network ready for decoding: each step in as few operations as it can be.

A state is multiplied by its half P of the input projection, by what the first block A makes of
that, and by the recurrence U. They are one matrix here, [P | P A | U]; what the context gives is
added by the operation that comes next anyway:

    joint = state [P | P A | U] + [0 | 0 | b]               one product
    x = joint_1 + c;   x + silu(joint_2 + c A + a)          one fused operation
    state' = silu(W e(g) + joint_3)                         one fused operation

A gated cell's U is three times as wide, and it needs the state itself, too: behind U stands the
identity. What is carried on is cut into these four before rows of it are chosen, since views
between two operations keep them from being fused: so choice and cell are one. The first state,
where the context makes it, is one more part of what the context gives.

Where the memory allows it and there is much to draft, W e(g) is tabulated for all tokens, and the
joint of the first step, which the root alone decides, where no context begins the state.
"""

from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx
from jaxtyping import Float, Integer
from mlx import nn

from mlx_distill.arrays import by_columns
from mlx_distill.drafters.recurrent import RecurrentDrafter, ResidualBlock
from mlx_distill.kernels.exponentials import sigmoid, silu, tanh

Context = tuple[mx.array, mx.array]  # the hidden state, and what the joined matrices make of it
Carried: TypeAlias = mx.array | tuple[mx.array, ...]

# Rows of parts that one fused operation can read, beside what else it does: MLX's limit is 24.
MOST_FUSED = 16


@dataclass(frozen=True)
class Joined:
    """Matrices side by side.

    Args:
        of_hidden: What the context is multiplied by: for the projection, the first block and the
            first state.
        bias: Added to that.
        of_state: What a state is multiplied by: for the projection, the first block and the
            recurrence.
        state_bias: Added to that: the recurrence's.
        widths: Of these three parts, 0 for what the network does not have.
    """

    of_hidden: Float[mx.array, "D C"]
    bias: Float[mx.array, " C"]
    of_state: Float[mx.array, "D J"]
    state_bias: Float[mx.array, " J"]
    widths: tuple[int, int, int]


class Steps:
    """The steps of a drafter that does not change any more.

    Args:
        network: The drafter's network.
        embed: The target's input embedding.
    """

    def __init__(self, network: RecurrentDrafter, embed: nn.Module):
        self.network = network
        self.embed = embed
        # As a search counts with them, so that it does not have to make them anew.
        self.token_ids = None
        if network.config.draft_vocab_size:
            self.token_ids = network.token_ids.astype(mx.int64)
            mx.eval(self.token_ids)
        self.joined = join(network)
        self._reads = self._firsts = None
        if network.config.context_state:
            first = slice(self.joined.of_state.shape[1] - self.joined.widths[2], None)
            self._recurrence = by_columns(self.joined.of_state[:, first])
            self._recurrence_bias = mx.contiguous(self.joined.state_bias[first])
            mx.eval(self._recurrence, self._recurrence_bias)
        # A compiled draft would make them every time, and on the stream of this thread only.
        joined = self.joined
        mx.eval(joined.of_hidden, joined.bias, joined.of_state, joined.state_bias)

    def tabulate(self, table_bytes: int) -> None:
        """Make the tables that are no larger than this each.

        With the bundled pair that takes as long as they save in a thousand drafts on a CPU.
        """
        network, embed = self.network, self.embed
        num_tokens, row_bytes = embed["weight"].shape[0], network.head.weight.dtype.size
        reads = network.rnn_w.weight.shape[0] if network.config.rnn else network.config.hidden_size
        if num_tokens * reads * row_bytes <= table_bytes:
            self._reads = network.read(embed(mx.arange(num_tokens)))
            mx.eval(self._reads)
        alone = network.config.rnn and "input_proj" in network and not network.config.context_state
        if alone and num_tokens * sum(self.joined.widths) * row_bytes <= table_bytes:
            read = network.read(embed(mx.arange(num_tokens)))
            self._firsts = self._joint(self._state(read, None))
            mx.eval(self._firsts)

    def context(self, hidden: Float[mx.array, "S D"]) -> Context:
        """Return what drafts need of the hidden states, once; decoding has one of them."""
        return hidden, mx.addmm(self.joined.bias, hidden, self.joined.of_hidden)

    def first(
        self, root: Integer[mx.array, " S"], context: Context
    ) -> tuple[Float[mx.array, "S E"], Carried]:
        """Return what the head makes logits of after the root, and what is carried on."""
        if self._firsts is not None:
            return self._features(None, self._firsts[root], context)
        if not self.network.config.context_state:
            return self.next(root, None, context)
        begin = tanh(context[1][:, -self.network.config.hidden_size :])
        recurrent = mx.addmm(self._recurrence_bias, begin, self._recurrence)
        return self.next(root, self._parts(recurrent), context)

    def next(
        self, tokens: Integer[mx.array, " W"], carried: Carried | None, context: Context
    ) -> tuple[Float[mx.array, "W E"], Carried]:
        """Return the same after drafted tokens; before the first, nothing was carried."""
        state = self._state(self._read(tokens), carried)
        return self._features(state, self._joint(state), context)

    def _read(self, tokens: Integer[mx.array, " W"]) -> Float[mx.array, "W G"]:
        if self._reads is not None:
            return self._reads[tokens]
        return self.network.read(self.embed(tokens))

    def _joint(self, state: Float[mx.array, "W D"]) -> Float[mx.array, "W J"]:
        if not self.network.config.rnn:
            return state @ self.joined.of_state
        return mx.addmm(self.joined.state_bias, state, self.joined.of_state)

    def _state(
        self, read: Float[mx.array, "W G"], carried: Carried | None
    ) -> Float[mx.array, "W D"]:
        """Return the state that follows what was carried on."""
        if carried is None:
            return self.network.advance(None, read)
        if self.network.config.cell == "elman":
            assert isinstance(carried, mx.array)
            return silu(read + carried) if self.network.config.rnn else read + carried
        parts = carried if isinstance(carried, tuple) else mx.split(carried, 4, axis=-1)
        keep, reset, recurrent, state = parts
        read_keep, read_reset, read_new = mx.split(read, 3, axis=-1)
        new = tanh(read_new + sigmoid(read_reset + reset) * recurrent)
        return new + sigmoid(read_keep + keep) * (state - new)

    def _features(
        self, state: mx.array | None, joint: Float[mx.array, "W J"], context: Context
    ) -> tuple[mx.array, Carried]:
        hidden, shares = context
        projected, blocked, _ = self.joined.widths
        if projected:
            x = joint[:, :projected] + shares[:, :projected]
        else:
            assert state is not None
            x = mx.concatenate([mx.broadcast_to(hidden, state.shape), state], axis=-1)
        if blocked:
            both = slice(projected, projected + blocked)
            x = x + silu(joint[:, both] + shares[:, both])
        for layer in self.network.lm_head[1 if blocked else 0 : -1]:
            x = layer(x)
        if self.network.config.rnn:
            return x, self._parts(joint[:, projected + blocked :])
        assert state is not None
        return x, state

    def _parts(self, recurrent: Float[mx.array, "W U"]) -> Carried:
        """Return what a gated cell asks of a product, in parts if so many rows can be fused."""
        if self.network.config.cell == "elman" or 4 * recurrent.shape[0] > MOST_FUSED:
            return recurrent
        return tuple(mx.split(recurrent, 4, axis=-1))


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
    recurrence = [network.rnn_u.weight.T] if network.config.rnn else []
    recurrence += [mx.eye(width)] if network.config.cell == "gru" else []
    of_hidden = [matrix[:width] for matrix, _ in parts]
    biases = [bias for _, bias in parts]
    if network.config.context_state:
        of_hidden.append(network.first_state.weight.T)
        biases.append(network.first_state.bias)
    widths = (
        network.config.exit_dim if "input_proj" in network else 0,
        network.config.exit_dim if isinstance(block, ResidualBlock) else 0,
        sum(matrix.shape[1] for matrix in recurrence),
    )
    nothing = mx.zeros((width, 0))
    biases_of_state = [mx.zeros((sum(matrix.shape[1] for matrix in of_state),))]
    if network.config.rnn:
        biases_of_state.append(network.rnn_u.bias)
    if network.config.cell == "gru":
        biases_of_state.append(mx.zeros((width,)))
    arrays = (
        mx.concatenate([*of_hidden, nothing], axis=1),
        mx.concatenate([*biases, mx.zeros((0,))]),
        mx.concatenate([*of_state, *recurrence, nothing], axis=1),
        mx.concatenate(biases_of_state),
    )
    of_hidden, bias, of_state, state_bias = (x.astype(dtype) for x in arrays)
    return Joined(
        by_columns(of_hidden),
        mx.contiguous(bias),
        by_columns(of_state),
        mx.contiguous(state_bias),
        widths,
    )
