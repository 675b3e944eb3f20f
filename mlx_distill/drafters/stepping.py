"""A recurrent drafter's network ready for decoding: each step in as few operations as it can be.

A state is multiplied by its half P of the input projection, by what the first block A makes of
that, and by the recurrence U. They are one matrix here, [P | P A | U]; what the context gives is
added by the operation that comes next anyway:

    joint = state [P | P A | U]                             one product
    x = joint_1 + c;   x + silu(joint_2 + c A + a)          one fused operation
    state' = silu(W e(g) + b + joint_3)                     one fused operation

A gated cell's U is three times as wide, and it needs the state itself, too: behind U stands the
identity. The first state, where the context makes it, is one more part of what the context gives.

Where the memory allows it and there is much to draft, W e(g) is tabulated for the tokens that can
be drafted, and the joint of the first step, which the root alone decides, for all tokens.
"""

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Integer
from mlx import nn

from mlx_distill.drafters.recurrent import RecurrentDrafter, ResidualBlock, gated

Context = tuple[mx.array, mx.array]  # the hidden state, and what the joined matrices make of it


@dataclass(frozen=True)
class Joined:
    """Matrices side by side.

    Args:
        of_hidden: What the context is multiplied by: for the projection, the first block and the
            first state.
        bias: Added to that.
        of_state: What a state is multiplied by: for the projection, the first block and the
            recurrence.
        widths: Of these three parts, 0 for what the network does not have.
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
    """

    def __init__(self, network: RecurrentDrafter, embed: nn.Module):
        self.network = network
        self.embed = embed
        self.token_ids = network.token_ids if network.config.draft_vocab_size else None
        self.joined = join(network)
        self._reads = self._firsts = None
        if network.config.context_state:
            self._recurrence = mx.contiguous(self.joined.of_state[:, -self.joined.widths[2] :])
            mx.eval(self._recurrence)
        # A compiled draft would make them every time, and on the stream of this thread only.
        mx.eval(self.joined.of_hidden, self.joined.bias, self.joined.of_state)

    def tabulate(self, table_bytes: int) -> None:
        """Make the tables that are no larger than this each.

        With the bundled pair that takes as long as they save in a thousand drafts on a CPU.
        """
        network, embed = self.network, self.embed
        num_rows, row_bytes = network.head.weight.shape[0], network.head.weight.dtype.size
        reads = network.rnn_w.weight.shape[0] if network.config.rnn else network.config.hidden_size
        if num_rows * reads * row_bytes <= table_bytes:
            table = self._read(mx.arange(num_rows))
            mx.eval(table)
            self._reads = table
        num_tokens = embed["weight"].shape[0]  # the root can be any of the target's
        alone = network.config.rnn and "input_proj" in network and not network.config.context_state
        if alone and num_tokens * sum(self.joined.widths) * row_bytes <= table_bytes:
            read = network.read(embed(mx.arange(num_tokens)))
            table = network.advance(None, read) @ self.joined.of_state
            mx.eval(table)
            self._firsts = table

    def context(self, hidden: Float[mx.array, "S D"]) -> Context:
        """Return what drafts need of the hidden states, once; decoding has one of them."""
        return hidden, mx.addmm(self.joined.bias, hidden, self.joined.of_hidden)

    def first(
        self, root: Integer[mx.array, " S"], context: Context
    ) -> tuple[Float[mx.array, "S E"], Float[mx.array, "S D"]]:
        """Return what the head makes logits of after the root, and what is carried on."""
        if self._firsts is not None:
            return self._features(None, self._firsts[root], context)
        read = self.network.read(self.embed(root))
        if self.network.config.context_state:
            _, shares = context
            begin = mx.tanh(shares[:, -self.network.config.hidden_size :])
            state = self._state(read, begin @ self._recurrence)
        else:
            state = self.network.advance(None, read)
        return self._features(state, state @ self.joined.of_state, context)

    def next(
        self,
        columns: Integer[mx.array, " W"],
        carried: Float[mx.array, "W D"],
        context: Context,
    ) -> tuple[Float[mx.array, "W E"], Float[mx.array, "W D"]]:
        """Return the same after drafted tokens, which columns of the logits stand for."""
        read = self._read(columns) if self._reads is None else self._reads[columns]
        state = self._state(read, carried)
        return self._features(state, state @ self.joined.of_state, context)

    def _state(self, read: mx.array, carried: mx.array) -> Float[mx.array, "W D"]:
        """Return the state that follows what was carried on."""
        if not self.network.config.rnn:
            return read + carried
        bias, width = self.network.rnn_u.bias, self.network.config.hidden_size
        if self.network.config.cell == "elman":
            return nn.silu(read + bias + carried)
        return gated(carried[:, -width:], read, bias + carried[:, :-width])

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
        if blocked:
            both = slice(projected, projected + blocked)
            x = x + nn.silu(joint[:, both] + shares[:, both])
        for layer in self.network.lm_head[1 if blocked else 0 : -1]:
            x = layer(x)
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
    arrays = (
        mx.concatenate([*of_hidden, nothing], axis=1),
        mx.concatenate([*biases, mx.zeros((0,))]),
        mx.concatenate([*of_state, *recurrence, nothing], axis=1),
    )
    of_hidden, bias, of_state = (mx.contiguous(x.astype(dtype)) for x in arrays)
    return Joined(of_hidden, bias, of_state, widths)
