"""The middle of a drafter's training: a target, its answers, and the drafter that learns them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_distill.arrays import to_host
from mlx_distill.data.batches import batch_order
from mlx_distill.data.selection import held_out_rows
from mlx_distill.data.texts import Text, text_batch
from mlx_distill.distillation.drafter import (
    TargetView,
    acceptance_by_depth,
    answer_places,
    drafter_loss,
)
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.responses import Response
from mlx_distill.distillation.teachers import Answers
from mlx_distill.drafters.recurrent import RecurrentDrafter
from mlx_distill.files import read_jsonl, write_whole
from mlx_distill.target.target import Target
from mlx_distill.training.checkpoints import checkpoints, step_of
from mlx_distill.training.loop import train

Log = list[dict[str, Any]]


class DrafterTrainer:
    """A target, its answers and the drafter that learns from them.

    Args:
        target: Writes the goals; never changes.
        responses: The target's answers to all prompts, in order.
        config: How to train; the seed chooses the ``held_out`` answers.
        start: A drafter to start from, of the configuration's shape.
    """

    def __init__(
        self,
        target: Target,
        responses: Sequence[Response],
        config: DrafterTraining,
        start: RecurrentDrafter | None = None,
    ):
        assert target.embed is not None
        self.target = target
        self.embed = target.embed
        self.config = config
        kinds = [config.responses.temperature(row) for row in range(len(responses))]
        held = held_out_rows(kinds, config.held_out, config.seed)
        self.held_out = [_text(responses[row]) for row in held]
        self.training = [_text(one) for row, one in enumerate(responses) if row not in set(held)]
        self._answers = Answers(target.model, texts=True)
        self.network = self._network(start)

    def _network(self, start: RecurrentDrafter | None) -> RecurrentDrafter:
        """Return the drafter as it begins, in the target's type."""
        mx.random.seed(self.config.seed)
        shape = self.config.network(self.target)
        network = RecurrentDrafter(shape)
        if shape.draft_vocab_size:
            tokens = frequent_tokens(self.training, shape.draft_vocab_size, shape.vocab_size)
            network.token_ids = mx.array(tokens)
        if start is not None:
            network.update(start.parameters())
        network.set_dtype(self.embed(mx.array([0])).dtype)
        mx.eval(network.parameters())
        return network

    def view(self, texts: Sequence[Text], rows: Sequence[int]) -> TargetView:
        """Return the target's view of some of its answers."""
        # Nothing is padded beyond the longest: that could be beyond a model's last position.
        batch = text_batch(texts, rows, multiple=1)
        found, ahead = answer_places(np.array(batch.mask))
        places = mx.array(found)

        def taken(array: mx.array) -> mx.array:
            return array.reshape(-1, array.shape[-1])[places]

        if self._answers.body:
            states, _ = self._answers.read(batch.inputs)
            hidden = goals = taken(states)
        else:
            logits, states = self.target.read(batch.inputs)
            hidden, goals = taken(states), taken(logits)
        embeddings = self.embed(batch.inputs.reshape(-1)[places])
        mx.eval(hidden, goals, embeddings)  # what the target computed for them is let go
        token_ids = self.network.get("token_ids")
        return TargetView(
            hidden, embeddings, mx.array(ahead), goals, self._answers.logits, token_ids, batch.rows
        )

    def evaluate(self) -> dict[str, list[float]]:
        """Return the held-out acceptance of a drafted chain, by depth."""
        config = self.config
        total, count = mx.zeros((2, config.unroll)), mx.zeros((config.unroll,))
        order = sorted(range(len(self.held_out)), key=lambda row: len(self.held_out[row].tokens))
        for start in range(0, len(order), config.batch_size):
            view = self.view(self.held_out, order[start : start + config.batch_size])
            sums, counts = acceptance_by_depth(self.network, view, config.unroll)
            total, count = total + sums, count + counts
            mx.eval(total, count)
        greedy, sampled = to_host(total / mx.maximum(count, 1))
        return {"acceptance_greedy": greedy, "acceptance_sampled": sampled}

    def run(self, folder: Path, quiet: bool = False) -> Log:
        """Train, from the last checkpoint in ``folder`` if there is one; return the log."""
        config = self.config
        folder.mkdir(parents=True, exist_ok=True)
        log_path = folder / "log.jsonl"
        done = checkpoints(folder)
        step = step_of(done[-1]) if done else 0
        log = [row for row in _read_log(log_path) if row["step"] <= step]
        lengths = [len(text.tokens) for text in self.training]
        order = batch_order(lengths, config.batch_size, config.seed)
        steps = train(
            self.network,
            lambda view: drafter_loss(self.network, view, config.unroll, config.decay),
            lambda step: self.view(self.training, order(step)),
            self.evaluate,
            config.training,
            folder,
        )
        with tqdm(total=config.training.steps, initial=step, unit="step", disable=quiet) as bar:
            for progress in steps:
                bar.update()
                bar.set_description(f"loss {progress.loss:.3f}")
                if progress.evaluation:
                    log.append(
                        {"step": progress.step, "loss": progress.loss, **progress.evaluation}
                    )
                    write_whole(log_path, "".join(json.dumps(row) + "\n" for row in log))
                    by_depth = " ".join(f"{x:.2f}" for x in log[-1]["acceptance_greedy"])
                    bar.set_postfix_str(f"held-out acceptance {by_depth}")
        return log

    def counts(self) -> dict[str, int]:
        """Return how many answers, and tokens of them, are learned, and how many held out."""
        return {
            "answers": len(self.training),
            "tokens": sum(text.num_learned for text in self.training),
            "held_out": len(self.held_out),
        }


def frequent_tokens(texts: Sequence[Text], count: int, vocab_size: int) -> list[int]:
    """Return the ``count`` tokens that are learned most often, in ascending order.

    Tokens that are never learned fill up what is missing, smallest id first.
    """
    used = Counter(
        token
        for text in texts
        for token, learned in zip(text.tokens, text.learned, strict=True)
        if learned
    )
    ranked = sorted(range(vocab_size), key=lambda token: (-used[token], token))
    return sorted(ranked[:count])


def _text(response: Response) -> Text:
    return Text.behind([*response.prompt, *response.response], len(response.prompt))


def _read_log(path: Path) -> Log:
    return [row for _, row in read_jsonl(path)] if path.exists() else []
