"""A whole evaluation: models, held-out texts, questions and speed to one result."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mlx import nn

from mlx_distill.data.corpus import Reading
from mlx_distill.data.report import Report
from mlx_distill.data.selection import fit, limited
from mlx_distill.data.texts import Text
from mlx_distill.distillation.memory import JUDGED, Batch, reading_estimate
from mlx_distill.errors import InputError
from mlx_distill.evaluation.metrics import report, resampled, with_interval
from mlx_distill.evaluation.models import Loaded
from mlx_distill.evaluation.questions import Question, QuestionConfig, answer_scores
from mlx_distill.evaluation.speed import decoding_speeds
from mlx_distill.evaluation.texts import CHUNK_BYTES, evaluate, vocabulary_widths
from mlx_distill.hashes import tokenizer_hash
from mlx_distill.limits import Between, Count, Seed, check_fields
from mlx_distill.target.context import text_limit

Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured.

    Args:
        max_texts: Use the first so many texts, and questions. Without it, all.
        max_length: The longest text, in tokens. Longer documents are cut, longer chats and answers
            are left out.
        batch_size: Texts read at once.
        bootstrap: How often the texts are drawn anew for the intervals; 0 leaves them out.
        seed: Of those draws.
        speed_tokens: Tokens decoded to measure speed; 0 leaves it out.
    """

    max_texts: Annotated[int | None, Between(1, 10**9)] = None
    max_length: Annotated[int, Between(2, 10**9)] = 512
    batch_size: Count = 8
    bootstrap: Annotated[int, Between(0, 10**6)] = 1000
    seed: Seed = 0
    speed_tokens: Annotated[int, Between(2, 10**9, also=0)] = 128

    def __post_init__(self) -> None:
        check_fields(self)


def measure(
    loaded: Mapping[str, Loaded],
    data: str | Path,
    config: EvaluationConfig,
    teacher: str | None = None,
    questions: Sequence[Question] = (),
    asking: QuestionConfig | None = None,
    reading: Reading | None = None,
) -> Figures:
    """Return every model's figures.

    With a teacher all models read the same tokens; without one each reads the texts with its own
    tokenizer and template.

    Args:
        loaded: The models by name.
        data: Held-out texts.
        config: How much is measured.
        teacher: The name of the model that the others are compared with.
        questions: What the models are asked beside.
        asking: How.
        reading: How rows become texts, and further arguments of the chat templates.

    Raises:
        InputError: If the tokenizers differ and there is a teacher, or a text or a model cannot be
            used.
    """
    reading = reading or Reading()
    groups = [dict(loaded)] if teacher else [{name: one} for name, one in loaded.items()]
    every = {name: one.model for name, one in loaded.items()}
    figures: Figures = {}
    prompts: dict[str, list[int]] = {}
    for group in groups:
        texts, rows = _read(data, group, config, reading)
        models = {name: one.model for name, one in group.items()}
        print(_memory(every, texts, config.batch_size), file=sys.stderr)
        sums = evaluate(models, texts, teacher, config.batch_size)
        figures |= report(sums, teacher, config.bootstrap, config.seed)
        prompts |= dict.fromkeys(group, texts[0].tokens)
        for name in group:
            figures[name]["rows"] = rows.to_dict()
    if config.speed_tokens:
        for name, speed in decoding_speeds(loaded, prompts, config.speed_tokens).items():
            figures[name]["tokens_per_s"] = speed
    for name, one in loaded.items():
        figures[name] |= one.sizes()
        if questions:
            scores = answer_scores(
                one.model, one.tokenizer, questions, asking, reading.template_config, name
            )
            figures[name] |= _answer_figures(*scores, config)
    return figures


def _memory(models: Mapping[str, nn.Module], texts: Sequence[Text], batch_size: int) -> str:
    """Return the memory that reading texts takes, in words."""
    batch = Batch(min(batch_size, len(texts)), max(len(text.tokens) for text in texts))
    width = max(vocabulary_widths(models).values())
    logits = min(CHUNK_BYTES, 4 * batch.size * batch.width * width)
    return reading_estimate(models, batch, int(JUDGED * logits))


def _answer_figures(
    scores: dict[str, Any], too_long: int, config: EvaluationConfig
) -> dict[str, Any]:
    """Return a model's figures on questions, with intervals over questions."""
    asked = len(scores["f1"])
    found: dict[str, Any] = {"questions": asked, "questions_too_long": too_long}
    if not asked:
        raise InputError("no question leaves room for an answer within the model's context")
    for key, values in scores.items():
        samples = resampled(values, config.bootstrap, config.seed) / asked
        found[key] = with_interval(values.mean(), samples)
    return found


def _read(
    data: str | Path,
    loaded: dict[str, Loaded],
    config: EvaluationConfig,
    reading: Reading,
) -> tuple[list[Text], Report]:
    """Return the texts for models that share a tokenizer; what the models cut is said on stderr."""
    (first, one), *others = loaded.items()
    for name, other in others:
        if tokenizer_hash(other.tokenizer) != tokenizer_hash(one.tokenizer):
            raise InputError(
                f"the tokenizers of {first} and {name} differ, so perplexity per token is not "
                "comparable; evaluate each by itself, with no --teacher"
            )
    models = {name: one.model for name, one in loaded.items()}
    widths = vocabulary_widths(models)
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        print(
            f"the vocabularies differ in width ({found}); all are cut to {min(widths.values())}",
            file=sys.stderr,
        )
    contexts = [text_limit(model) or config.max_length for model in models.values()]
    length = min(config.max_length, *contexts)
    if length < config.max_length:
        print(f"texts are cut to {length} tokens, the models' context", file=sys.stderr)
    rows = Report()
    texts = reading.texts(data, one.tokenizer, rows, "valid")
    texts, rows = fit(limited(texts, config.max_texts, rows), length, report=rows)
    print("\n".join(rows.lines()), file=sys.stderr)
    return texts, rows
