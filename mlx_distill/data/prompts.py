"""Prompts out of the JSONL layouts that mlx-lm users have: prompt, messages, turns, text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_distill.data.chats import Chat, apply_template
from mlx_distill.data.report import Drop, Report
from mlx_distill.data.rows import Row, read_row
from mlx_distill.data.selection import rows_in_turn
from mlx_distill.data.sources import read_rows
from mlx_distill.data.tokens import encode_text, usable_tokenizer
from mlx_distill.errors import InputError
from mlx_distill.limits import plain

DOCUMENT_TOKENS = 32
QUERY = "<query>"  # stands for a text where only what the template puts around it is wanted
# Spec-Bench has ten questions of each, and counts them as one class of six.
MT_BENCH = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)


@dataclass(frozen=True)
class Asked:
    """An encoded prompt.

    Args:
        ids: Its token ids.
        kind: The class that its row names (``category``, as Spec-Bench and MT-Bench have it).
    """

    ids: list[int]
    kind: str | None = None


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]] | Chat,
    *,
    system_prompt: str | None = None,
    chat_template: bool = True,
    template_config: Mapping[str, Any] | None = None,
    prefill: str | None = None,
) -> list[int]:
    """Return the token ids of a prompt, through the chat template where the tokenizer has one.

    Args:
        tokenizer: An mlx-lm tokenizer.
        prompt: A text, or a chat, also as a list of ``{"role", "content"}`` messages.
        system_prompt: Put in front of the chat.
        chat_template: False encodes the bare text, as ``--ignore-chat-template`` does.
        template_config: Further arguments of the chat template.
        prefill: What the answer begins with, and goes on behind.

    Raises:
        InputError: If the prompt is empty, if it is a chat and there is no template to write it
            with, or if the template fails.
    """
    if not (prompt.messages if isinstance(prompt, Chat) else prompt):
        raise InputError("the prompt is empty; give at least one character")
    if chat_template and getattr(tokenizer, "has_chat_template", False):
        return _templated(tokenizer, prompt, system_prompt, template_config, prefill)
    for flag, value in (
        ("--system-prompt", system_prompt),
        ("--chat-template-config", template_config),
        ("--prefill-response", prefill),
    ):
        if value:
            raise InputError(f"{flag} needs {_no_template(chat_template)}")
    if not isinstance(prompt, str):
        raise InputError(f"a chat needs {_no_template(chat_template)}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not text: {error.reason} at {error.start}") from None
    return encode_text(tokenizer, prompt)


def is_templated(tokenizer: Any, wanted: bool, template_config: Mapping[str, Any] | None) -> bool:
    """Return whether prompts or chats of a file go through the chat template.

    Raises:
        InputError: If arguments of a template are given, and there is none.
    """
    templated = wanted and bool(getattr(tokenizer, "has_chat_template", False))
    if template_config and not templated:
        raise InputError(f"--chat-template-config needs {_no_template(wanted)}")
    return templated


def _no_template(wanted: bool) -> str:
    if wanted:
        return "a tokenizer with a chat template; this has none"
    return "the chat template, which --ignore-chat-template leaves out"


def prompt_ids(
    tokenizer: Any, prompt: Any, place: str, template_config: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the token ids of a text, of a chat's messages, or of an array or a list of ids.

    Args:
        tokenizer: An mlx-lm tokenizer.
        prompt: As somebody gives it in Python.
        place: Which it is, for complaints.
        template_config: Further arguments of the chat template.

    Raises:
        InputError: If it is something else, or cannot be written.
    """
    given = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(given, str | Chat):
        return encode_prompt(tokenizer, given, template_config=template_config)
    if isinstance(given, Sequence) and not isinstance(given, bytes | bytearray):
        values = plain([*given])
        if all(type(one) is int for one in values):
            return [*values]
        if all(isinstance(one, Mapping) for one in values):
            return encode_prompt(tokenizer, values, template_config=template_config)
    raise InputError(f"{place} must be a text, a chat or token ids, got {prompt!r:.40}")


def encode_suffix(
    tokenizer: Any,
    text: str,
    *,
    chat_template: bool = True,
    template_config: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a text that goes on behind a prompt cache.

    A cache that ``mlx_lm.cache_prompt`` wrote ends within a user's turn, which the text ends: of
    what the chat template makes of the text alone, that in front of it is left out.

    Raises:
        InputError: If the text is empty, or as ``encode_prompt`` for the template.
    """
    if not text:
        raise InputError("the prompt is empty; give at least one character")
    if is_templated(tokenizer, chat_template, template_config):
        config = {"add_generation_prompt": True, **(template_config or {})}
        asked, opened = (
            apply_template(
                tokenizer, Chat([{"role": "user", "content": content}]), config, tokenize=False
            )
            for content in (text, QUERY)
        )
        if QUERY not in opened:
            raise InputError(
                "the chat template loses the text; --ignore-chat-template goes without"
            )
        text = asked[opened.index(QUERY) :]
    return tokenizer.encode(text, add_special_tokens=False)


def _templated(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]] | Chat,
    system_prompt: str | None,
    template_config: Mapping[str, Any] | None,
    prefill: str | None,
) -> list[int]:
    """Return the token ids of a prompt as the chat template opens the answer to it."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chat = prompt if isinstance(prompt, Chat) else Chat(prompt)
    if system_prompt is not None:
        system = {"role": "system", "content": system_prompt}
        chat = Chat([system, *chat.messages], chat.tools, chat.template_config)
    config = {"add_generation_prompt": True, **(template_config or {})}
    if prefill is not None:
        begun = {"role": "assistant", "content": prefill}
        chat = Chat([*chat.messages, begun], chat.tools, chat.template_config)
        config |= {"add_generation_prompt": False, "continue_final_message": True}
    try:
        ids = list(apply_template(tokenizer, chat, config))
    except InputError as error:
        raise InputError(f"{error}; --ignore-chat-template goes without") from error
    if not all(isinstance(token, int) for token in ids):
        raise InputError("the chat template gives no list of token ids; leave tokenize alone")
    return ids


def read_prompts(path: str | Path, tokenizer: Any, **options: Any) -> list[list[int]]:
    """Return the encoded prompts of a file, one list of token ids per row; see ``read_asked``."""
    return [asked.ids for asked in read_asked(path, tokenizer, **options)]


def read_asked(
    path: str | Path,
    tokenizer: Any,
    *,
    prompt_tokens: int | None = None,
    chat_template: bool = True,
    template_config: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> list[Asked]:
    """Return the encoded prompts of a file, one per row, with their classes.

    A row holds ``prompt`` (text), ``messages`` (a chat; its last answer is dropped), ``turns``
    (MT-Bench; the first counts) or ``text`` (a document; its first ``prompt_tokens`` tokens are the
    prompt). A bare ``prompt`` is cut to ``prompt_tokens``, too, when that is given. A chat is never
    cut, for it would lose the mark that asks for the answer: longer ones are dropped and counted.

    Args:
        path: A JSONL file, also compressed, or a parquet file.
        tokenizer: An mlx-lm tokenizer; its chat template writes prompts and messages.
        prompt_tokens: The longest prompt.
        chat_template: False leaves the template out.
        template_config: Further arguments of the chat template.
        report: Counts what is dropped.

    Raises:
        InputError: If the file is unreadable, a row has none of the keys, no row is left, or there
            is no template for ``template_config``.
    """
    report, tokenizer = report or Report(noun="prompts"), usable_tokenizer(tokenizer)
    templated = is_templated(tokenizer, chat_template, template_config)
    config = template_config if templated else None
    prompts = []
    for place, given in read_rows(path):
        report.rows += 1
        with report.counting(place):
            opening = prompt_tokens or DOCUMENT_TOKENS
            ids = _encoded(tokenizer, given, place, prompt_tokens, opening, templated, config)
            kind = given.get("category")
            prompts.append(Asked(ids, kind if isinstance(kind, str) else None))
            report.kept += 1
    if not prompts:
        raise InputError(
            f"{path} holds no prompts"
            + (f"; of {report.rows} rows: {report.reasons()}" if report.dropped else "")
        )
    return _with_spec_bench_classes(prompts)


def read_each(
    path: str | Path,
    tokenizer: Any,
    *,
    chat_template: bool = True,
    template_config: Mapping[str, Any] | None = None,
) -> list[tuple[dict[str, Any], list[int] | InputError]]:
    """Return the rows of a file, each with its encoded prompt, or with what is wrong with it.

    Args:
        path: A file as ``read_asked`` takes it, or a text file with a prompt in every line; a
            document is the prompt as a whole.
        tokenizer: An mlx-lm tokenizer.
        chat_template: False leaves the template out.
        template_config: Further arguments of the chat template.

    Raises:
        InputError: If the file is unreadable, or holds nothing, or there is no template for
            ``template_config``.
    """
    templated = is_templated(tokenizer, chat_template, template_config)
    config = template_config if templated else None
    found = []
    for place, given in read_rows(path):
        try:
            ids = _encoded(tokenizer, given, place, None, None, templated, config)
            found.append((given, ids))
        except (InputError, Drop) as error:
            found.append((given, InputError(str(error))))
    if not found:
        raise InputError(f"{path} holds no prompts")
    return found


def _encoded(
    tokenizer: Any,
    given: Mapping[str, Any],
    place: str,
    prompt_tokens: int | None,
    opening: int | None,
    templated: bool,
    config: Mapping[str, Any] | None,
) -> list[int]:
    """Return the token ids of a row's prompt: of a document the opening, or all of it."""
    row = read_row(given, place, answers=False, prompts=True)
    if row.document is not None:
        ids = _opening(tokenizer, row.document, opening)
    else:
        ids = _asked(tokenizer, row, place, templated, config)
        if prompt_tokens is not None and len(ids) > prompt_tokens:
            if templated:
                raise Drop(f"chat longer than {prompt_tokens} tokens")
            ids = ids[:prompt_tokens]
    if not ids:
        raise InputError(f"{place}: the prompt has no tokens")
    return ids


def _with_spec_bench_classes(prompts: list[Asked]) -> list[Asked]:
    """Return prompts with MT-Bench's eight categories as one where they lie beside others."""
    kinds = {one.kind for one in prompts}
    if kinds <= MT_BENCH or not kinds & MT_BENCH:
        return prompts
    return [replace(one, kind="mt_bench") if one.kind in MT_BENCH else one for one in prompts]


def in_turn(prompts: Sequence[Asked]) -> list[Asked]:
    """Return prompts with their classes taking turns, so that the first few hold all of them."""
    return [prompts[row] for row in rows_in_turn([one.kind for one in prompts])]


def _opening(tokenizer: Any, text: str, limit: int | None) -> list[int]:
    """Return the first tokens of a document; all of them where there is no limit."""
    if limit is None:
        return encode_text(tokenizer, text)
    # No token is longer than 32 characters on average: spare the rest of a long document.
    return encode_text(tokenizer, text[: 32 * limit])[:limit]


def _asked(
    tokenizer: Any, row: Row, place: str, templated: bool, config: Mapping[str, Any] | None
) -> list[int]:
    question = row.question
    if question is not None and not templated:
        return encode_prompt(tokenizer, question, chat_template=False)
    chat = row.chat
    asked = chat.upto(len(chat.messages) - row.answered)
    if not asked.messages:
        raise InputError(f"{place}: the chat holds no question")
    try:
        return encode_prompt(tokenizer, asked, chat_template=templated, template_config=config)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error.__cause__
