"""One prompt cache of two models, as mlx-lm keeps it: the target's layers, then the draft model's.

When a text ends, the draft model's part has to hold as much as the target's; it is left out where
the draft model has no positions for that. It has read more where drafts were read in vain, and less
where the last tokens were never drafted behind, or none was; and an interrupt may have come when
some of its layers had read, and others not.
"""

import mlx.core as mx
from jaxtyping import Int
from mlx import nn

from mlx_distill.arrays import to_host
from mlx_distill.drafters.draft_model import DraftModelDrafter, DraftModelState
from mlx_distill.errors import InputError
from mlx_distill.speculation.caching import PromptCache
from mlx_distill.speculation.drafted_text import DecodedTokens, Decoding
from mlx_distill.speculation.ledger import Unusable, give_up, insist
from mlx_distill.target.layer_cache import cached_tokens
from mlx_distill.target.prompt_cache import prompt_caches


class TwoCaches:
    """The parts of a prompt cache.

    Args:
        whole: The prompt cache.
        model: The target.
        drafter: Of the other model; it is given that model's part.

    Raises:
        InputError: If it is of neither the target alone nor of both.

    Attributes:
        target: The target's part.
    """

    def __init__(self, whole: PromptCache, model: nn.Module, drafter: DraftModelDrafter):
        self.whole, self.drafter = whole, drafter
        size, more = len(prompt_caches(model)), len(prompt_caches(drafter.model))
        if len(whole) not in (size, size + more):
            raise InputError(
                f"the prompt cache has {len(whole)} layers; the model has {size}, with its draft "
                f"model {size + more}"
            )
        self.target = whole[:size]
        self.start = cached_tokens(self.target)
        drafter.caches = whole[size:] or None
        self._state: DraftModelState | None = None

    def kept(
        self, decoding: Decoding, prompt: Int[mx.array, " T"], tokens: DecodedTokens
    ) -> DecodedTokens:
        """Yield a text's tokens; in the end both parts hold them."""
        text = to_host(prompt)
        try:
            for one in tokens:
                text.append(one.token)
                yield one
        finally:
            try:
                tokens.close()
            finally:
                insist(lambda: self._even_out(decoding, prompt, text), self.whole)

    def _even_out(self, decoding: Decoding, prompt: Int[mx.array, " T"], text: list[int]) -> None:
        """Let the draft model's part hold what the target's does; may be repeated."""
        text = text if decoding.prompt_tokens else []  # or an interrupt came before it was read
        unknown = any(isinstance(cache, Unusable) for cache in self.target)
        # Recurrent layers do not say how many they have read.
        if unknown or cached_tokens(self.target) not in (0, self.start + len(text)):
            give_up(self.whole)
            return
        draft, positions = self.drafter.caches, self.drafter.positions
        if positions is not None and self.start + len(text) > positions:
            draft = None  # it has no position for the last; what comes next it drafts without these
        if draft is not None:
            if self._state is None:  # nothing was drafted if there is none
                found = decoding.state or DraftModelState(self.drafter, draft, to_host(prompt))
                assert isinstance(found, DraftModelState)
                self._state = found
            self._state.hold(text)
        self.whole[:] = [*self.target, *(draft or [])]
