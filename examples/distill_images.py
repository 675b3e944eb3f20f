"""Teach a small network of images what a large one knows: answers, features, relations.

python examples/distill_images.py --data DIR

DIR holds pictures of animals, ``train*.npz`` and ``test*.npz``, with ``x`` uint8 (N, H, W, 3),
``y``, and the names of the ``classes``. Four classes are made of them: bird, cat, dog and cow-like,
which is deer and horse; there are no cows. All students see the same pictures, in the same order,
moved and mirrored alike.
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
    jitter,
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

from mlx_distill import Examples, InputError
from mlx_distill.arrays import num_values, to_host, to_number
from mlx_distill.cli import command

NAMES = {"bird": "bird", "cat": "cat", "dog": "dog", "deer": "cow-like", "horse": "cow-like"}
CLASSES = ["bird", "cat", "cow-like", "dog"]
TEACHER = {"widths": (32, 64, 96, 128), "halving": (0, 1, 3), "dropout": 0.2}
STUDENT = {"widths": (12, 16, 24, 32), "halving": (0, 1, 3)}
TEACHING = {"steps": 1400, "batch_size": 48, "learning_rate": 3e-3, "weight_decay": 0.1}
LEARNING = {"steps": 800, "batch_size": 32, "learning_rate": 3e-3, "weight_decay": 0.01}
# Weights and temperature were chosen on a third of the training images, learning from the others.
ANSWERS = ["forward_kl:weight=0.9,temperature=2", "hard:weight=0.1"]
ARMS = {
    "plain": ["hard"],
    "response": ANSWERS,
    "feature": [
        *ANSWERS,
        "attention_transfer:weight=100,layers=layers.1-layers.1/layers.2-layers.2",
        "hidden_mse:weight=1,layers=layers.3-layers.3",
    ],
    "relation": [*ANSWERS, "similarity_preserving:weight=1000,layers=layers.3-layers.3"],
}
TEMPERATURES = (1, 4, 20)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train the teacher and the students; print what came of it."""
    start_s = time.perf_counter()
    arguments = parsed(parser(__doc__), argv)
    teaching = with_flags(TEACHING, arguments.steps)
    learning = with_flags(LEARNING, arguments.steps, arguments.rate)
    train, test, names = load_splits(arguments.data, arguments.tune)
    train = animals(*train, names, arguments.train)
    test = animals(*test, names, arguments.test)
    moved = jitter(3, flip=True)

    print("teacher", file=sys.stderr)
    teacher = network(TEACHER, 0)
    fit(teacher, [], train, ["hard"], teaching, augment=moved)

    def figures(arm: str, seed: int) -> dict[str, float]:
        teachers = [] if arm == "plain" else [teacher]
        student = network(STUDENT, seed)
        fit(student, teachers, train, ARMS[arm], learning, seed=seed, augment=moved)
        return judged(student, test, [teacher])

    found = {arm: over_seeds(arm, arguments.seeds, partial(figures, arm)) for arm in ARMS}
    best, targets = judged(teacher, test, [teacher]), soft_targets(teacher, test)
    sizes = [num_values(network(one, 0).trainable_parameters()) for one in (TEACHER, STUDENT)]
    show(
        f"Soft targets for a test image of the class {targets['label']}",
        ("temperature", *CLASSES),
        [(str(t), *(f"{p:.4f}" for p in probs)) for t, probs in targets["probs"].items()],
    )
    show(
        f"{test.labels.size} test images; mean ± standard deviation over {arguments.seeds} seeds",
        ("network", "parameters", "accuracy", "KL(teacher || student)"),
        [
            ("teacher", str(sizes[0]), f"{best['accuracy']:.1%}", ""),
            *(
                (arm, str(sizes[1]), one["accuracy"].cell(".1%"), one["kl"].cell(".3f"))
                for arm, one in found.items()
            ),
        ],
    )
    print(verdict({arm: one["accuracy"] for arm, one in found.items()}, best["accuracy"]))
    settings = {"teacher": TEACHER | teaching, "student": STUDENT | learning, "arms": ARMS}
    counts = {"train": train.labels.size, "test": test.labels.size, "parameters": sizes}
    results = {"teacher": best, "soft_targets": targets, "students": found}
    keep(arguments.json, start_s, settings | counts, **results)
    return 0


def network(shape: dict[str, Any], seed: int) -> ConvNet:
    """Return an untrained network."""
    mx.random.seed(seed)
    return ConvNet(3, num_classes=len(CLASSES), **shape)


def animals(images: np.ndarray, labels: np.ndarray, names: list[str], most: int | None) -> Examples:
    """Return the images of the four classes.

    Raises:
        InputError: If none of them is there.
    """
    classes = np.array([CLASSES.index(NAMES[name]) if name in NAMES else -1 for name in names])
    chosen = np.flatnonzero(classes[labels] >= 0)[:most]
    if not chosen.size:
        raise InputError(f"the images have none of {', '.join(NAMES)}; their classes are {names}")
    return as_examples(images[chosen], classes[labels[chosen]].astype(np.int32))


def soft_targets(teacher: ConvNet, data: Examples) -> dict[str, Any]:
    """Return the class of the first image, and the teacher's word on it at several temperatures."""
    logits = teacher(data.inputs[:1])[0]
    label = CLASSES[int(to_number(data.labels[0]))]
    probs = {t: to_host(mx.softmax(logits / t)) for t in TEMPERATURES}
    return {"label": label, "probs": probs}


def verdict(accuracy: dict[str, Runs], teacher: float) -> str:
    """Return in a sentence what the teacher's answers gained."""
    plain, response = accuracy["plain"], accuracy["response"]
    gain, gap, spread = response.mean - plain.mean, teacher - plain.mean, widest(plain, response)
    text = f"The teacher is {gap:+.1%} from the plain student; its answers gave {gain:+.1%}"
    if spread is None:
        return f"{text}; one seed does not tell that from chance."
    held = "more than" if gain > spread else "not more than"
    others = ", ".join(
        f"{arm} {one.mean - response.mean:+.1%}"
        for arm, one in accuracy.items()
        if one not in (plain, response)
    )
    return f"{text}, {held} the spread over seeds, {spread:.1%}. Added to them: {others}."


if __name__ == "__main__":
    sys.exit(main())
