"""Blocks of attention over what the target has computed: they make a draft's context.

    x_t = R [norm(h_t) ; norm(e(g_{t+1}))]           h_t: what the target computed at token t
    x'  = x + O attention(norm(x));  x'' = x' + D (silu(G norm(x')) * U norm(x'))
    context_t = h_t + what the blocks have added to x_t

A draft that follows root g_{t+1} has context_t instead of h_t; so blocks that add nothing leave the
drafter as it is without them, and that is how they begin. They run once per draft. A token sees
itself and those before it within a window. Places are counted inside the window, so the keys that
are kept are not rotated yet, and may be cut off on either side at any time.

    kept     . . . A B C D | E F     E F: new.  A row of the last W is kept, behind the others.

Source:
    Li et al. 2024, EAGLE, arXiv:2401.15077, section 3 (features joined with the next token); Ankner
    et al. 2024, Hydra, arXiv:2402.05109, section 3.3 (a block of attention once per draft).
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int
from mlx import nn

HEAD_DIM = 64
ROPE_BASE = 10_000.0
NORM_EPS = 1e-5


class Kept(NamedTuple):
    """What blocks have read of a text.

    Args:
        rows: Keys and values of the window's rows by block, the latest last; keys not rotated.
        known: How many of them, from the last, are the text's.
    """

    rows: Float[mx.array, "L 2 H W 64"]
    known: Int[mx.array, ""]


class ContextBlock(nn.Module):
    """One block: attention and a gated layer, both behind a norm.

    Args:
        width: Of its input and output.
        num_heads: Of its attention, each 64 wide.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        inner = num_heads * HEAD_DIM
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(width, width, bias=False)
        for last in (self.out, self.down):
            last.weight = mx.zeros_like(last.weight)

    def project(self, x: Float[mx.array, "B T D"]) -> Float[mx.array, "3 B H T 64"]:
        """Return queries, keys and values; none is rotated."""
        batch, length, _ = x.shape
        joint = self.qkv(_norm(x)).reshape(batch, length, 3, -1, HEAD_DIM)
        return joint.transpose(2, 0, 3, 1, 4)

    def attended(
        self,
        queries: Float[mx.array, "B H T 64"],
        rows: Float[mx.array, "2 B H S 64"],
        mask: mx.array,
    ) -> Float[mx.array, "B T I"]:
        """Return what the attention sees; the queries are those of the last rows."""
        keys, values = _rotated(rows[0], 0), rows[1]
        queries = _rotated(queries, keys.shape[2] - queries.shape[2])
        seen = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=HEAD_DIM**-0.5, mask=mask
        )
        return seen.swapaxes(1, 2).flatten(2)

    def added(
        self, x: Float[mx.array, "... D"], attended: Float[mx.array, "... I"]
    ) -> Float[mx.array, "... D"]:
        """Return what the block adds to its input, row by row."""
        joined = self.out(attended)
        gate, up = mx.split(self.gate_up(_norm(x + joined)), 2, axis=-1)
        return joined + self.down(nn.silu(gate) * up)


class ContextBlocks(nn.Module):
    """The blocks of a drafter.

    Args:
        width: Of the target's hidden states.
        embedding_size: Width of the target's embedding.
        num_blocks: How many there are.
        num_heads: Of each.
        window: How many tokens a token sees, itself included.
    """

    def __init__(
        self, width: int, embedding_size: int, num_blocks: int, num_heads: int, window: int
    ):
        super().__init__()
        self.window, self.num_heads = window, num_heads
        self.read = nn.Linear(width + embedding_size, width, bias=False)
        self.layers = [ContextBlock(width, num_heads) for _ in range(num_blocks)]

    def __call__(
        self,
        hidden: Float[mx.array, "M D"],
        following: Float[mx.array, "M E"],
        behind: Int[mx.array, " M"],
        places: Int[mx.array, " S"] | None = None,
    ) -> Float[mx.array, "S D"]:
        """Return the contexts at rows of some texts, which are whole or begin somewhere.

        The rows are cut into pieces of a window, and each sees its own piece and the one before.
        Of the last block, what is behind its attention is computed for the asked rows alone.

        Args:
            hidden: What the target computed; M is a multiple of the window.
            following: Embedding of the token that follows each.
            behind: How many of the rows before each belong to its text.
            places: The rows that are asked for; None for all.
        """
        window = self.window
        x = self._begin(hidden, following)
        place, key = mx.arange(window)[:, None], mx.arange(2 * window)[None]
        within = (key <= window + place) & (key > place)
        mask = within & (key >= window + place - behind.reshape(-1, window, 1))
        added = mx.zeros_like(x)
        for layer in self.layers:
            joint = layer.project((x + added).reshape(-1, window, x.shape[-1]))
            queries, rows = joint[0], joint[1:]
            before = mx.concatenate([mx.zeros_like(rows[:, :1]), rows[:, :-1]], axis=1)
            rows = mx.concatenate([before, rows], axis=3)
            attended = layer.attended(queries, rows, mask[:, None]).flatten(0, 1)
            if layer is self.layers[-1] and places is not None:
                hidden, x, added, attended = (y[places] for y in (hidden, x, added, attended))
            added = added + layer.added(x + added, attended)
        return hidden + added

    def nothing(self, dtype: mx.Dtype) -> Kept:
        """Return what is kept of a text before anything of it was read."""
        shape = (len(self.layers), 2, self.num_heads, self.window, HEAD_DIM)
        return Kept(mx.zeros(shape, dtype), mx.array(0))

    def go_on(
        self,
        kept: Kept,
        hidden: Float[mx.array, "T D"],
        following: Float[mx.array, "T E"],
        count: Int[mx.array, ""],
    ) -> tuple[Float[mx.array, " D"], Kept]:
        """Return the context at the last of some more rows of a text, and what is kept then.

        Args:
            kept: Of the rows before.
            hidden: What the target computed at the rows; those behind the first ``count`` do not
                count.
            following: Embedding of the token that follows each.
            count: How many there are, at least 1.
        """
        window = self.window
        x = self._begin(hidden, following)
        # Constants: a GPU is sent nothing for them.
        place = mx.array(np.arange(x.shape[0])[:, None])
        key = mx.array(np.arange(window + x.shape[0])[None])
        mask = (key <= window + place) & (key > place) & (key >= window - kept.known)
        last = count + mx.array(np.arange(window))
        added, rows_kept = mx.zeros_like(x), []
        for layer, before in zip(self.layers, kept.rows, strict=True):
            joint = layer.project((x + added)[None])
            rows = mx.concatenate([before[:, None], joint[1:]], axis=3)
            rows_kept.append(mx.take(rows[:, 0], last, axis=2))
            attended = layer.attended(joint[0], rows, mask)[0]
            if layer is self.layers[-1]:
                hidden, x, added, attended = (y[count - 1] for y in (hidden, x, added, attended))
            added = added + layer.added(x + added, attended)
        known = mx.minimum(kept.known + count, window).astype(kept.known.dtype)
        return hidden + added, Kept(mx.stack(rows_kept), known)

    def _begin(
        self, hidden: Float[mx.array, "M D"], following: Float[mx.array, "M E"]
    ) -> Float[mx.array, "M D"]:
        return self.read(mx.concatenate([_norm(hidden), _norm(following)], axis=-1))


def _norm(x: mx.array) -> mx.array:
    """Return rows divided by their root mean square; what follows has weights."""
    return mx.fast.rms_norm(x, None, NORM_EPS)


def _rotated(x: Float[mx.array, "B H T 64"], offset: int) -> Float[mx.array, "B H T 64"]:
    return mx.fast.rope(x, HEAD_DIM, traditional=False, base=ROPE_BASE, scale=1.0, offset=offset)
