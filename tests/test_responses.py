"""The target's answers and their file: the same whatever happens in between."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelIn

import mlx_distill
from mlx_distill import InputError
from mlx_distill.distillation.responses import (
    ResponseConfig,
    read_responses,
    write_responses,
)


@pytest.fixture(scope="module")
def pair(model_in: ModelIn) -> tuple[Any, Any]:
    return mlx_distill.load(model_in("tiny", "float16"))


ANSWERS = ResponseConfig(max_tokens=5, temperatures=(0.0, 1.0), response_batch_size=2)
KNOWN = {"hidden_size": 384, "vocab_size": 4096, "tokenizer_hash": "1"}


@pytest.fixture(scope="module")
def prompts(pair: tuple[Any, Any]) -> list[list[int]]:
    texts = ("Once upon a time", "Ben had", "The old baker", "A dog", "One day Lily")
    prompts = [pair[1].encode(text) for text in texts]
    return [[*prompt, token] for token in (3, 5, 8, 13) for prompt in prompts]


def answer(
    path: Path, pair: tuple[Any, Any], prompts: list[list[int]], config: Any = ANSWERS
) -> Iterator[int]:
    return write_responses(path, pair[0], {2}, prompts, config, KNOWN)


@pytest.fixture(scope="module")
def whole_file(
    pair: tuple[Any, Any], prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    path = tmp_path_factory.mktemp("responses") / "answers.jsonl"
    assert list(answer(path, pair, prompts)) == [16, 20]
    return path.read_bytes()


def test_responses_are_the_targets_own(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole_file)
    responses = read_responses(path)
    assert [response.prompt for response in responses] == prompts
    for response in responses[::2]:  # every other one is greedy
        found = mlx_distill.stream_generate(*pair, response.prompt, max_tokens=5)
        assert response.response == [r.token for r in found]
    header = json.loads(whole_file.splitlines()[0])
    assert header["target"] == KNOWN
    assert header["config"]["temperatures"] == [0.0, 1.0]


def places_to_cut(content: bytes) -> list[int]:
    """Return byte positions behind the header: random ones, and those around the ends of lines."""
    header = content.index(b"\n") + 1
    ends = [match.end() for match in re.finditer(b"\n", content)]
    near = [end + step for end in ends[:4] + ends[-1:] for step in (-1, 0, 1)]
    random = np.random.default_rng(8).integers(header, len(content), 4).tolist()
    return sorted({place for place in near + random if header <= place <= len(content)})


def test_responses_go_on_wherever_the_file_was_cut(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    wrong = []
    for place in places_to_cut(whole_file):
        path = tmp_path / f"{place}.jsonl"
        path.write_bytes(whole_file[:place])
        list(answer(path, pair, prompts))
        if path.read_bytes() != whole_file:
            wrong.append(place)
    assert not wrong, f"cut at {wrong} of {len(whole_file)} bytes"


def test_responses_begin_again_where_the_header_was_cut(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    """A kill in the first write leaves a part of the header, and no answer that could be lost."""
    header = whole_file.index(b"\n") + 1
    for place in (0, 1, header // 2, header - 1):
        path = tmp_path / f"{place}.jsonl"
        path.write_bytes(whole_file[:place])
        list(answer(path, pair, prompts))
        assert path.read_bytes() == whole_file, place


def test_more_prompts_continue_the_file(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    list(answer(path, pair, prompts[:3]))
    assert len(read_responses(path)) == 3
    list(answer(path, pair, prompts))
    assert path.read_bytes() == whole_file
    assert list(answer(path, pair, prompts[:3])) == []
    assert path.read_bytes() == whole_file


@pytest.mark.parametrize(
    ("known", "config"),
    [
        (KNOWN | {"tokenizer_hash": "2"}, ANSWERS),
        (KNOWN | {"hidden_size": 64}, ANSWERS),
        (KNOWN, ResponseConfig(max_tokens=6, temperatures=(0.0, 1.0), response_batch_size=2)),
        (KNOWN, ResponseConfig(max_tokens=5, temperatures=(0.0,), response_batch_size=2)),
    ],
)
def test_responses_of_another_target_are_refused(
    pair: tuple[Any, Any],
    prompts: list[list[int]],
    whole_file: bytes,
    tmp_path: Path,
    known: dict[str, Any],
    config: ResponseConfig,
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole_file)
    with pytest.raises(InputError, match="written by another target or with other settings"):
        list(write_responses(path, pair[0], {2}, prompts, config, known))
    assert path.read_bytes() == whole_file


def test_responses_to_other_prompts_are_not_used(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    """The file holds answers to these prompts afterwards, or the call says that it cannot."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole_file)
    others = prompts[::-1]
    try:
        list(answer(path, pair, others))
    except InputError:
        assert path.read_bytes() == whole_file
    else:
        assert [response.prompt for response in read_responses(path)] == others


def test_damaged_rows_are_named(whole_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = whole_file.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"prompt": [1], "resp\n', *lines[3:]]))
    with pytest.raises(InputError, match=r"answers.jsonl, line 3: not JSON"):
        read_responses(path)
    path.write_bytes(b"".join([*lines[:2], b'{"prompt": [1]}\n', *lines[3:]]))
    with pytest.raises(
        InputError, match=r"answers.jsonl, line 3: expected a prompt and a response"
    ):
        read_responses(path)
