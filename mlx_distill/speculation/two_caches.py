"""One prompt cache of two models, as mlx-lm keeps it: the target's layers, then the draft model's.

When a text ends, the draft model's part has to hold as much as the target's. It has read more where
drafts were read in vain, and less where the last tokens were never drafted behind.
"""

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import trim_prompt_cache

from mlx_distill.errors import InputError
from mlx_distill.speculation.caching import PromptCache
from mlx_distill.speculation.decoding import DecodedTokens
from mlx_distill.speculation.ledger import Unusable, give_up
from mlx_distill.target.layer_cache import cached_tokens
from mlx_distill.target.prompt_cache import prompt_caches
from mlx_distill.target.tree_cache import can_trim


class TwoCaches:
    """The parts of a prompt cache.

    Args:
        whole: The prompt cache; None makes new ones.
        model: The target.
        draft_model: The other model.

    Raises:
        InputError: If it is of neither the target alone nor of both.

    Attributes:
        target: The target's part.
        draft: The other model's; None where it has none.
    """

    def __init__(self, whole: PromptCache, model: nn.Module, draft_model: nn.Module):
        self.whole, self.draft_model = whole, draft_model
        size, more = len(prompt_caches(model)), len(prompt_caches(draft_model))
        if len(whole) not in (size, size + more):
            raise InputError(
                f"the prompt cache has {len(whole)} layers; the model has {size}, with its draft "
                f"model {size + more}"
            )
        self.target = whole[:size]
        self.draft = whole[size:] or None

    def kept(self, tokens: DecodedTokens) -> DecodedTokens:
        """Yield a text's tokens; in the end both parts hold them."""
        handed_out = []
        try:
            for one in tokens:
                handed_out.append(one.token)
                yield one
        finally:
            tokens.close()
            self._even_out(handed_out)

    def _even_out(self, handed_out: list[int]) -> None:
        """Let the draft model's part hold what the target's does."""
        if any(isinstance(cache, Unusable) for cache in self.target):
            give_up(self.whole)
            return
        if self.draft is not None:
            beyond = cached_tokens(self.draft) - cached_tokens(self.target)
            if beyond > 0 and all(map(can_trim, self.draft)):
                trim_prompt_cache(self.draft, beyond)
            elif beyond < 0 and handed_out:
                self.draft_model(mx.array([handed_out[beyond:]]), cache=self.draft)
                mx.eval([cache.state for cache in self.draft])
        self.whole[:] = [*self.target, *(self.draft or [])]
