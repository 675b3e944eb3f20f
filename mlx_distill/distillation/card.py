"""The model card of a student: what it is, how it was made, what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.data.corpus import Corpus
from mlx_distill.distillation.config import DistillConfig
from mlx_distill.names import for_markdown
from mlx_distill.training.best import kept_step

Figures = dict[str, dict[str, float]]


def model_card(
    name: str,
    config: DistillConfig,
    corpus: Corpus,
    log: Sequence[Mapping[str, Any]],
    figures: Figures,
    parameters: int,
    template_config: Any = None,
    notes: Sequence[str] = (),
) -> str:
    """Return a model card.

    Args:
        name: Of the student.
        config: What made it.
        corpus: What it was made of.
        log: Of the training, a row per step.
        figures: What was measured, by when: the last column is of the files themselves.
        parameters: How many it has.
        template_config: Further arguments of the chat template.
        notes: What the training found out, in sentences: which texts it could not use, for example.
    """
    teachers = ", ".join(map(for_markdown, config.teacher)) or "stored text only"
    adapted = [
        f"{who} with the adapters {for_markdown(path)}"
        for who, path in (
            ("teacher", config.teacher_adapter_path),
            ("student", config.adapter_path),
        )
        if path
    ]
    on_policy = config.rollouts.on_policy
    written = (
        f"; each batch was written by the student with a chance of {on_policy:g}"
        if on_policy
        else ""
    )
    noted = "".join(f"\n* Note: {note}" for note in notes)
    learned = sum(text.num_learned for text in corpus.texts)
    apart = (
        "\nIts adapters are in `adapters`; use them with `--adapter-path`."
        if config.export.keep_adapters
        else ""
    )
    template = f"\n* Chat template's arguments: `{template_config}`" if template_config else ""
    return f"""# {for_markdown(name)}
A language model of {parameters:,} parameters, distilled with \
`python -m mlx_distill.distill`.{apart}

* Teacher: {"; ".join([teachers, *adapted])}
* Loss: {", ".join(str(term) for term in config.terms)}
* Data: {", ".join(map(for_markdown, config.data))}: {corpus.report.sentence()}, \
{learned:,} learned tokens; {corpus.valid_report.sentence()}
* Training: {_steps(config, corpus, log)}{written}{_kept(config, log)}
* Trained: {config.trained}, learning rate {config.training.learning_rate:g}{template}{noted}

Held out, per token (`nats`: negative log-probability of the text; `perplexity`: its exponential; \
`kl`: KL(teacher || student); `agreement`: of the most probable tokens). "after" was measured on \
the files of this folder{", its adapters included" if apart else ""}:

{figures_table(figures)}

Settings: `config.yaml`, `training.json`; log: `log.jsonl`, `log.csv`, `curves.png`. The licence \
is that of the teacher and of the data.
"""


def _steps(config: DistillConfig, corpus: Corpus, log: Sequence[Mapping[str, Any]]) -> str:
    """Return how long it was trained; patience, or time, may have ended it early."""
    done, allowed = log[-1]["step"], config.training.steps
    learnable = sum(text.num_learned > 0 for text in corpus.texts)
    batch = min(config.batch_size, learnable or config.batch_size)  # there may be fewer than asked
    several = f" of {config.training.accumulate} batches" if config.training.accumulate > 1 else ""
    rows = "rows of packed texts" if config.pack else "texts"
    return f"{done:,} steps{several} of {batch} {rows}" + (
        f" (of {allowed:,})" if done < allowed else ""
    )


def _kept(config: DistillConfig, log: Sequence[Mapping[str, Any]]) -> str:
    """Return whose weights it has, where they are not the last step's."""
    step = kept_step(log, config.training)
    return "" if step == log[-1]["step"] else f"; the weights are those of step {step:,}, the best"


def figures_table(figures: Figures) -> str:
    """Return figures as a table in Markdown, a row for each and a column for each time."""
    rows = [
        f"| {key} | {' | '.join(f'{found[key]:.4f}' for found in figures.values())} |"
        for key in figures["after"]
    ]
    return "\n".join([f"| | {' | '.join(figures)} |", f"|---|{'---|' * len(figures)}", *rows])
