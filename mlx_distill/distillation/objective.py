"""The objective: any weighted sum of losses, over positions.

Losses return one value per position. What is the same for all of them is done here, once: the
logits are cut to the vocabulary that both networks have and divided by the temperature, the values
are weighted by the mask, added up, and weighed against each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_distill.arrays import log_probs
from mlx_distill.distillation.terms import LOSSES, ON_LOGITS, SCALED, LossTerm
from mlx_distill.errors import InputError
from mlx_distill.losses import response


@dataclass(frozen=True)
class Goal:
    """What a teacher says at some positions, in rows.

    Args:
        logits: (N, V), or None if only the top tokens are known.
        top_ids: (N, K), where only those are known.
        top_log_probs: Normalised over the whole vocabulary, most probable first.
        vocab_size: Of the teacher, where only the top tokens are known.
        known: (N,), 0 where the teacher says nothing; None if it always does.
        log_prior: (V,), how probable tokens are on the whole; not normalised.
    """

    logits: mx.array | None = None
    top_ids: mx.array | None = None
    top_log_probs: mx.array | None = None
    vocab_size: int = 0
    known: mx.array | None = None
    log_prior: mx.array | None = None


def response_losses(
    terms: Sequence[LossTerm],
    logits: mx.array,
    goal: Goal | None,
    labels: mx.array,
    mask: mx.array,
) -> tuple[mx.array, list[mx.array]]:
    """Return the weighted sum of the response terms over positions, and each term's own sum.

    Args:
        terms: The losses; here and nowhere else their temperatures, weights and the mask count.
        logits: The student's, (N, V).
        goal: What the teacher says there; None for nothing.
        labels: The true tokens, (N,); where the mask is 0, anything.
        mask: Weight of every position, (N,).
    """
    total, sums = mx.array(0.0), []
    answers = _Answers(logits, goal)
    for term in terms:
        values = _values(term, answers, labels)
        weights = mask if term.name == "hard" else mask * answers.known
        value = weighted_sum(values, weights)
        temperature = term.options.get("temperature", 1.0)
        if term.name in SCALED and term.options.get("scaled", True):
            value = value * temperature**2
        total = total + term.weight * value
        sums.append(mx.stop_gradient(value))
    return total, sums


def weighted_sum(values: mx.array, weights: mx.array) -> mx.array:
    """Return the weighted sum of values; where the weight is 0, whatever they are."""
    weights = weights.astype(mx.float32)
    return mx.where(weights > 0, values * weights, 0).sum()


class _Answers:
    """What student and teacher say at some positions, at the temperatures that terms ask for."""

    def __init__(self, logits: mx.array, goal: Goal | None):
        self.student = logits.astype(mx.float32)
        self.goal = Goal() if goal is None else goal
        self._log_probs: dict[tuple[str, float, int], mx.array] = {}

    @property
    def known(self) -> mx.array:
        """1 where the teacher says something."""
        known = self.goal.known
        return mx.array(1.0) if known is None else known

    def pair(self, name: str, temperature: float) -> tuple[mx.array, mx.array]:
        """Return the student's and the teacher's logits, or what a loss is given of them."""
        if self.goal.logits is None:
            known = self.goal.top_ids is not None
            raise InputError(
                f"{name} needs all of the teacher's logits, and a cache has the top ones; "
                "use sparse_kl"
                if known
                else f"{name} needs a teacher"
            )
        ours, theirs = self.student.shape[-1], self.goal.logits.shape[-1]
        if name != "sorted_l1":  # padded heads: what only one of them has is never a token
            ours = theirs = min(ours, theirs)
        if name in ON_LOGITS:
            goal = self.goal.logits[..., :theirs].astype(mx.float32)
            return self.student[..., :ours] / temperature, goal / temperature
        return self.student_log_probs(temperature, ours), self._kept(
            "teacher", self.goal.logits, temperature, theirs
        )

    def student_log_probs(self, temperature: float, width: int) -> mx.array:
        """Return the student's log-probabilities of the first tokens; made once."""
        return self._kept("student", self.student, temperature, width)

    def _kept(self, who: str, logits: mx.array, temperature: float, width: int) -> mx.array:
        key = (who, temperature, width)
        if key not in self._log_probs:
            cut = logits[..., :width].astype(mx.float32)
            self._log_probs[key] = log_probs(cut / temperature)
        return self._log_probs[key]


def _values(term: LossTerm, answers: _Answers, labels: mx.array) -> mx.array:
    """Return a response term's value at every position."""
    loss = LOSSES[term.name]
    own = term.own_options
    temperature = float(term.options.get("temperature", 1.0))
    if term.name == "hard":
        return loss(answers.student_log_probs(1.0, answers.student.shape[-1]), labels, **own)
    if term.name == "sparse_kl":
        return _sparse(term, answers, temperature)
    pair = answers.pair(term.name, temperature)
    return loss(*pair, labels, **own) if term.name == "decoupled_kd" else loss(*pair, **own)


def _sparse(term: LossTerm, answers: _Answers, temperature: float) -> mx.array:
    """Return the divergence from the teacher's top tokens."""
    goal = answers.goal
    theirs = goal.vocab_size if goal.logits is None else goal.logits.shape[-1]
    width = min(answers.student.shape[-1], theirs or answers.student.shape[-1])
    ids, known = _top(goal, term.options.get("k"), width)
    student = answers.student_log_probs(temperature, width)
    if goal.vocab_size > width:  # padded heads: one more entry stands for what is never a token
        student = mx.pad(student, [(0, 0), (0, 1)], constant_values=-mx.inf)
        known = mx.where(ids < width, known, -mx.inf)
        ids = mx.minimum(ids, width)
    return response.sparse_kl(
        student, ids, known / temperature, **term.own_options, log_prior=_prior(goal, student)
    )


def _prior(goal: Goal, logits: mx.array) -> mx.array:
    """Return how probable tokens are where a goal says nothing; equally, if it does not know."""
    width = logits.shape[-1]
    known = mx.zeros((0,)) if goal.log_prior is None else goal.log_prior[:width]
    return mx.pad(known, (0, width - known.size))


def _top(goal: Goal, k: int | None, width: int) -> tuple[mx.array, mx.array]:
    """Return the teacher's top tokens and their log-probabilities."""
    if goal.top_ids is not None and goal.top_log_probs is not None:
        known = goal.top_ids.shape[-1]
        if k is not None and k > known:
            raise InputError(f"sparse_kl asks for {k} tokens per position, the cache has {known}")
        return goal.top_ids[..., :k], goal.top_log_probs[..., :k]
    if goal.logits is None:
        raise InputError("sparse_kl needs a teacher")
    known = log_probs(goal.logits[..., :width])
    k = min(64 if k is None else k, width)
    ids = mx.argpartition(-known, k - 1, axis=-1)[..., :k]
    return ids, mx.take_along_axis(known, ids, axis=-1)
