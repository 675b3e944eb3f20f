"""A student that never saw a 3 learns from soft targets what a 3 is.

python examples/digits_hinton.py --data DIR

The experiment of section 3 of Hinton et al. 2015 (arXiv:1503.02531), smaller. DIR holds digits,
``train*.npz`` and ``test*.npz``, with ``x`` uint8 (N, 28, 28) and ``y``. A large network learns all
digits, with dropout; a small one learns what it says about those that are not a 3. The bias of the
small one's 3 is too low then. It is raised until, of held-out training digits, as many are called
a 3 as there are 3s; the paper chose it on the test set. The control learns labels instead.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial

from classifiers import (
    Perceptron,
    Runs,
    as_examples,
    fit,
    jitter,
    keep,
    load_splits,
    over_seeds,
    parsed,
    parser,
    show,
    with_flags,
)

# isort: split
import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_distill import InputError
from mlx_distill.cli import command

OMITTED = 3
TEACHER, STUDENT, DROPOUT = (800, 800), (100, 100), 0.3
TEACHING = {"steps": 2500, "batch_size": 128, "learning_rate": 1e-3}
LEARNING = {"steps": 2000, "batch_size": 128, "learning_rate": 3e-3}
SOFT, HARD = "soft targets", "hard labels"
ARMS = {SOFT: ["forward_kl:temperature=4"], HARD: ["hard"]}
HEADS = ("network", "errors", "on 3s", "bias raised by", "errors then", "on 3s then")
COLUMNS = (
    ("errors", ".0f"),
    ("on_3s", ".0f"),
    ("bias", ".1f"),
    ("errors_raised", ".0f"),
    ("on_3s_raised", ".0f"),
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train the teacher and the students; print what came of it."""
    start_s = time.perf_counter()
    arguments = parsed(parser(__doc__), argv)
    teaching = with_flags(TEACHING, arguments.steps)
    learning = with_flags(LEARNING, arguments.steps, arguments.rate)
    (images, labels), tests, names = load_splits(arguments.data, arguments.tune)
    if len(names) <= OMITTED:
        raise InputError(f"the digits have no {OMITTED} to leave out, only {len(names)} classes")
    images, labels = images[: arguments.train], labels[: arguments.train]
    cut = len(images) * 5 // 6
    held_out, images, labels = (images[cut:], labels[cut:]), images[:cut], labels[:cut]
    transfer = as_examples(images[labels != OMITTED], labels[labels != OMITTED])
    test = tests[0][: arguments.test], tests[1][: arguments.test]
    moved = jitter(2)

    def network(hidden: Sequence[int], seed: int, dropout: float = 0.0) -> Perceptron:
        mx.random.seed(seed)
        return Perceptron((images[0].size, *hidden, len(names)), dropout)

    print("teacher", file=sys.stderr)
    teacher = network(TEACHER, 0, DROPOUT)
    fit(teacher, [], as_examples(images, labels), ["hard"], teaching, augment=moved)

    def figures(arm: str, seed: int) -> dict[str, float]:
        student, teachers = network(STUDENT, seed), [teacher] if arm == SOFT else []
        fit(student, teachers, transfer, ARMS[arm], learning, seed=seed, augment=moved)
        bias = raised_bias(logits(student, held_out[0]), held_out[1])
        answers = logits(student, test[0])
        before, after = errors(answers, test[1], 0), errors(answers, test[1], bias)
        return {"bias": bias, **before, **{f"{key}_raised": n for key, n in after.items()}}

    best = errors(logits(teacher, test[0]), test[1], 0)
    found = {arm: over_seeds(arm, arguments.seeds, partial(figures, arm)) for arm in ARMS}
    threes = int((test[1] == OMITTED).sum())
    show(
        f"Errors on {len(test[1])} test digits, {threes} of them a {OMITTED}; "
        f"mean ± standard deviation over {arguments.seeds} seeds",
        HEADS,
        rows(best, found),
    )
    print(verdict(found, threes))
    settings = {"teacher": (TEACHER, DROPOUT, teaching), "student": (STUDENT, learning)}
    counts = {"transfer": transfer.labels.size, "held_out": len(held_out[1]), "test": len(test[1])}
    keep(
        arguments.json,
        start_s,
        {**settings, "arms": ARMS, **counts, "test_3s": threes},
        teacher=best,
        students=found,
    )
    return 0


def rows(best: dict[str, int], found: dict[str, dict[str, Runs]]) -> list[tuple[str, ...]]:
    """Return the table's rows: the teacher, then the students."""
    return [
        ("teacher", str(best["errors"]), str(best["on_3s"]), "", "", ""),
        *((arm, *(one[key].cell(form) for key, form in COLUMNS)) for arm, one in found.items()),
    ]


def logits(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """Return the logits of images, (N, C)."""
    network.eval()
    parts = [images[start : start + 500] for start in range(0, len(images), 500)]
    return np.concatenate([np.array(network(mx.array(part))) for part in parts])


def errors(logits: np.ndarray, labels: np.ndarray, bias: float) -> dict[str, int]:
    """Return the number of errors, in all and on the omitted class, after its bias is raised."""
    wrong = called(logits, bias) != labels
    return {"errors": int(wrong.sum()), "on_3s": int(wrong[labels == OMITTED].sum())}


def raised_bias(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return what to add to the omitted class's logit so that it is called as often as it is true.

    Only how many there are is used of the labels.
    """
    others = np.delete(logits, OMITTED, axis=1).max(axis=1)
    missing = np.sort(others - logits[:, OMITTED])  # what every digit needs to be called a 3
    count = int((labels == OMITTED).sum())
    return float(missing[max(count - 1, 0) : count + 1].mean())


def called(logits: np.ndarray, bias: float) -> np.ndarray:
    """Return the best class of every row after the omitted one's bias is raised."""
    raised = logits.copy()
    raised[:, OMITTED] += bias
    return raised.argmax(axis=1)


def verdict(found: dict[str, dict[str, Runs]], threes: int) -> str:
    """Return in a sentence how many of the digits that were never seen are known."""
    known = {arm: 1 - one["on_3s"].mean / max(threes, 1) for arm, one in found.items()}
    raised = {arm: 1 - one["on_3s_raised"].mean / max(threes, 1) for arm, one in found.items()}
    return (
        f"Of the {OMITTED}s, which no student ever saw, soft targets taught {known[SOFT]:.1%}, "
        f"{raised[SOFT]:.1%} with the bias raised; labels taught {known[HARD]:.1%}, "
        f"{raised[HARD]:.1%} with the bias raised. (Paper, with a larger student: 86.8 %, 98.6 %.)"
    )


if __name__ == "__main__":
    sys.exit(main())
