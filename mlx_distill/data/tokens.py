"""Text as token ids and back: one beginning, and where in the text each token ends."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_distill.errors import InputError

UNFINISHED = "\ufffd"
WINDOW = 4  # tokens decoded together, for a word's first blank is not to be had otherwise


def usable_tokenizer(tokenizer: Any) -> TokenizerWrapper:
    """Return a tokenizer as mlx-lm loads it; one of transformers is wrapped.

    Raises:
        InputError: If it is no tokenizer.
    """
    check_tokenizer(tokenizer)
    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise InputError if it is no tokenizer."""
    if not all(hasattr(tokenizer, name) for name in ("encode", "decode", "get_vocab")):
        raise InputError(f"the tokenizer must be one, as load returns it, got {tokenizer!r:.40}")


def encode_text(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Return the token ids of a text, with one token that begins it.

    Args:
        tokenizer: An mlx-lm tokenizer.
        text: What to encode; it may begin with the BOS token's text.
        special: Add what the tokenizer puts around a text. As in mlx-lm, BOS is added unless the
            text already begins with it.
    """
    bos = tokenizer.bos_token
    begun = bos is not None and text.startswith(bos)
    ids = list(tokenizer.encode(text, add_special_tokens=special and not begun))
    # Some tokenizers put one in front of whatever they are given.
    return ids[1:] if begun and ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def encode_behind(tokenizer: Any, before: str, tokens: Sequence[int], text: str) -> list[int]:
    """Return the token ids of a text that goes on behind another one.

    Some tokenizers put a blank in front of whatever they are given, so it is given to them behind
    the other text; where a token would reach across the border, behind a line's end.

    Args:
        tokenizer: An mlx-lm tokenizer.
        before: The other text.
        tokens: Its token ids, which stay as they are.
        text: What to encode.
    """
    line = list(tokenizer.encode("\n", add_special_tokens=False))
    for known, whole in (
        (list(tokens), encode_text(tokenizer, before + text)),
        (line, list(tokenizer.encode("\n" + text, add_special_tokens=False))),
    ):
        if whole[: len(known)] == known:
            return whole[len(known) :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how long the beginning is that two texts, or two lists of tokens, share."""
    parting = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(parting, min(len(one), len(other)))


def tokens_before(
    tokenizer: Any, text: str, place: int, tokens: Sequence[int], special: bool = False
) -> int:
    """Return how many of a text's tokens lie before a character; the one across it does not.

    Args:
        tokenizer: An mlx-lm tokenizer.
        text: The whole text.
        place: The character.
        tokens: The text's.
        special: Whether they were encoded with special tokens.
    """
    if place >= len(text):
        return len(tokens)
    return shared(tokens, encode_text(tokenizer, text[:place], special))


def decoded_behind(tokenizer: Any, tokens: Sequence[int], start: int) -> str:
    """Return the text of the tokens from ``start`` on, with the blank that it may begin with."""
    begun = _window(tokenizer, tokens, start)
    known, whole = (_decoded(tokenizer, some) for some in (tokens[begun:start], tokens[begun:]))
    return whole[len(known) :]


def character_ends(tokenizer: Any, tokens: Sequence[int], start: int = 0) -> list[int | None]:
    """Return behind how many characters each token from ``start`` on ends, counted from there.

    None stands where a token ends within a character. Special tokens have no characters.
    """
    ends: list[int | None] = []
    begun = _window(tokenizer, tokens, start)
    length, done, borders = 0, start, [start]
    for stop in range(start + 1, len(tokens) + 1):
        known, grown = (_decoded(tokenizer, tokens[begun:place]) for place in (done, stop))
        if grown.endswith(UNFINISHED) and not known.endswith(UNFINISHED):
            ends.append(None)
            continue
        length += len(grown) - len(known)
        ends.append(length)
        done = stop
        borders.append(stop)
        while borders[0] <= stop - WINDOW:  # never within a character, which may spoil the next
            begun = borders.pop(0)
    return ends


def _window(tokenizer: Any, tokens: Sequence[int], start: int) -> int:
    """Return from where tokens are decoded for those from ``start`` on; no character is split."""
    first = max(0, start - WINDOW)
    places = range(first, max(-1, first - WINDOW), -1)
    whole = (p for p in places if not _decoded(tokenizer, tokens[p:start]).startswith(UNFINISHED))
    return next(whole, first)


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True)
