"""The student writes, the teacher judges: distillation on the student's own text.

With a share of the steps (lambda of generalised knowledge distillation) the batch is not taken from
the data but from what the student wrote last, so it learns where its own mistakes lead. Which steps
those are, which prompts are continued and what is drawn follow from the seed and the step alone.
Every set of texts is kept as a file, so a run that was killed goes on with the very same.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlx import nn

from mlx_distill.data.responses import ResponseConfig, answer
from mlx_distill.data.texts import Text, TextBatch, text_batch
from mlx_distill.errors import InputError
from mlx_distill.files import read_jsonl, write_whole


@dataclass(frozen=True)
class OnPolicyConfig:
    """When the student writes its own texts, and how.

    Args:
        on_policy: Share of the batches that the student writes; 0 is none.
        rollout_every: Batches between two sets of texts.
        rollout_texts: Texts per set.
        rollout_prompt_tokens: Cut the prompts to so many tokens; answers' prompts stay whole.
        rollout_max_tokens: Longest text that is written to a prompt, in tokens.
        rollout_temperature: At which the student writes; 0 is greedy.
        replay: Sets that are kept and drawn from.
    """

    on_policy: float = 0.0
    rollout_every: int = 32
    rollout_texts: int = 64
    rollout_prompt_tokens: int = 16
    rollout_max_tokens: int = 96
    rollout_temperature: float = 1.0
    replay: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise InputError(f"on_policy must be between 0 and 1, got {self.on_policy}")
        names = ("every", "texts", "prompt_tokens", "max_tokens")
        for name in (*(f"rollout_{name}" for name in names), "replay"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rollout_temperature < 0:
            raise InputError(
                f"rollout_temperature must be at least 0, got {self.rollout_temperature}"
            )


class Rollouts:
    """Batches of the data, mixed with batches that the student has written.

    Args:
        student: Writes with the weights that it has at the time.
        texts: The data; their beginnings are the prompts.
        data_at: Returns the rows of the data's batch of a number.
        batch_size: Texts per batch.
        eos_token_ids: What ends a text.
        config: When and how.
        folder: Where the sets are kept.
        seed: Of everything that is drawn.
    """

    def __init__(
        self,
        student: nn.Module,
        texts: Sequence[Text],
        data_at: Callable[[int], list[int]],
        batch_size: int,
        eos_token_ids: set[int],
        config: OnPolicyConfig,
        folder: Path,
        seed: int,
    ):
        self.student = student
        self.texts = texts
        self.data_at = data_at
        self.batch_size = batch_size
        self.eos_token_ids = eos_token_ids
        self.config = config
        self.folder = folder
        self.seed = seed
        self._sets: dict[int, list[Text]] = {}

    def batch(self, number: int) -> TextBatch:
        """Return batch ``number`` of the training."""
        draws = np.random.default_rng([self.seed, 1, number])
        if draws.random() >= self.config.on_policy:
            return text_batch(self.texts, self.data_at(number))
        last = number // self.config.rollout_every
        first = max(0, last - self.config.replay + 1)
        # An earlier set may have been skipped: no batch asked for it while it was the last one.
        written = [text for place in range(first, last + 1) for text in self._set(place, last)]
        rows = draws.choice(len(written), min(self.batch_size, len(written)), replace=False)
        batch = text_batch(written, rows.tolist())
        return TextBatch(batch.tokens, batch.mask, [])

    def _set(self, place: int, last: int) -> list[Text]:
        if place in self._sets:
            return self._sets[place]
        path = self.folder / f"rollouts-{place * self.config.rollout_every:07d}.jsonl"
        if not path.exists():
            if place < last:
                return []
            rows = [{"tokens": tokens, "start": start} for tokens, start in self._write(place)]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        texts = [Text.behind(row["tokens"], row["start"]) for _, row in read_jsonl(path)]
        self._sets = {p: t for p, t in self._sets.items() if p > last - self.config.replay}
        self._sets[place] = texts
        return texts

    def _write(self, place: int) -> list[tuple[list[int], int]]:
        """Return what the student makes of some texts' beginnings, and their lengths."""
        draws = np.random.default_rng([self.seed, 2, place])
        count = min(self.config.rollout_texts, len(self.texts))
        prompts = []
        for row in draws.choice(len(self.texts), count, replace=False):
            prompts.append(self._prompt(self.texts[int(row)]))
        config = ResponseConfig(
            max_tokens=self.config.rollout_max_tokens,
            temperatures=(self.config.rollout_temperature,),
            response_batch_size=count,
            response_seed=self.seed % 2**16,
        )
        self.student.eval()
        answers = answer(self.student, self.eos_token_ids, prompts, place * count, config)
        self.student.train()
        pairs = zip(prompts, answers, strict=True)
        return [(ours + written, len(ours)) for ours, written in pairs if written]

    def _prompt(self, text: Text) -> list[int]:
        """Return what stands before a text's first answer; of a document, its first tokens."""
        length = text.learned.index(True)
        if length == 1:
            length = min(self.config.rollout_prompt_tokens, len(text.tokens) - 1)
        return text.tokens[:length]
