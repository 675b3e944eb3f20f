"""How a drafter is trained, and of which shape it is for a target."""

from dataclasses import dataclass, field
from typing import Annotated

import mlx.core as mx

from mlx_distill.distillation.responses import ResponseConfig
from mlx_distill.drafters.context_blocks import HEAD_DIM
from mlx_distill.drafters.medusa import MedusaConfig
from mlx_distill.drafters.networks import Shape
from mlx_distill.drafters.recurrent import Blocks, Cell, RecurrentDrafterConfig, Window
from mlx_distill.drafters.shape import Tap
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, Count, OneOf, Seed, check_fields
from mlx_distill.machine import memory_bytes
from mlx_distill.target.layers import numbered_layers
from mlx_distill.target.taps import check_rows
from mlx_distill.target.target import Target
from mlx_distill.training.config import NEW, TrainingConfig

MOST_HEADS = 16  # of a context block; what it looks for is near, and simple
# Of a head that nobody asked for: a quarter of what is trained for a model of 4,096 is spared.
WIDEST = 2048
PART_BYTES = 300_000_000  # of features; larger parts are no quicker, only better mixed
RECURRENT, MEDUSA = "recurrent", "medusa"
# Medusa heads are as wide as the target, and read nothing.
RECURRENT_ONLY = ("exit_dim", "head_rank", "cell", "context_state", "context_blocks")
NO_TAP = -1  # the last layer's output, all but for a norm, is what the head sees anyway


@dataclass(frozen=True)
class DrafterTraining:
    """Everything that decides what a training makes; kept with the result.

    Args:
        drafter_kind: "recurrent" drafts token by token, each in the light of those before it;
            "medusa" has a head for each of them, --unroll heads of --num-draft-layers residual
            blocks, that draft at once.
        exit_dim: Width of the drafter's head. Without it, the target's width, up to 2,048.
        num_draft_layers: Residual blocks in the head.
        head_rank: Width between two matrices that the head ends with, where one would be the
            largest part of a draft. Without it, one.
        draft_vocab_size: Tokens that can be drafted, the most frequent in the answers; at most the
            vocabulary, 0 is all.
            Without it, all up to a vocabulary of 2,048, else three eighths of it and 16,384 at the
            most.
        cell: The recurrence: "gru" is gated, "elman" the published form's.
        context_state: Start the drafter's state from what the target computed.
        head_from_target: Start the drafter's head from the target's own; a narrower one from what
            is nearest to that.
        tap_layers: Layers of the target that the drafter sees. Without it, three of them, at a
            fifth, a half and three quarters of the depth, where they return a row per token; -1
            alone for none.
        context_blocks: Blocks of attention over what the target computed before, 0 to 2.
        context_window: How many tokens they see.
        unroll: Drafted tokens per start.
        decay: The i-th drafted token weighs decay ** (i - 1) in the loss.
        loss: "kl" is the divergence from the target, "lk" mixes it with the share of tokens that
            the target would reject.
        self_unroll: Share of the training, at its end, in which drafts go on with the drafter's own
            samples, as in decoding, and end where one is not what the target wrote.
        starts: Drafts per step.
        start_share: Share of the places in the answers at which an epoch lets drafts start, chosen
            anew in every epoch. Where the target reads the answers again in each, or is small, the
            drafts of all places are most of the time, and neighbours teach much the same.
        epochs: How often every answer is learned. Without it, the number of steps decides.
        feature_gb: Memory for what the target computes of the answers, in gigabytes. What is more
            is computed again in every epoch, in parts of that size. Without it, a quarter of the
            machine's memory where all of it fits there, else 0.3 gigabytes.
        own_prompts: How many prompts the target writes itself, seeds among them, where none and
            no answers are given.
        batch_size: Answers that the target reads at once.
        held_out: Answers that are not learned but judge the drafter. The seed chooses
            them, of every temperature as many.
        seed: Of the first weights, the order of the answers, and which are held out.
        responses: How the target writes.
        training: How the network is trained.
    """

    drafter_kind: Annotated[str, OneOf(RECURRENT, MEDUSA)] = RECURRENT
    exit_dim: Annotated[int | None, Between(1, 65_536)] = None
    num_draft_layers: Annotated[int, Between(0, 64)] = 1
    head_rank: Annotated[int | None, Between(1, 65_536)] = None
    draft_vocab_size: Annotated[int | None, Between(0, 2**31 - 1)] = None
    cell: Cell = "gru"
    context_state: bool = True
    head_from_target: bool = True
    tap_layers: tuple[Tap, ...] | None = None
    context_blocks: Blocks = 0
    context_window: Window = 256
    unroll: Annotated[int, Between(1, 512)] = 5
    decay: Annotated[float, Between(above=0, high=1)] = 0.8
    loss: Annotated[str, OneOf("kl", "lk")] = "kl"
    self_unroll: Annotated[float, Between(0, 1)] = 0.0
    starts: Count = 2048
    start_share: Annotated[float, Between(above=0, high=1)] = 1.0
    epochs: Annotated[float | None, Between(above=0, high=10**6)] = None
    feature_gb: Annotated[float | None, Between(above=0, high=10**6)] = None
    own_prompts: Count = 2000
    batch_size: Count = 16
    held_out: Count = 64
    seed: Seed = 0
    responses: ResponseConfig = field(default_factory=ResponseConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "training", self.training.resolved(NEW))
        if self.drafter_kind == MEDUSA:
            for name in RECURRENT_ONLY:
                if getattr(self, name) != getattr(type(self), name):
                    raise InputError(f"Medusa heads have no {name}; leave it as it is")

    def network(self, target: Target) -> Shape:
        """Return the shape of the drafter for a target."""
        if self.drafter_kind == RECURRENT:
            return self._recurrent(target)
        return MedusaConfig(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            num_heads=self.unroll,
            num_draft_layers=self.num_draft_layers,
            draft_vocab_size=self._draft_vocab(target),
            taps=self.taps(target),
        )

    def _draft_vocab(self, target: Target) -> int | None:
        """Return how many tokens can be drafted; None for all."""
        size = self.draft_vocab_size
        if size is None:
            size = 0 if target.vocab_size <= 2048 else min(16384, target.vocab_size * 3 // 8)
        return None if size in (0, target.vocab_size) else size

    def _recurrent(self, target: Target) -> RecurrentDrafterConfig:
        assert target.embed is not None
        embedding_size = target.embed(mx.array([0])).shape[-1]
        shape = RecurrentDrafterConfig(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            exit_dim=min(target.hidden_size, WIDEST) if self.exit_dim is None else self.exit_dim,
            num_draft_layers=self.num_draft_layers,
            embedding_size=None if embedding_size == target.hidden_size else embedding_size,
            head_rank=self.head_rank,
            draft_vocab_size=self._draft_vocab(target),
            cell=self.cell,
            context_state=self.context_state,
            taps=self.taps(target),
            context_blocks=self.context_blocks,
            context_window=self.context_window,
            context_heads=min(MOST_HEADS, max(1, target.hidden_size // HEAD_DIM)),
        )
        return shape if self.context_blocks else shape.without_blocks

    @property
    def look_back(self) -> int:
        """How many tokens of a prompt the drafter sees."""
        return self.context_window if self.context_blocks else 0

    def taps(self, target: Target) -> tuple[int, ...]:
        """Return the layers that the drafter sees.

        Raises:
            InputError: If those that were asked for are not there, or return no rows.
        """
        if self.tap_layers == (NO_TAP,):
            return ()
        if self.tap_layers is not None:
            check_rows(target.model, self.tap_layers, target.hidden_size)
            return self.tap_layers
        try:
            depth = len(numbered_layers(target.model))
            layers = tuple(sorted({depth // 5, depth // 2, depth * 3 // 4}))
            check_rows(target.model, layers, target.hidden_size)
        except InputError:  # they have no numbers, or no rows; nobody asked for any
            return ()
        return layers

    def feature_bytes(self, needed: int) -> int:
        """Return the memory for what the target computes of the answers.

        Args:
            needed: For all of them.
        """
        if self.feature_gb:
            return int(1e9 * self.feature_gb)
        room = memory_bytes() // 4
        return room if needed <= room else min(room, PART_BYTES)
