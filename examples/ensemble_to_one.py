"""Teach one network what an ensemble of three knows, at a third of the ensemble's cost.

python examples/ensemble_to_one.py --data DIR

DIR holds digits, ``train*.npz`` and ``test*.npz``, with ``x`` uint8 (N, 28, 28) and ``y``. Teachers
and plain students learn the labels of a few digits. Students of the ensemble learn what it says
about the same digits, or about others, whose labels nobody looks at. All networks have the same
architecture and make the same number of steps.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from classifiers import (
    ConvNet,
    Runs,
    as_examples,
    fit,
    judged,
    keep,
    load_splits,
    over_seeds,
    parsed,
    parser,
    show,
    widest,
    with_flags,
)

# isort: split
import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_distill.arrays import num_values
from mlx_distill.cli import command
from mlx_distill.distillation.teachers import mean_logits

NUM_TEACHERS, LABELLED, UNLABELLED = 3, 1000, 20_000
NETWORK = {"widths": (16, 32, 64), "halving": (0, 1)}
SETTINGS = {"steps": 900, "batch_size": 32, "learning_rate": 5e-3}
# Chosen on training digits beyond those that anything is learned from.
PLAIN, SAME, FURTHER = "labels", "ensemble, same digits", "ensemble, unlabelled digits"
ARMS = {
    PLAIN: ["hard"],
    SAME: ["forward_kl:weight=0.9,temperature=2", "hard:weight=0.1"],
    FURTHER: ["forward_kl:temperature=2"],
}


class Ensemble(nn.Module):
    """Networks whose probabilities are averaged."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = list(members)

    def __call__(self, images: mx.array) -> mx.array:
        """Return the logarithm of the mean."""
        weights = [1 / len(self.members)] * len(self.members)
        return mean_logits([member(images) for member in self.members], weights, "probs")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train teachers and students; print what came of it."""
    start_s = time.perf_counter()
    arguments = parsed(parser(__doc__), argv)
    teaching = with_flags(SETTINGS, arguments.steps)
    learning = with_flags(SETTINGS, arguments.steps, arguments.rate)
    (images, labels), (test_images, test_labels), names = load_splits(
        arguments.data, arguments.tune
    )
    most = arguments.train or LABELLED
    labelled = as_examples(images[:most], labels[:most])
    others = images[most : most + UNLABELLED]
    unlabelled = as_examples(others, np.zeros(len(others), np.int32))
    test = as_examples(test_images[: arguments.test], test_labels[: arguments.test])

    def trained(
        arm: str, seed: int, teachers: Sequence[nn.Module], settings: dict[str, Any]
    ) -> nn.Module:
        mx.random.seed(seed)
        student = ConvNet(1, num_classes=len(names), **NETWORK)
        data = unlabelled if arm == FURTHER else labelled
        return fit(student, teachers, data, ARMS[arm], settings, seed=seed)

    print("teachers", file=sys.stderr)
    teachers = [trained(PLAIN, 100 + number, [], teaching) for number in range(NUM_TEACHERS)]
    size = num_values(teachers[0].trainable_parameters())

    def figures(arm: str, seed: int) -> dict[str, float]:
        student = trained(arm, seed, [] if arm == PLAIN else teachers, learning)
        return judged(student, test, teachers)

    alone = [judged(teacher, test, teachers)["accuracy"] for teacher in teachers]
    together = judged(Ensemble(teachers), test, teachers)["accuracy"]
    found = {arm: over_seeds(arm, arguments.seeds, partial(figures, arm)) for arm in ARMS}
    title = (
        f"{test.labels.size} test digits; mean ± standard deviation over {arguments.seeds} seeds"
    )
    show(title, ("network", "accuracy", "KL(ensemble || student)"), rows(alone, together, found))
    print(verdict({arm: one["accuracy"] for arm, one in found.items()}, together))
    data = {"labelled": labelled, "unlabelled": unlabelled, "test": test}
    counts = {name: examples.labels.size for name, examples in data.items()} | {"parameters": size}
    keep(
        arguments.json,
        start_s,
        {"network": NETWORK, "training": learning, "arms": ARMS, **counts},
        teachers=alone,
        ensemble=together,
        students=found,
    )
    return 0


def rows(
    alone: Sequence[float], together: float, found: dict[str, dict[str, Runs]]
) -> list[tuple[str, str, str]]:
    """Return the table's rows: teachers, ensemble, students."""
    return [
        *((f"teacher {number}", f"{value:.2%}", "") for number, value in enumerate(alone)),
        (f"ensemble of {NUM_TEACHERS}", f"{together:.2%}", ""),
        *((arm, one["accuracy"].cell(".2%"), one["kl"].cell(".4f")) for arm, one in found.items()),
    ]


def verdict(accuracy: dict[str, Runs], ensemble: float) -> str:
    """Return in sentences how near the students come to the ensemble."""
    plain = accuracy[PLAIN]
    lines = [f"The ensemble is {ensemble - plain.mean:+.2%} from the student of labels."]
    for arm in (SAME, FURTHER):
        student = accuracy[arm]
        gain, rest, spread = student.mean - plain.mean, ensemble - student.mean, widest(student)
        text = f"Taught by the {arm}: {gain:+.2%}, and {rest:+.2%} remain"
        if spread is not None:
            text += f", {'within' if rest <= spread else 'beyond'} the spread, {spread:.2%}"
        lines.append(f"{text}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
