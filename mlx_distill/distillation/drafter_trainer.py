"""The middle of a drafter's training: a target, its answers, and the drafter that learns them."""

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from mlx_distill.arrays import to_host, to_number
from mlx_distill.data.selection import held_out_rows
from mlx_distill.data.texts import Text
from mlx_distill.distillation.choice_rates import choice_rates
from mlx_distill.distillation.confidence import Confidence, fitted_confidence
from mlx_distill.distillation.drafted_head import drafted_logits, head_rows, start_head
from mlx_distill.distillation.drafter import (
    Logits,
    Starts,
    TargetView,
    acceptance_by_depth,
    drafter_loss,
    unroll,
)
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.feature_store import FeatureStore
from mlx_distill.distillation.first_weights import begin_near
from mlx_distill.distillation.own_samples import Own, columns_of
from mlx_distill.distillation.responses import Response
from mlx_distill.distillation.start_order import StartOrder, spread_of
from mlx_distill.distillation.target_reader import TargetReader, text_of
from mlx_distill.drafters.fingerprint import Fingerprint
from mlx_distill.drafters.medusa import MedusaHeads
from mlx_distill.drafters.networks import Network, network_of
from mlx_distill.drafters.recurrent import Past, RecurrentDrafter
from mlx_distill.drafters.shortlist import Directions, directions_of, is_wide
from mlx_distill.errors import InputError
from mlx_distill.files import write_whole
from mlx_distill.target.target import Target
from mlx_distill.training.checkpoints import checkpoints, step_of
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.journal import LOG, read_log
from mlx_distill.training.loop import train

Log = list[dict[str, Any]]

NUMBERS = ("loss", "acceptance_greedy", "acceptance_sampled")  # of a row of the log
MOST_FITTED = 1024  # drafts that the drafter's confidence is fitted on


class DrafterTrainer:
    """A target, its answers and the drafter that learns from them.

    Args:
        target: Writes the goals; never changes.
        responses: The target's answers to all prompts, in order.
        config: How to train; the seed chooses the ``held_out`` answers.
        start: A drafter to start from, of the configuration's shape.
        kinds: Of each answer, what it is like; as many of every kind are held out. Without it, the
            temperature that it was written at.
        features: Where what the target computes of the answers is kept; None keeps it in memory,
            as much as there is room for.
        writer: What the target is known by, for the features.
    """

    def __init__(
        self,
        target: Target,
        responses: Sequence[Response],
        config: DrafterTraining,
        start: Network | None = None,
        kinds: Sequence[Hashable] | None = None,
        features: Path | None = None,
        writer: Fingerprint | None = None,
    ):
        self.target = target
        self.config = config
        if kinds is None:
            kinds = [config.responses.temperature(row) for row in range(len(responses))]
        held = set(held_out_rows(kinds, config.held_out, config.seed))
        self.held_out = [text_of(responses[row]) for row in sorted(held)]
        self._check_judged()
        learned = [text_of(one) for row, one in enumerate(responses) if row not in held]
        self.training = sorted(learned, key=lambda text: len(text.tokens))  # as a view has them
        self.reader = TargetReader(target, config.taps(target), config.batch_size, config.look_back)
        self.spread = spread_of(config.starts) if config.context_blocks else 0
        self.network, self.coverage = self._network(start)
        rows, row_bytes = (
            [self.reader.num_rows(text) for text in self.training],
            self.reader.row_bytes,
        )
        self.order = StartOrder(
            [max(0, text.num_learned - 1) for text in self.training],
            rows,
            max(1, config.feature_bytes(sum(rows) * row_bytes) // row_bytes),
            config.starts,
            config.seed,
            self.spread,
            config.start_share,
        )
        if not self.order.groups:
            raise InputError("no answer has two tokens; there is nothing to learn")
        self.groups = [[self.training[row] for row in group] for group in self.order.groups]
        self.store = (
            FeatureStore(features, self.reader, self.groups, writer or {}) if features else None
        )
        self._group: tuple[int, TargetView] | None = None
        self._judged: TargetView | None = None
        self._share = 0.0  # of the training that is over, where time decides
        token_ids = self.network.get("token_ids")
        self._columns = columns_of(token_ids, target.vocab_size)
        some = self.reader.view([self.held_out[0]]).goals[:4]
        self.target_logits = drafted_logits(self.reader.answers, some, token_ids)

    @property
    def judged_depth(self) -> int:
        """How many drafted tokens the longest held-out answer can judge, at most those of a draft.

        Its first token is where the first draft starts: of an answer of one token, none.
        """
        longest = max(text.num_learned for text in self.held_out)
        return min(self.config.unroll, max(0, longest - 1))

    def _check_judged(self) -> None:
        """Raise InputError if the best evaluation is asked for, and none says anything."""
        settings = self.config.training
        if (settings.patience or settings.keep_best) and not self.judged_depth:
            raise InputError(
                "patience and keep_best need held-out answers of two tokens or more, by which to "
                "judge; hold out others, with a larger held_out or another seed"
            )

    def _network(self, start: Network | None) -> tuple[Network, float]:
        """Return the drafter as it begins, in the target's type, and its vocabulary's coverage."""
        mx.random.seed(self.config.seed)
        shape = self.config.network(self.target)
        network = network_of(shape)
        size = shape.draft_vocab_size or shape.vocab_size
        tokens, coverage = frequent_tokens(self.training, size, shape.vocab_size)
        if shape.draft_vocab_size:
            network.token_ids = mx.array(tokens)
        if start is not None:
            network.update(start.parameters())
        elif self.config.head_from_target:
            rows = head_rows(self.reader.answers, mx.array(tokens))
            if rows is not None:
                self._begin_near(network, rows)
        network.set_dtype(self.reader.embed(mx.array([0])).dtype)
        mx.eval(network.parameters())
        return network, coverage

    def _begin_near(self, network: Network, rows: mx.array) -> None:
        """Let a drafter begin near its target, by an answer of middle length."""
        if not isinstance(network, RecurrentDrafter):
            start_head(network, rows)
            return
        view = self.reader.view([self.training[len(self.training) // 2]])
        begin_near(network, rows, view.hidden[:-1], view.embed(view.tokens[1:]))

    def batch(self, step: int) -> Starts:
        """Return what a step learns."""
        asked = self.order.at(step)
        if self._group is None or self._group[0] != asked.group:
            self._group = None  # two at a time are more than was asked for
            number = asked.group
            read = self.reader.view
            view = self.store.view(number) if self.store else read(self.groups[number])
            self._group = asked.group, view
        _, view = self._group
        places = view.starting[mx.array(asked.numbers.astype(np.int32))]
        starts = view.starts(places, self.config.unroll, self.config.look_back)
        return (
            starts._replace(own=self._own(view, places, step))
            if self.config.self_unroll
            else starts
        )

    def _own(self, view: TargetView, places: mx.array, step: int) -> Own:
        """Return the drafter's own samples of a step; before the last part, none."""
        length, share = self.config.unroll, max(step / self.settings.steps, self._share)
        draws = np.random.default_rng([self.config.seed, step, 17]).random((places.size, length))
        draws *= share >= 1 - self.config.self_unroll
        columns = self._columns[view.chosen(places, length)]
        return Own(columns, mx.array(draws.astype(np.float32)))

    def loss(self, starts: Starts) -> tuple[mx.array, mx.array]:
        """Return the summed loss of a step, and what it is divided by."""
        decay, kind = self.config.decay, self.config.loss
        starts = Starts(*starts)  # compiled steps are given bare tuples
        if starts.past is not None:
            starts = starts._replace(past=Past(*starts.past))
        if starts.own is not None:
            starts = starts._replace(own=Own(*starts.own))
        return drafter_loss(self.network, starts, self.target_logits, decay, kind)

    def evaluate(self) -> dict[str, list[float]]:
        """Return the held-out acceptance of a drafted chain by depth, as far as it is known."""
        if self._judged is None:
            self._judged = self.reader.view(self.held_out)
        found = acceptance(self.network, self._judged, self.target_logits, self.config)
        greedy, sampled = to_host(found)
        return {"acceptance_greedy": greedy, "acceptance_sampled": sampled}

    def confidence(self) -> Confidence | None:
        """Return how sure the drafter may be, by held-out drafts; None if there are none."""
        starts = self._fitted_on()
        return starts and fitted_confidence(self.network, starts, self.target_logits)

    def directions(self) -> Directions | None:
        """Return those that the head's inputs lie in; None where no shortlist asks for them."""
        if isinstance(self.network, MedusaHeads) or not is_wide(self.network.head.weight):
            return None
        inputs = self.head_inputs()
        return None if inputs is None else directions_of(self.network.head.weight, inputs)

    def head_inputs(self) -> Float[mx.array, "N E"] | None:
        """Return what the head is given in held-out drafts; None if there are none."""
        starts = self._fitted_on()
        if starts is None:
            return None
        inputs, kept = unroll(self.network, starts), np.flatnonzero(np.array(starts.mask))
        return inputs.reshape(-1, inputs.shape[-1])[mx.array(kept)]

    def choice_rates(self) -> tuple[tuple[float, ...], ...]:
        """Return how often Medusa heads' choices are right; nothing of other drafters."""
        starts = self._fitted_on()
        if starts is None or not isinstance(self.network, MedusaHeads):
            return ()
        return choice_rates(self.network, starts, self.target_logits)

    def _fitted_on(self) -> Starts | None:
        """Return held-out drafts; None if there are none."""
        if self._judged is None:
            self._judged = self.reader.view(self.held_out)
        view, length = self._judged, self.config.unroll
        if not view.starting.size:
            return None
        places = view.starting[:: -(-view.starting.size // MOST_FITTED)]
        return view.starts(places, length, self.config.look_back)

    @property
    def settings(self) -> TrainingConfig:
        """How the network is trained; epochs as steps."""
        settings, epochs = self.config.training, self.config.epochs
        if epochs is None:
            return settings
        return replace(settings, steps=max(1, round(epochs * self.order.steps_per_epoch)))

    def _judged_steps(self, step: int) -> list[int]:
        """Return the steps up to one that end with an evaluation; time may end with others."""
        every, last = self.settings.evaluate_every, self.settings.steps
        return [*range(every, step + 1, every), *([last] if step == last and last % every else [])]

    def run(self, folder: Path, quiet: bool = False) -> Log:
        """Train, from the last checkpoint in ``folder`` if there is one; return the log."""
        folder.mkdir(parents=True, exist_ok=True)
        log_path = folder / LOG
        done = checkpoints(folder)
        step = step_of(done[-1]) if done else 0
        settings = self.settings
        log = read_log(log_path, step, self._judged_steps(step), NUMBERS)
        steps = train(
            self.network,
            self.loss,
            self.batch,
            self.evaluate,
            settings,
            folder,
            score=chain_score,
            quick=True,
        )
        with tqdm(total=settings.steps, initial=step, unit="step", disable=quiet) as bar:
            for progress in steps:
                bar.update()
                bar.set_description(f"loss {progress.loss:.3f}")
                if settings.max_minutes is not None:
                    self._share = progress.share
                if progress.evaluation:
                    log.append(
                        {"step": progress.step, "loss": progress.loss, **progress.evaluation}
                    )
                    write_whole(log_path, "".join(json.dumps(row) + "\n" for row in log))
                    by_depth = " ".join(f"{x:.2f}" for x in log[-1]["acceptance_greedy"])
                    bar.set_postfix_str(f"held-out acceptance {by_depth or 'not known'}")
        return log

    def kept(self, log: Log) -> dict[str, Any]:
        """Return the row of a log whose weights the drafter has, now that the training is over."""
        if not self.config.training.keep_best:
            return log[-1]
        return min(log, key=lambda row: chain_score(row) or 0.0)  # of equal ones the first

    @property
    def num_rows(self) -> int:
        """Of how many tokens it is kept what the target computes: an end of prompts is, too."""
        return sum(self.reader.num_rows(text) for text in self.training)

    def counts(self) -> dict[str, int]:
        """Return how many answers, and tokens of them, are learned, and how many held out.

        Beside them stands how many drafts a step has at most.
        """
        return {
            "answers": len(self.training),
            "tokens": sum(text.num_learned for text in self.training),
            "held_out": len(self.held_out),
            "drafts": self.order.most_starts,
        }


def chain_score(evaluation: dict[str, Any]) -> float | None:
    """Return minus the expected number of accepted tokens of a greedy chain; lower is better.

    Acceptance at a depth is of drafts that have read the text up to there: a token of a chain
    counts if those before it were right, too, for which the product of their shares is taken.
    None where no held-out answer reaches a drafted token.
    """
    shares = np.array(evaluation["acceptance_greedy"], np.float32)
    return -float(np.cumprod(shares).sum()) if shares.size else None


def acceptance(
    network: Network, view: TargetView, target_logits: Logits, config: DrafterTraining
) -> Float[mx.array, "2 L"]:
    """Return ``acceptance_by_depth`` as shares, of the drafts from everywhere in some answers.

    Depths that no answer reaches are left out; there may be none at all.
    """
    length, size = config.unroll, config.starts
    total, count = mx.zeros((2, length)), mx.zeros((length,))
    for first in range(0, view.starting.size, size):
        starts = view.starts(view.starting[first : first + size], length, config.look_back)
        sums, counts = acceptance_by_depth(network, starts, target_logits)
        total, count = total + sums, count + counts
        mx.eval(total, count)  # one chunk at a time is in memory
    reached = int(to_number((count > 0).sum()))  # what reaches a depth reaches those before it
    return total[:, :reached] / count[:reached]


def frequent_tokens(texts: Sequence[Text], count: int, vocab_size: int) -> tuple[list[int], float]:
    """Return the ``count`` tokens that are learned most often, in ascending order.

    Beside them stands which share of all that is learned they are.

    Tokens that are never learned fill up what is missing, smallest id first.
    """
    used = Counter(
        token
        for text in texts
        for token, learned in zip(text.tokens, text.learned, strict=True)
        if learned
    )
    ranked = sorted(range(vocab_size), key=lambda token: (-used[token], token))
    covered = sum(used[token] for token in ranked[:count])
    return sorted(ranked[:count]), covered / max(1, used.total())
