"""The student writes, the teacher judges: distillation on the student's own text.

With a share of the steps (lambda of generalised knowledge distillation) the batch is not taken from
the data but from what the student wrote last, so it learns where its own mistakes lead. Which steps
those are, which prompts are continued and what is drawn follow from the seed and the step alone.
Every set of texts is kept as a file, so a run that was killed goes on with the very same.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from mlx import nn

from mlx_distill.core.sampling import Temperature
from mlx_distill.data.report import Report
from mlx_distill.data.texts import Text, TextBatch, text_batch
from mlx_distill.distillation.responses import ResponseConfig, answer
from mlx_distill.errors import InputError
from mlx_distill.files import read_jsonl, write_whole
from mlx_distill.limits import Between, Count, check_fields
from mlx_distill.target.reading import vocab_width


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

    on_policy: Annotated[float, Between(0, 1)] = 0.0
    rollout_every: Count = 32
    rollout_texts: Count = 64
    rollout_prompt_tokens: Count = 16
    rollout_max_tokens: Count = 96
    rollout_temperature: Temperature = 1.0
    replay: Count = 2

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Prompt:
    """Where a text is continued.

    Args:
        row: Which text.
        tokens: What is continued.
        message: Which message of its chat is written; None of a document.
    """

    row: int
    tokens: list[int]
    message: int | None


class Rollouts:
    """Batches of the data, mixed with batches that the student has written.

    Args:
        student: Writes with the weights that it has at the time.
        texts: The data; their questions, or their beginnings, are the prompts.
        data_at: Returns the rows of the data's batch of a number.
        batch_size: Texts per batch.
        eos_token_ids: What ends a text.
        config: When and how.
        folder: Where the sets are kept.
        seed: Of everything that is drawn.
        limit: The longest text that all networks can read, in tokens; None if nothing says.
        learned: Batches before this one are learned; what later ones draw from has to be there.

    Raises:
        InputError: If it is not, or is damaged: the training would go on to other weights.
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
        limit: int | None = None,
        learned: int = 0,
    ):
        self.student = student
        self.texts = texts
        self.data_at = data_at
        self.batch_size = batch_size
        self.eos_token_ids = eos_token_ids
        self.config = config
        self.folder = folder
        self.seed = seed
        self.limit = limit
        self._sets: dict[int, list[Text]] = {}
        self._vocab = vocab_width(student)
        self._check(learned)

    def batch(self, number: int) -> TextBatch:
        """Return batch ``number`` of the training."""
        draws = self._draws(number)
        if draws is None:
            return text_batch(self.texts, self.data_at(number), limit=self.limit)
        last = number // self.config.rollout_every
        first = max(0, last - self.config.replay + 1)
        # An earlier set may have been skipped: no batch asked for it while it was the last one.
        written = [text for place in range(first, last + 1) for text in self._set(place, last)]
        if not written:
            raise InputError(
                "the student wrote nothing: no prompt leaves room for an answer within "
                f"{self.limit} tokens"
            )
        rows = draws.choice(len(written), min(self.batch_size, len(written)), replace=False)
        return replace(text_batch(written, rows.tolist(), limit=self.limit), rows=[])

    def _draws(self, number: int) -> np.random.Generator | None:
        """Return what a batch of the student's texts is drawn with; None for one of the data."""
        draws = np.random.default_rng([self.seed, 1, number])
        return draws if draws.random() < self.config.on_policy else None

    def _check(self, learned: int) -> None:
        """Raise InputError if a set that was written, and may be drawn from, is not as it was."""
        every = self.config.rollout_every
        first = max(0, learned // every - self.config.replay + 1)
        for place in range(first, -(-learned // every)):
            asked = range(place * every, min(learned, (place + 1) * every))
            if all(self._draws(number) is None for number in asked):
                continue  # nobody asked for it while it was the last one
            if not self._path(place).exists():
                raise self._lost(place, "is missing, of which texts are still to be learned")
            self._read(place)

    def _path(self, place: int) -> Path:
        return self.folder / f"rollouts-{place * self.config.rollout_every:07d}.jsonl"

    def _lost(self, place: int, why: str) -> InputError:
        return InputError(f"{self._path(place)} {why}; remove {self.folder} to begin anew")

    def _set(self, place: int, last: int) -> list[Text]:
        if place in self._sets:
            return self._sets[place]
        path = self._path(place)
        if not path.exists():
            if place < last:
                return []
            rows = [_stored(prompt, text) for prompt, text in self._write(place)]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        texts = self._read(place)
        self._sets = {p: t for p, t in self._sets.items() if p > last - self.config.replay}
        self._sets[place] = texts
        return texts

    def _prompts(self, place: int) -> list[Prompt]:
        """Return the beginnings of some texts, those that leave room for more."""
        draws = np.random.default_rng([self.seed, 2, place])
        count = min(self.config.rollout_texts, len(self.texts))
        rows = draws.choice(len(self.texts), count, replace=False).tolist()
        prompts = [
            prompt_of(self.texts[row], row, self.config.rollout_prompt_tokens, draws)
            for row in rows
        ]
        return [one for one in prompts if self.limit is None or len(one.tokens) < self.limit]

    def _write(self, place: int) -> list[tuple[Prompt, list[int]]]:
        """Return what the student makes of some texts' beginnings."""
        prompts = self._prompts(place)
        self.student.eval()
        texts = continued(
            self.student, prompts, self.eos_token_ids, self.config, self.limit, self.seed, place
        )
        self.student.train()
        return texts

    def _read(self, place: int) -> list[Text]:
        """Return the texts of a set, each with the chat that it goes on with.

        Raises:
            InputError: If they are not what the student made of the set's prompts.
        """
        rows = [row for _, row in read_jsonl(self._path(place))]
        prompts = self._prompts(place)
        if len(rows) != len(prompts):
            raise self._lost(place, f"is damaged: it has {len(rows)} texts, not {len(prompts)}")
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), start=1):
            if not self._goes_on(row, prompt):
                raise self._lost(place, f"is damaged: line {number} goes on with no prompt of it")
        return [
            written_text(self.texts[prompt.row], prompt, row["tokens"], self.eos_token_ids)
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def _goes_on(self, row: dict[str, Any], prompt: Prompt) -> bool:
        """Return whether a row of a file holds more than its prompt, in tokens that there are."""
        tokens = row.get("tokens")
        if not isinstance(tokens, list) or row != _stored(prompt, tokens):
            return False
        start = len(prompt.tokens)
        known = all(type(token) is int and 0 <= token < self._vocab for token in tokens)
        return known and len(tokens) > start and tokens[:start] == prompt.tokens


def _stored(prompt: Prompt, tokens: list[int]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "start": len(prompt.tokens),
        "row": prompt.row,
        "message": prompt.message,
    }


def with_room(texts: Sequence[Text], limit: int | None, report: Report) -> list[Text]:
    """Return the texts less the questions alone that leave no room for an answer.

    Args:
        texts: Those that have something to learn stay; what neither has nor asks anything does not.
        limit: The longest text in tokens, of all networks that read it; None for any.
        report: Counts what is left out.
    """
    kept = []
    for text in texts:
        if text.num_learned or (text.asks and (limit is None or len(text.tokens) < limit)):
            kept.append(text)
            continue
        reason = f"no room for an answer within {limit} tokens" if text.asks else "nothing to learn"
        report.drop(reason, text.place)
        report.kept -= 1
    return kept


def prompt_of(
    text: Text, row: int, prompt_tokens: int, draws: np.random.Generator | None = None
) -> Prompt:
    """Return where a text is continued: behind a question, or behind its first tokens.

    Args:
        text: A chat is continued where one of its answers begins.
        row: Which text it is.
        prompt_tokens: Of a document.
        draws: Chooses among the answers; None takes the last.
    """
    chat = text.source.chat if text.source else None
    if not text.num_learned:  # a question alone
        return Prompt(row, text.tokens, None if chat is None else len(chat.messages))
    places = _beginnings(text)
    number = len(places) - 1 if draws is None else int(draws.integers(len(places)))
    start, message = places[number]
    if start > 1 or message is not None:
        return Prompt(row, text.tokens[:start], message)
    return Prompt(row, text.tokens[: min(prompt_tokens, len(text.tokens) - 1)], None)


def _beginnings(text: Text) -> list[tuple[int, int | None]]:
    """Return where what is learned of a text begins, and in which message of its chat."""
    known = text.source.answers if text.source else ()
    spans = text.answers()
    if known and spans[0][0] <= 1:  # the question is one token, or it is learned as well
        return [(max(1, start), message) for message, start, _ in known]
    same = len(known) == len(spans)
    return [(start, known[n][0] if same else None) for n, (start, _) in enumerate(spans)]


def continued(
    writer: nn.Module,
    prompts: Sequence[Prompt],
    eos_token_ids: set[int],
    config: OnPolicyConfig,
    limit: int | None,
    seed: int,
    place: int,
) -> list[tuple[Prompt, list[int]]]:
    """Return what a model makes of prompts, those that it has no room for left out.

    An answer ends at the longest allowed length, or with the room that all networks have.

    Args:
        writer: A language model.
        prompts: What it goes on with.
        eos_token_ids: What ends an answer.
        config: How it writes.
        limit: The longest text in tokens; None for any.
        seed: Of what is drawn.
        place: Which set this is; every set draws otherwise.
    """
    some = [one for one in prompts if limit is None or len(one.tokens) < limit]
    if not some:
        return []
    answers = answer(
        writer,
        eos_token_ids,
        [one.tokens for one in some],
        place * len(some),
        ResponseConfig(
            max_tokens=config.rollout_max_tokens,
            temperatures=(config.rollout_temperature,),
            response_batch_size=len(some),
            response_seed=seed % 2**16,
        ),
    )
    texts = [(one, [*one.tokens, *ids][:limit]) for one, ids in zip(some, answers, strict=True)]
    return [(one, tokens) for one, tokens in texts if len(tokens) > len(one.tokens)]


def written_text(text: Text, prompt: Prompt, tokens: list[int], eos_token_ids: set[int]) -> Text:
    """Return what was written as a text, of which the answer is learned.

    An answer that was cut off has no end among its tokens, so none is learned.

    Args:
        text: The one that was continued.
        prompt: Where.
        tokens: The whole.
        eos_token_ids: What ends an answer.
    """
    start, source = len(prompt.tokens), text.source
    if source is not None:
        ended = tokens[-1] in eos_token_ids
        answers: tuple[tuple[int, int, int], ...] = ()
        chat = source.chat
        if chat is not None and prompt.message is not None:
            chat = chat.upto(prompt.message)
            answers = ((prompt.message, start, len(tokens)),)
        source = replace(source, chat=chat, ended=ended, answers=answers)
    return Text.behind(tokens, start, source)


def answered(
    texts: Sequence[Text],
    writer: nn.Module,
    eos_token_ids: set[int],
    config: OnPolicyConfig,
    limit: int | None = None,
    report: Report | None = None,
) -> list[Text]:
    """Return the texts with answers to questions alone, so that there is something to judge by.

    Args:
        texts: Those that have something to learn stay as they are.
        writer: Writes the answers: the teacher, where it reads the same tokens.
        eos_token_ids: What ends an answer.
        config: How it writes.
        limit: The longest text in tokens; None for any.
        report: Counts questions that leave no room for an answer.

    Raises:
        InputError: If no text is left.
    """
    texts = with_room(texts, limit, Report() if report is None else report)
    prompts = [
        prompt_of(text, row, config.rollout_prompt_tokens)
        for row, text in enumerate(texts)
        if not text.num_learned
    ]
    if not prompts and texts:
        return texts
    training = writer.training
    writer.eval()
    found = {
        prompt.row: written_text(texts[prompt.row], prompt, tokens, eos_token_ids)
        for prompt, tokens in continued(writer, prompts, eos_token_ids, config, limit, 0, 0)
    }
    writer.train(training)
    kept = [found.get(row, text) for row, text in enumerate(texts)]
    kept = [text for text in kept if text.num_learned]
    if not kept:
        raise InputError(f"no held-out question leaves room for an answer within {limit} tokens")
    return kept
