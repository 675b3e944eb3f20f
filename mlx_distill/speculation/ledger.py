"""What a prompt cache holds when a text ends, wherever and however it ends.

A caller that keeps a prompt cache goes on with it. It then has to hold the prompt and every token
that was handed out, and no more: whether the text ended by itself, the caller left, a logits
processor failed, or Ctrl-C came in the middle of a call that some layers had seen and others not.

The ledger says at every moment how to get there. All it knows is one immutable record, replaced by
a single assignment whenever a step is complete, so that an exception between any two instructions
finds the record of before or that of after. Settling is idempotent: interrupted, it is repeated.
"""

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import mlx.core as mx
from mlx_lm.models.cache import CacheList, RotatingKVCache

from mlx_distill.errors import InputError
from mlx_distill.speculation.caching import CacheConfig, PromptCache
from mlx_distill.target.layer_cache import LayerCache, cached_tokens, leaves
from mlx_distill.target.restoring import RestorePoint, even_out, restore, state_at
from mlx_distill.target.target import Target, TreeCall
from mlx_distill.target.tree_cache import can_branch, can_trim

UNUSABLE = InputError(
    "the prompt cache cannot be used any more: its last text was interrupted while the model read; "
    "make a new one"
)


class Unusable:
    """Stands in for a cache whose content is not known; whoever touches it is told so."""

    def __getattr__(self, name: str) -> NoReturn:
        raise UNUSABLE


class Record(NamedTuple):
    """What is known of the cache.

    Args:
        start: The state before the first tree; None once a tree was committed.
        kept: The last tree that was committed, on the path's every node.
        rows: How many of the path's nodes the text has so far.
        missing: The last token that was handed out, if the cache does not hold it.
    """

    start: RestorePoint | None
    kept: TreeCall | None = None
    rows: int = 0
    missing: int | None = None


class Ledger:
    """Keeps the record of one text's cache.

    Args:
        target: Reads what is missing in the end.
        cache: How keys and values are kept.
        caches: The prompt cache.
    """

    def __init__(self, target: Target, cache: CacheConfig, caches: PromptCache):
        self.target = target
        self.cache = cache
        self.caches = caches
        self.record = Record(RestorePoint(caches))

    def prompt_is_read(self) -> None:
        """Take note that the cache holds the prompt."""
        self.record = Record(RestorePoint(self.caches))

    def commit(self, call: TreeCall, path: list[int]) -> None:
        """Keep the nodes of a path in the cache, of which the text has the root so far."""
        call.commit(path)
        self.cache.quantize(self.caches)
        self.record = Record(None, call, 1)

    def hand_out(self, token: int, rows: int, in_cache: bool) -> None:
        """Take note that a token is handed out, which makes so many of the path's nodes text."""
        missing = None if in_cache else token
        self.record = Record(self.record.start, self.record.kept, rows, missing)

    def hand_out_behind(self, call: TreeCall, token: int) -> None:
        """Keep a root in the cache, and take note that the token behind it is handed out."""
        self.record = Record(None, call, 1, token)

    def settle(self) -> None:
        """Let the cache hold the text; see ``insist``."""
        insist(self._settle, self.caches)

    def _settle(self) -> None:
        record = self.record
        # Both put the cache where it was, whatever the target was given since.
        if record.kept is not None:
            record.kept.rebase(self.caches)
            record.kept.rewind(record.rows)
        if record.start is not None:
            record.start.restore(self.caches)
        for cache in self.caches:
            even_out(cache)
        if any(_is_torn(cache) for cache in self.caches):
            give_up(self.caches)
            return
        if record.missing is not None:
            self.target.forward(mx.array([record.missing]), self.caches)
            self.cache.quantize(self.caches)
        mx.eval([cache.state for cache in self.caches if not cache.empty()])


class PlainLedger:
    """The same for mlx-lm's own loop, whose cache is one token ahead and may be torn.

    Args:
        caches: The prompt cache.
        prompt_tokens: Length of the prompt that is going to be read.
    """

    def __init__(self, caches: PromptCache, prompt_tokens: int):
        self.caches = caches
        self.num_tokens = cached_tokens(caches) + prompt_tokens
        self.start: RestorePoint | None = RestorePoint(caches)

    def hand_out(self) -> None:
        """Take note that one more token is handed out."""
        self.start = None
        self.num_tokens += 1

    def settle(self) -> None:
        """Let the cache hold the text; it is given up where that cannot be done."""
        if not all(can_branch(cache) for cache in self.caches):
            give_up(self.caches)
            return
        wanted = self.num_tokens
        read = [getattr(cache, "offset", None) for cache in leaves(self.caches)]  # states: None
        if self.start and any(number is None or number < wanted for number in read):
            self.start.restore(self.caches)  # interrupted while the prompt was read
        elif None in read:
            give_up(self.caches)
        elif all(can_trim(cache) for cache in self.caches):
            for cache in self.caches:
                restore(cache, state_at(cache, wanted))
        elif any(number != wanted for number in read):
            give_up(self.caches)
        for cache in self.caches:
            even_out(cache)


def insist(settle: Callable[[], None], caches: PromptCache) -> None:
    """Do what can be repeated until it is done; other errors than interrupts give the caches up.

    Raises:
        KeyboardInterrupt: When it is done, if one came meanwhile.
    """
    interrupt = None
    while True:
        try:
            settle()
            break
        except KeyboardInterrupt as error:
            interrupt = error
        except BaseException:
            give_up(caches)
            raise
    if interrupt is not None:
        raise interrupt


def give_up(caches: PromptCache) -> None:
    """Put something in the place of caches whose content is not known, which says so."""
    caches[:] = [Unusable() for _ in caches]


def _is_torn(cache: LayerCache) -> bool:
    """Return whether a window lost its content, interrupted while it was moved."""
    if isinstance(cache, CacheList):
        return any(_is_torn(part) for part in cache.caches)
    if not isinstance(cache, RotatingKVCache) or not cache.offset:
        return False
    try:
        return cache.keys is None or cache.values is None
    except (AttributeError, KeyError):
        return True
