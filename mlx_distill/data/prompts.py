"""Prompts out of the JSONL layouts that mlx-lm users have: prompt, messages, turns, text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_distill.errors import InputError, one_line
from mlx_distill.files import read_jsonl


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[dict[str, Any]],
    *,
    system_prompt: str | None = None,
    chat_template: bool = True,
    template_config: dict[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a prompt, through the chat template where the tokenizer has one.

    Args:
        tokenizer: An mlx-lm tokenizer.
        prompt: A text, or a chat as a list of ``{"role", "content"}`` messages.
        system_prompt: Put in front of the chat.
        chat_template: False encodes the bare text, as ``--ignore-chat-template`` does.
        template_config: Further arguments of the chat template.

    Raises:
        InputError: If the prompt is empty, if it is a chat and there is no template to write it
            with, or if the template fails.
    """
    if not prompt:
        raise InputError("the prompt is empty; give at least one character")
    has_template = chat_template and getattr(tokenizer, "has_chat_template", False)
    if has_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        if system_prompt is not None:
            messages.insert(0, {"role": "system", "content": system_prompt})
        try:
            ids = list(
                tokenizer.apply_chat_template(
                    messages, **{"add_generation_prompt": True, **(template_config or {})}
                )
            )
        except Exception as error:  # a template is a program of the model's; it can raise anything
            raise InputError(
                f"the tokenizer's chat template failed: {one_line(error)}; "
                "--ignore-chat-template goes without"
            ) from error
        if not all(isinstance(token, int) for token in ids):
            raise InputError("the chat template gives no list of token ids; leave tokenize alone")
        return ids
    for flag, value in (
        ("--system-prompt", system_prompt),
        ("--chat-template-config", template_config),
    ):
        if value:
            raise InputError(f"{flag} needs a tokenizer with a chat template; this has none")
    if not isinstance(prompt, str):
        raise InputError("a chat needs a tokenizer with a chat template; this has none")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not text: {error.reason} at {error.start}") from None
    # As in mlx-lm: BOS is added unless the text already begins with it.
    bos = tokenizer.bos_token
    return list(
        tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))
    )


def read_prompts(
    path: str | Path,
    tokenizer: Any,
    *,
    prompt_tokens: int | None = None,
    chat_template: bool = True,
) -> list[list[int]]:
    """Return the encoded prompts of a JSONL file, one list of token ids per row.

    A row holds ``prompt`` (text), ``messages`` (a chat; its last answer is dropped), ``turns``
    (MT-Bench; the first counts) or ``text`` (a document; its first ``prompt_tokens`` tokens are the
    prompt). A ``prompt`` is cut to ``prompt_tokens`` too when that is given.

    Raises:
        InputError: If the file is unreadable, a row has none of the keys, or no row is left.
    """
    prompts = []
    for place, row in read_jsonl(path):
        if "text" in row and "prompt" not in row and "messages" not in row:
            limit = prompt_tokens or 32
            # No token is longer than 32 characters on average: spare the rest of a long document.
            text = _text(row["text"], place)[: 32 * limit]
            ids = encode_prompt(tokenizer, text, chat_template=False)[:limit]
        else:
            ids = encode_prompt(tokenizer, _prompt(row, place), chat_template=chat_template)
            ids = ids[:prompt_tokens]
        if not ids:
            raise InputError(f"{place}: the prompt has no tokens")
        prompts.append(ids)
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts


def _prompt(row: dict[str, Any], place: str) -> str | list[dict[str, Any]]:
    if "prompt" in row:
        return _text(row["prompt"], place)
    if "messages" in row:
        return _chat(row["messages"], place)
    if "turns" in row and isinstance(row["turns"], list) and row["turns"]:
        return _text(row["turns"][0], place)
    raise InputError(f"{place}: expected a key prompt, messages, turns or text, got {sorted(row)}")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{place}: expected a non-empty text, got {value!r:.40}")
    return value


def _chat(messages: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{place}: messages must be a list of role and content")
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise InputError(f"{place}: the chat holds no question")
    return messages
