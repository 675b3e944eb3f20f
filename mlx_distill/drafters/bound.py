"""A recurrent drafter bound to a target, whose embedding it reads tokens with."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn

from mlx_distill.core.beam_search import Levels, Listed, beam_levels, in_nodes
from mlx_distill.core.beam_searches import beam_searches
from mlx_distill.core.draft import Draft
from mlx_distill.drafters.attending import AttendingState, ContextReader
from mlx_distill.drafters.compiling import Arrays, CompiledDrafts
from mlx_distill.drafters.fingerprint import Fingerprint
from mlx_distill.drafters.last_seen import LastSeen
from mlx_distill.drafters.medusa_drafter import MedusaDrafter
from mlx_distill.drafters.protocol import Drafter, DraftPlan, DraftState, Features
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.drafters.shortlist import Directions, Shortlist
from mlx_distill.drafters.stepping import Carried, Steps
from mlx_distill.kernels.exponentials import left_out
from mlx_distill.target.watching import during

# Up to this size each, what tokens add to the state and make of it as roots is tabulated once,
# after many drafts: the bundled pair's tables cost 0.26 CPU seconds and save 0.5 ms of each draft.
# A command that writes a few sentences ends sooner without.
TABLE_BYTES = 64 * 2**20
DRAFTS_BEFORE_TABLES = 256
# A shortlist is made sooner: SmolLM2's takes 0.3 s and saves 15 ms of each draft.
DRAFTS_BEFORE_SHORTLIST = 16


class BoundDrafter:
    """A recurrent drafter together with the target's embedding: a ``Drafter`` for the loop.

    Args:
        network: The drafter's network.
        embed: The target's input embedding.
        target: Fingerprint of the target that the network was trained for.
        on_gpu: Whether drafts are made as a GPU has them made; None asks the device in use.
        directions: That the head's inputs lie in; None if they are not known.

    Attributes:
        taps: The target's layers that the context is made of, too.
        searches: By shape.
        reader: Reads texts with the context blocks; None without any.
        look_back: How many of a prompt's last tokens it wants to see.
        opened: Takes the state of every new text, with what it was opened with, and returns what
            the loop is given instead; None changes nothing.
    """

    opened: Callable[[DraftState, mx.array, Features], DraftState] | None = None

    def __init__(
        self,
        network: RecurrentDrafter,
        embed: nn.Module,
        target: Fingerprint,
        on_gpu: bool | None = None,
        directions: Directions | None = None,
    ):
        self.network = network
        self.directions = directions
        self.embed = embed
        self.target = target
        self._on_gpu = mx.default_device() == mx.Device(mx.gpu) if on_gpu is None else on_gpu
        self.taps = network.config.taps
        self._steps = Steps(network, embed)
        self._drafts = 0
        self._shortlist: Shortlist | None = None
        self.searches = CompiledDrafts()
        self._tabulating = threading.Lock()
        # On a CPU nothing is dispatched, and the compiler takes longer than many readings.
        blocks = network.config.context_blocks
        self.reader = ContextReader(network, embed, compiled=self._on_gpu) if blocks else None
        self.look_back = network.config.context_window if blocks else 1

    @property
    def config(self) -> RecurrentDrafterConfig:
        """The network's shape."""
        return self.network.config

    def open(self, prompt: Int[mx.array, " T"], features: Features) -> DraftState:
        """Return the state of a text: what the target's head saw last, or what blocks read."""
        if self.reader is None:
            state: DraftState = RecurrentState(self, features)
        else:
            window = self.config.context_window
            state = AttendingState(self.reader, self.draft, window, prompt, features)
        return state if self.opened is None else self.opened(state, prompt, features)

    def draft(
        self,
        hidden: Float[mx.array, " D"],
        root: Int[mx.array, " 1"],
        plan: DraftPlan,
        noise: Float[mx.array, "L V"] | None = None,
        taps: Float[mx.array, "T D"] | None = None,
    ) -> Draft:
        """Return the beams that follow a root.

        Args:
            hidden: What the target's head saw before, when it chose the root; what the context
                blocks made of that, if there are any.
            root: The token that is certain.
            plan: How many beams, and how long.
            noise: What will be added to the target's logits; None at temperature 0.
            taps: What the tapped layers returned where the head saw that.
        """
        self._drafts += 1
        if self._drafts == DRAFTS_BEFORE_TABLES:
            self.tabulate()
        elif self._drafts == DRAFTS_BEFORE_SHORTLIST:
            with self._tabulating:
                self._list_columns()
        arrays: tuple[Any, ...]
        arrays = (hidden, taps, root) if noise is None else (hidden, taps, root, noise)
        shape = plan.beam_width, plan.draft_length
        search = self.searches.of((*shape, noise is not None), partial(self._search, *shape))
        return in_nodes(during(left_out, self._on_gpu, search, *arrays))

    def tabulate(self) -> None:
        """Make the tables of the steps now, and the shortlist, which a long run does by itself."""
        with self._tabulating:
            self._drafts = DRAFTS_BEFORE_TABLES
            self._steps.tabulate(TABLE_BYTES)
            self._list_columns()
            self.searches.forget()  # they read no tables

    def _list_columns(self) -> None:
        if self._on_gpu:  # operations count there, and not bytes
            return
        if self._shortlist is None and Shortlist.pays(self.network.head.weight):
            self._shortlist = Shortlist(self.network.head.weight, self.directions)
            self.searches.forget()  # they ask the whole head

    def _search(
        self,
        width: int,
        length: int,
        serial: int,
        hidden: mx.array,
        taps: mx.array | None,
        root: mx.array,
        noise: mx.array | None = None,
    ) -> Levels:
        steps = self._steps
        joined = self.network.joined(hidden, taps) if self.reader is None else hidden
        context = steps.context(joined[None])
        noise = self._of_columns(noise)
        rows = iter(range(length))  # of noise; one per step, in the search's order
        shortlist, sharpness = self._shortlist, self.config.sharpness

        def step(tokens: mx.array, carried: Carried | None) -> tuple[mx.array | Listed, Carried]:
            if carried is None:
                x, carried = steps.first(tokens, context)
            else:
                x, carried = steps.next(tokens, carried, context)
            row = next(rows)
            here = None if noise is None else noise[row : row + 1]
            if shortlist is not None:
                return shortlist(x, here, sharpness, steps.token_ids), carried
            return self._logits(x, here), carried

        ids, num_tokens = steps.token_ids, self.config.vocab_size
        return beam_levels(step, root, None, width, length, ids, num_tokens)

    def draft_everywhere(
        self,
        roots: Int[mx.array, " S"],
        features: Features,
        plan: DraftPlan,
        noise: Float[mx.array, "N V"] | None = None,
        earlier: int = 0,
    ) -> Draft:
        """Return the drafts of many roots; see ``DraftsEverywhere``."""
        joined = self.network.joined(features.states, features.taps)
        if self.reader is not None:
            joined = self.reader.everywhere(joined, roots)
        joined, roots = joined[earlier:], roots[earlier:]
        known = self._of_columns(noise)

        def seen(depth: int) -> mx.array | None:
            return None if known is None else known[depth : depth + roots.size]

        return self._searches(joined, roots, plan.beam_width, plan.draft_length, seen)

    def draft_together(
        self,
        contexts: Sequence[tuple[mx.array, ...]],
        roots: Int[mx.array, " B"],
        plan: DraftPlan,
        noise: Float[mx.array, "B L V"] | None,
    ) -> Draft:
        """Return the drafts of several texts; see ``DraftsTogether``."""
        self._drafts += 1
        if self._drafts == DRAFTS_BEFORE_TABLES:
            self.tabulate()
        hidden, *of_taps = (mx.stack(list(x)) for x in zip(*contexts, strict=True))
        taps = of_taps[0] if of_taps else None
        arrays: tuple[Any, ...]
        arrays = (hidden, taps, roots) if noise is None else (hidden, taps, roots, noise)
        search: Callable[..., Arrays] = partial(self._together, plan.beam_width, plan.draft_length)
        # On a CPU the compiler takes longer than many drafts, for every number of texts.
        if self._on_gpu:
            kind = ("together", plan.beam_width, plan.draft_length, noise is not None)
            found: Arrays = during(left_out, True, self.searches.of(kind, search), *arrays)
        else:
            found = search(0, *arrays)
        return Draft(*found, plan.draft_length)

    def _together(
        self,
        width: int,
        length: int,
        serial: int,
        hidden: mx.array,
        taps: mx.array | None,
        roots: mx.array,
        noise: mx.array | None = None,
    ) -> Arrays:
        joined = self.network.joined(hidden, taps) if self.reader is None else hidden

        def seen(depth: int) -> mx.array | None:
            return None if noise is None else self._of_columns(noise[:, depth])

        draft = self._searches(joined, roots, width, length, seen, lazily=True)
        return draft.tokens, draft.parents, draft.depths, draft.scores

    def _searches(
        self,
        joined: Float[mx.array, "S D"],
        roots: Int[mx.array, " S"],
        width: int,
        length: int,
        noise: Callable[[int], mx.array | None],
        lazily: bool = False,
    ) -> Draft:
        """Return the drafts of many roots.

        Args:
            joined: The context of each.
            roots: The tokens that are certain.
            width: Beams of each.
            length: Tokens of a beam.
            noise: Returns that of all roots at a depth.
            lazily: As ``beam_searches`` takes it.
        """
        steps, ids = self._steps, self._steps.token_ids
        context = steps.context(joined)
        width = min(width, self.network.head.weight.shape[0])
        hidden, shares = (mx.repeat(x, width, axis=0) for x in context)
        rows = iter(range(length))  # of noise, in the search's order

        def step(columns: mx.array, carried: Carried | None) -> tuple[mx.array, Carried]:
            if carried is None:
                x, carried = steps.first(columns, context)
            else:
                tokens = columns if ids is None else ids[columns]
                x, carried = steps.next(tokens, carried, (hidden, shares))
            seen = noise(next(rows))
            if seen is not None:
                seen = mx.repeat(seen, x.shape[0] // roots.size, axis=0)
            return self._logits(x, seen), carried

        draft = beam_searches(step, roots, width, length, lazily)
        if ids is None:
            return draft
        tokens = mx.concatenate([roots[:, None], ids[draft.tokens[:, 1:]]], axis=1)
        return replace(draft, tokens=tokens.astype(mx.int32))

    def _of_columns(self, noise: Float[mx.array, "L V"] | None) -> Float[mx.array, "L K"] | None:
        """Return the noise of the tokens that can be drafted."""
        if noise is None:
            return None
        ids = self._steps.token_ids
        return noise[:, : self.config.vocab_size] if ids is None else mx.take(noise, ids, axis=1)

    def _logits(
        self, x: Float[mx.array, "W E"], noise: Float[mx.array, "_ K"] | None
    ) -> Float[mx.array, "W K"]:
        """Return the sharpened logits in float32, after the noise is added."""
        sharpness = self.config.sharpness
        weight = self.network.head.weight.T
        if weight.dtype == mx.float32 and noise is not None:
            return mx.addmm(noise, x, weight, alpha=sharpness, beta=sharpness)
        if weight.dtype == mx.float32:
            return (sharpness * x) @ weight
        logits = (x @ weight).astype(mx.float32)
        return sharpness * (logits if noise is None else logits + noise)


def settle(drafter: Drafter) -> None:
    """Let a drafter make now what it makes in a long run, so that its speed there is measured."""
    drafter = getattr(drafter, "drafter", drafter)  # of a mixture
    if isinstance(drafter, BoundDrafter):
        drafter.tabulate()
    if isinstance(drafter, BoundDrafter | MedusaDrafter):
        drafter.searches.forget(at_once=True)


class RecurrentState(LastSeen):
    """One text's state, whose drafts can be made together with those of other texts.

    Args:
        drafter: Searches.
        features: The last of them is what the target computed when it chose the root.
    """

    def __init__(self, drafter: BoundDrafter, features: Features):
        super().__init__(drafter.draft, features)
        self.drafter = drafter

    def context(self, root: Int[mx.array, " 1"]) -> tuple[mx.array, ...]:
        """Return what the target computed when it chose the root."""
        taps = self.features.last_taps
        return (self.features.last,) if taps is None else (self.features.last, taps)
