"""Texts to learn from, as token ids: mlx-lm's dataset layouts, from JSONL files or the hub.

A row is ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages"}``. What is learned is what
``Text.learned`` marks: of a text all but its first token, of an answer all of it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.data.prompts import encode_prompt
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import read_jsonl

LONG = ("cut", "drop", "refuse")


@dataclass(frozen=True, init=False)
class Text:
    """One text.

    Args:
        tokens: Its token ids.
        learned: Which of them are learned, that is predicted from those before them; never the
            first, which has none. None for all the others.
    """

    tokens: list[int]
    learned: tuple[bool, ...]

    def __init__(self, tokens: list[int], learned: Iterable[bool] | None = None) -> None:
        marks = [True] * len(tokens) if learned is None else [bool(one) for one in learned]
        if len(marks) != len(tokens):
            raise ValueError(f"{len(marks)} marks do not fit {len(tokens)} tokens")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "learned", (False, *marks[1:])[: len(tokens)])

    @classmethod
    def behind(cls, tokens: list[int], start: int) -> "Text":
        """Return a text of which all is learned but its first ``start`` tokens."""
        return cls(tokens, [place >= start for place in range(len(tokens))])

    @property
    def num_learned(self) -> int:
        """Number of learned tokens."""
        return sum(self.learned)

    def part(self, start: int, stop: int) -> "Text":
        """Return the tokens from ``start`` to ``stop`` as a text of its own."""
        return Text(self.tokens[start:stop], self.learned[start:stop])


@dataclass(frozen=True)
class TextBatch:
    """Texts of one step, padded on the right.

    Args:
        tokens: Token ids; padding is 0.
        mask: 1 where the token that follows position t is to be learned.
        rows: Which texts they are.
    """

    tokens: mx.array
    mask: mx.array
    rows: list[int]

    @property
    def inputs(self) -> mx.array:
        """What the networks read, (B, T)."""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> mx.array:
        """What follows it, (B, T)."""
        return self.tokens[:, 1:]


def read_texts(
    source: str | Path, tokenizer: Any, *, learn_prompts: bool = False, split: str = "train"
) -> list[Text]:
    """Return the texts of a JSONL file, a folder with ``{split}.jsonl``, or a hub dataset.

    Args:
        source: A file, a folder, or the name of a hub dataset that holds ``{split}.jsonl``.
        tokenizer: An mlx-lm tokenizer; its chat template writes prompts and messages.
        learn_prompts: Also learn the prompts, not the answers alone.
        split: Which file of a folder or a dataset.

    Raises:
        InputError: If there is no such file, a row cannot be used, or there are no rows.
    """
    path = local_file(source, split)
    texts = [encode_row(row, tokenizer, place, learn_prompts) for place, row in read_jsonl(path)]
    if not texts:
        raise InputError(f"{path} holds no texts")
    return texts


def local_file(source: str | Path, split: str) -> Path:
    """Return the JSONL file that a source means, fetched from the hub if it is not here."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / f"{split}.jsonl"
    if path.exists():
        return path
    name = str(source)
    if path.suffix == ".jsonl" or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"there is no file {path}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, f"{split}.jsonl", repo_type="dataset"))
    except Exception as error:  # the hub's client raises its transport's errors too
        raise InputError(
            f"there is no file {name}, and {split}.jsonl of a dataset of that name could not be "
            f"fetched from the hub: {one_line(error)}"
        ) from None


def encode_row(
    row: dict[str, Any], tokenizer: Any, place: str, learn_prompts: bool, ended: bool = True
) -> Text:
    """Return the text of one row; see ``read_texts``.

    A text that did not end, but was cut off, gets no end token; a chat template writes its own.
    """
    ends = tokenizer.eos_token_id if ended else None
    if "prompt" in row and "completion" in row:
        question, answer = (_string(row[name], place) for name in ("prompt", "completion"))
        messages = [{"role": "user", "content": question}]
        if getattr(tokenizer, "has_chat_template", False):
            messages.append({"role": "assistant", "content": answer})
            return encode_row({"messages": messages}, tokenizer, place, learn_prompts)
        prompt = _prompt(tokenizer, question, place, chat_template=False)
        tokens = [*prompt, *tokenizer.encode(answer, add_special_tokens=False)]
        start = 0 if learn_prompts else len(prompt)
    elif "messages" in row:
        text = _chat(row["messages"], tokenizer, place)
        return Text(text.tokens) if learn_prompts else text
    elif "text" in row:
        tokens, start = list(tokenizer.encode(_string(row["text"], place))), 0
    else:
        raise InputError(
            f"{place}: expected text, prompt and completion, or messages, got {sorted(row)}"
        )
    if ends is not None and tokens[-1:] != [ends]:
        tokens.append(ends)
    return Text.behind(tokens, start)


def fit(
    texts: Sequence[Text], max_length: int, long: str = "cut"
) -> tuple[list[Text], dict[str, int]]:
    """Return the texts that can be learned, none longer than ``max_length``, and what was done.

    Args:
        texts: All of them.
        max_length: In tokens.
        long: What happens to longer ones: "cut" keeps their beginning, "drop" leaves them out,
            "refuse" stops.

    Raises:
        InputError: If a text is too long and that was to be refused, or if nothing is left.
    """
    if long not in LONG:
        raise InputError(f"long must be one of {', '.join(LONG)}, got {long}")
    too_long = sum(len(text.tokens) > max_length for text in texts)
    if too_long and long == "refuse":
        raise InputError(
            f"{too_long} of {len(texts)} texts are longer than {max_length} tokens; "
            "cut or drop them with --long, or raise --max-length"
        )
    kept = [
        text.part(0, max_length)
        for text in texts
        if long == "cut" or len(text.tokens) <= max_length
    ]
    whole = len(kept)
    kept = [text for text in kept if text.num_learned]
    counts = {"texts": len(texts), "too_long": too_long, "nothing_to_learn": whole - len(kept)}
    if not kept:
        raise InputError(
            f"none of {len(texts)} texts has anything to learn: {too_long} are longer than "
            f"{max_length} tokens, and of {whole} that are kept nothing follows the prompt"
        )
    return kept, counts


def pack(texts: Sequence[Text], length: int) -> list[Text]:
    """Return the texts end to end, cut into rows of ``length`` tokens; only the last is shorter.

    Nothing is padded, and a text sees the end of the one before it. All that was learned still is,
    and once: a row begins with the last token of the one before it. A row that would have nothing
    to learn is left out.
    """
    stream = Text(
        [token for text in texts for token in text.tokens],
        [mark for text in texts for mark in text.learned],
    )
    rows = [stream.part(at, at + length) for at in range(0, len(stream.tokens), length - 1)]
    return [row for row in rows if row.num_learned]


def text_batch(texts: Sequence[Text], rows: Iterable[int], multiple: int = 32) -> TextBatch:
    """Return some of the texts as a batch, padded to a multiple of so many inputs."""
    rows = [int(row) for row in rows]
    longest = max(len(texts[row].tokens) for row in rows) - 1
    width = -(-longest // multiple) * multiple + 1
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width - 1), np.float32)
    for place, row in enumerate(rows):
        text = texts[row]
        tokens[place, : len(text.tokens)] = text.tokens
        mask[place, : len(text.tokens) - 1] = text.learned[1:]
    return TextBatch(mx.array(tokens), mx.array(mask), rows)


def batch_order(lengths: Sequence[int], batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """Return which rows a step's batch takes, as a function of the step, counted from 0.

    Every epoch is a new order. Texts of similar length come together, so little is padded: rows
    are shuffled, sorted by length within pools of sixteen batches, and the batches shuffled.
    """
    num_rows = len(lengths)
    per_epoch = -(-num_rows // batch_size)
    known: dict[int, list[list[int]]] = {}

    def rows(step: int) -> list[int]:
        epoch, place = divmod(step, per_epoch)
        if epoch not in known:
            known.clear()
            known[epoch] = list(_epoch(lengths, batch_size, np.random.default_rng([seed, epoch])))
        return known[epoch][place]

    return rows


def _epoch(
    lengths: Sequence[int], batch_size: int, random: np.random.Generator
) -> Iterator[list[int]]:
    order = random.permutation(len(lengths))
    pool = 16 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        some = sorted(order[start : start + pool].tolist(), key=lambda row: lengths[row])
        batches += [some[at : at + batch_size] for at in range(0, len(some), batch_size)]
    for place in random.permutation(len(batches)):
        yield batches[place]


def _chat(messages: Any, tokenizer: Any, place: str) -> Text:
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InputError(f"{place}: messages must be a list of role and content")
    if not messages or messages[-1].get("role") != "assistant":
        raise InputError(f"{place}: the last message must be the assistant's, to learn from")
    if not getattr(tokenizer, "has_chat_template", False):
        raise InputError(
            f"{place}: a chat needs a tokenizer with a chat template; this has none (rows "
            "with prompt and completion need none)"
        )
    whole = _prompt(tokenizer, messages, place, template_config={"add_generation_prompt": False})
    asked = _prompt(tokenizer, messages[:-1], place) if len(messages) > 1 else []
    # Where a template opens an answer to be written otherwise than a written one, such as with a
    # mark for thinking, the answer begins where the two part.
    pairs = enumerate(zip(whole, asked, strict=False))
    start = next((at for at, (one, other) in pairs if one != other), min(len(whole), len(asked)))
    return Text.behind(whole, start)


def _prompt(tokenizer: Any, prompt: Any, place: str, **options: Any) -> list[int]:
    try:
        return encode_prompt(tokenizer, prompt, **options)
    except InputError as error:
        reason = str(error)
        if error.__cause__ is not None:  # the template's own words; here it cannot be left out
            reason = f"the tokenizer's chat template failed: {one_line(error.__cause__)}"
        raise InputError(f"{place}: {reason}") from error.__cause__


def _is_message(value: Any) -> bool:
    """Return whether a template can write it; some would write a missing content as "None"."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and (value.get("content") is not None or "tool_calls" in value)
    )


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{place}: expected a non-empty text, got {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: not text: {error.reason} at {error.start}") from None
    return value
