"""A text as another tokenizer reads it, and which of its tokens begin in the same places.

    ours    The | fo | x | ran | .          The fox ran.
    theirs  The | fox    | ran | .          both begin a token at The, fo(x), ran and the stop

A chat is written by the other tokenizer's own template, and the whole text is encoded once, so no
word is split where the other tokenizer would not; nothing ends within a character. Places are
counted in characters from where an answer begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_distill.data.chats import Chat, write_chat
from mlx_distill.data.texts import Source, Text
from mlx_distill.data.tokens import (
    UNFINISHED,
    character_ends,
    decoded_behind,
    encode_text,
    shared,
    tokens_before,
)
from mlx_distill.errors import InputError


@dataclass(frozen=True)
class OtherReading:
    """A text in another tokenizer's tokens.

    Args:
        tokens: Theirs.
        places: Which of our tokens begins where which of theirs does, in pairs.
    """

    tokens: list[int]
    places: list[tuple[int, int]]


def read_otherwise(
    text: Text, ours: Any, theirs: Any, template_config: Mapping[str, Any] | None = None
) -> OtherReading:
    """Return a text as another tokenizer reads it.

    Args:
        text: In our tokens.
        ours: The tokenizer that made it.
        theirs: The other one.
        template_config: Further arguments of its chat template.

    Raises:
        InputError: If it is a chat that the other tokenizer has no template for.
    """
    source = text.source
    if source and source.templated and source.chat is None:
        raise InputError("packed chats cannot be read in another tokenizer's template; do not pack")
    if source is None or source.chat is None or not source.answers:
        whole = decoded_behind(ours, text.tokens, 0).rstrip(UNFINISHED)
        tokens = _ended(encode_text(theirs, whole), text, ours, theirs)
        spans = [((0, len(text.tokens)), (0, len(tokens)))]
    else:
        chat = _said(text, source, ours)
        tokens, found = _written(chat, source, theirs, template_config)
        if not source.templated and not getattr(theirs, "has_chat_template", False):
            tokens = _ended(tokens, text, ours, theirs)
            found = {message: (start, len(tokens)) for message, (start, _) in found.items()}
        spans = [((start, stop), found[m]) for m, start, stop in source.answers if m in found]
    places = [
        pair
        for our_span, their_span in spans
        for pair in _same_places(ours, text.tokens, our_span, theirs, tokens, their_span)
    ]
    return OtherReading(tokens, places)


def _ended(tokens: list[int], text: Text, ours: Any, theirs: Any) -> list[int]:
    """Return tokens with their end, if the text has ours."""
    end: int | None = theirs.eos_token_id
    if end is None or text.tokens[-1] != ours.eos_token_id or tokens[-1:] == [end]:
        return tokens
    return [*tokens, end]


def _said(text: Text, source: Source, ours: Any) -> Chat:
    """Return the chat of a text; an answer that the row does not hold is read out of the tokens."""
    assert source.chat is not None
    message, start, stop = source.answers[-1]
    if message < len(source.chat.messages):
        return source.chat
    content = decoded_behind(ours, text.tokens[:stop], start).rstrip(UNFINISHED)
    return source.chat.upto(message, {"role": "assistant", "content": content})


def _written(
    chat: Chat, source: Source, tokenizer: Any, template_config: Mapping[str, Any] | None
) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Return a chat's tokens in another tokenizer, and where its answers are, by message."""
    if getattr(tokenizer, "has_chat_template", False):
        written = write_chat(tokenizer, chat, template_config, source.ended)
        text, special = written.text, False
        spans = {one.message: (one.content, one.stop) for one in written.answers}
    elif not source.templated and len(chat.messages) == 2:
        asked, said = (message["content"] for message in chat.messages)
        text, special = asked + said, True
        spans = {1: (len(asked), len(text))}
    else:
        raise InputError(
            f"{source.place}: the teacher's tokenizer has no chat template to read a chat with"
        )
    tokens = encode_text(tokenizer, text, special)
    return tokens, {
        message: (
            tokens_before(tokenizer, text, start, tokens, special),
            tokens_before(tokenizer, text, stop, tokens, special),
        )
        for message, (start, stop) in spans.items()
    }


def _same_places(
    ours: Any,
    our_tokens: Sequence[int],
    our_span: tuple[int, int],
    theirs: Any,
    their_tokens: Sequence[int],
    their_span: tuple[int, int],
) -> list[tuple[int, int]]:
    """Return which tokens of the same stretch of text begin in the same places."""
    our_text, our_begins = _begins(ours, our_tokens, *our_span)
    their_text, their_begins = _begins(theirs, their_tokens, *their_span)
    same = shared(our_text, their_text)  # a template may trim an answer
    return [
        (place, their_begins[at])
        for at, place in our_begins.items()
        if at <= same and at in their_begins
    ]


def _begins(
    tokenizer: Any, tokens: Sequence[int], start: int, stop: int
) -> tuple[str, dict[int, int]]:
    """Return a stretch of text without the blanks before it, and what begins at each character.

    Of several tokens without characters the last one counts.
    """
    stretch = list(tokens[:stop])
    text = decoded_behind(tokenizer, stretch, start)
    blanks = len(text) - len(text.lstrip())
    begins, at = {}, 0
    for place, end in enumerate(character_ends(tokenizer, stretch, start), start=start):
        if at is not None:
            begins[max(0, at - blanks)] = place
        at = end
    return text[blanks:], begins
