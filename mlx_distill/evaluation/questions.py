"""Questions with known answers: their file, and how well models answer them."""

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from mlx import nn
from tqdm import tqdm

from mlx_distill.data.prompts import encode_prompt
from mlx_distill.errors import InputError
from mlx_distill.evaluation.answers import THOUGHT, exact_match, f1, spoken
from mlx_distill.evaluation.metrics import Sums
from mlx_distill.files import read_jsonl
from mlx_distill.limits import Between, Count, check_fields
from mlx_distill.speculation.generation import stream_generate
from mlx_distill.target.context import text_limit


@dataclass(frozen=True)
class QuestionConfig:
    """How questions are asked.

    Args:
        qa_instruction: Follows every question to a chat model, on a line of its own; "" for none.
            Models without a chat template get the question and a line's end.
        qa_tokens: The longest answer, in tokens. It ends with its line.
        qa_thought_tokens: The longest thought before an answer, in tokens.
    """

    qa_instruction: str = "Answer with as few words as possible, on one line."
    qa_tokens: Count = 32
    qa_thought_tokens: Annotated[int, Between(0, 10**9)] = 1024

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Question:
    """What is asked, behind its context if there is one, and the answers that count as right."""

    text: str
    references: list[str]


def read_questions(path: str | Path) -> list[Question]:
    """Return the questions of a JSONL file.

    A row holds ``question``, maybe ``context``, and references: a list ``answers``, or texts
    ``answer``, ``answer1``, ``answer2`` and so on. All of them count.

    Raises:
        InputError: If the file cannot be read, a row cannot be used, or there are no rows.
    """
    questions = [_question(row, place) for place, row in read_jsonl(path)]
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


def _question(row: dict[str, Any], place: str) -> Question:
    answers = row.get("answers", [])
    references = [*answers] if isinstance(answers, list) else [answers]
    references += [row[key] for key in row if re.fullmatch(r"answer\d*", key)]
    for text in (row.get("question"), row.get("context") or "none", *references):
        if not isinstance(text, str) or not text:
            raise InputError(
                f"{place}: question, context and answers must be texts, got {text!r:.40}"
            )
    if not references:
        raise InputError(f"{place}: expected answers or answer, got {sorted(row)}")
    context = [row["context"]] if row.get("context") else []
    return Question("\n".join([*context, row["question"]]), references)


def answer_scores(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    config: QuestionConfig | None = None,
    template_config: Mapping[str, Any] | None = None,
    title: str = "questions",
) -> tuple[Sums, int]:
    """Return exact match and F1 of a model's greedy answers, one value per question.

    Args:
        model: Answers.
        tokenizer: Its tokenizer.
        questions: What it is asked.
        config: How.
        template_config: Further arguments of the chat template.
        title: Of the progress bar.

    Returns:
        The scores, and how many questions left no room for an answer and were not asked.
    """
    config = config or QuestionConfig()
    scores: dict[str, list[float]] = {"exact_match": [], "f1": []}
    too_long = 0
    for question in tqdm(questions, desc=title, unit="question", leave=False):
        prompt = question_prompt(tokenizer, question, config, template_config)
        answer = _answer(model, tokenizer, prompt, config)
        if answer is None:
            too_long += 1
            continue
        scores["exact_match"].append(exact_match(answer, question.references))
        scores["f1"].append(f1(answer, question.references))
    return {name: np.array(values) for name, values in scores.items()}, too_long


def question_prompt(
    tokenizer: Any,
    question: Question,
    config: QuestionConfig,
    template_config: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return a question's token ids, as a chat with the instruction where there is a template."""
    if not getattr(tokenizer, "has_chat_template", False):
        return encode_prompt(tokenizer, question.text + "\n", template_config=template_config)
    lines = [question.text, *([config.qa_instruction] if config.qa_instruction else [])]
    return encode_prompt(tokenizer, "\n".join(lines), template_config=template_config)


def _answer(
    model: nn.Module, tokenizer: Any, prompt: list[int], config: QuestionConfig
) -> str | None:
    """Return the first line that a model writes behind blanks and thoughts; None without room."""
    limit = config.qa_tokens + config.qa_thought_tokens
    context = text_limit(model)
    if context is not None:
        limit = min(limit, context - len(prompt))
    if limit < 1:
        return None
    marks = (getattr(tokenizer, "think_start", None), getattr(tokenizer, "think_end", None))
    thought = (marks[0] or THOUGHT[0], marks[1] or THOUGHT[1])
    # Some templates open the thought themselves.
    opened = tokenizer.decode(prompt).rstrip().endswith(thought[0])
    text, answer, spent = thought[0] if opened else "", None, 0
    with closing(stream_generate(model, tokenizer, prompt, max_tokens=limit)) as responses:  # pyright: ignore
        for response in responses:
            text += response.text
            answer = spoken(text, thought)
            spent += answer is not None
            if spent >= config.qa_tokens or "\n" in (answer or ""):
                break
    return (answer or "").partition("\n")[0]
