"""Training of networks as a GPU loads them: float16, bfloat16, quantised with adapters."""

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from tiny_models import tiny_config, tiny_model

from mlx_distill import Distilled, TrainingConfig, distill
from mlx_distill.data.texts import Text
from mlx_distill.distillation.adapters import AdapterConfig
from mlx_distill.distillation.students import from_config
from mlx_distill.training.checkpoints import checkpoints
from mlx_distill.training.gradients import Gradients
from mlx_distill.training.loop import train

HALVES = [mx.float16, mx.bfloat16]


def texts(count: int = 12) -> list[Text]:
    random = np.random.default_rng(0)
    return [Text(random.integers(1, 97, 20).tolist()) for _ in range(count)]


def student(kind: mx.Dtype, tune: str = "full", bits: int | None = None) -> Any:
    """Return half of the teacher's layers' width, in some type."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "head_dim": 8}
    made = from_config(tiny_config("llama") | sizes, 3)
    made.set_dtype(mx.bfloat16)  # the same start for all
    made.set_dtype(kind)
    if bits:
        nn.quantize(made, 32, bits)
    AdapterConfig(tune).apply(made)
    return made


def run(made: Any, folder: Path | None = None, **fields: Any) -> Distilled:
    training = TrainingConfig(**{"steps": 6, "learning_rate": 1e-3, "warmup": 0.0, **fields})
    teacher = tiny_model("llama")
    teacher.set_dtype(mx.bfloat16)
    return distill(
        made,
        teacher,
        texts(),
        folder=folder or tempfile.mkdtemp(),
        training=training,
        valid=texts(4),
        batch_size=3,
        quiet=True,
    )


def numbers(network: nn.Module) -> dict[str, np.ndarray]:
    arrays: dict[str, Any] = dict(tree_flatten(network.trainable_parameters()))
    return {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}


@pytest.mark.parametrize("rate", [2e-3, 2e-4])
def test_half_precision_learns_as_much_as_float32(rate: float) -> None:
    """With moments and updates in the model's type, bfloat16 loses most of a small rate."""
    whole, half = (
        run(student(kind), steps=24, learning_rate=rate, evaluate_every=24)
        for kind in (mx.float32, mx.bfloat16)
    )
    start, end = whole.before["kl"], whole.log[-1]["held_out"]["kl"]
    assert end < 0.97 * start
    assert half.log[-1]["held_out"]["kl"] == pytest.approx(end, rel=0.01, abs=0.1 * (start - end))


def test_float16_stays_a_number() -> None:
    made = student(mx.float16)
    done = run(made, steps=24, learning_rate=4e-3, evaluate_every=24)
    assert done.log[-1]["held_out"]["kl"] < 0.8 * done.before["kl"]
    assert all(np.isfinite(array).all() for array in numbers(made).values())


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize(
    ("tune", "bits"), [("lora", None), ("lora", 4), ("dora", 4), ("full", None)]
)
def test_every_kind_of_student_is_trained(kind: mx.Dtype, tune: str, bits: int | None) -> None:
    made = student(kind, tune, bits)
    types: dict[str, Any] = {name: x.dtype for name, x in tree_flatten(made.parameters())}
    before = numbers(made)
    done = run(made, steps=5, learning_rate=5e-3)
    assert done.log[-1]["held_out"]["kl"] < done.before["kl"]
    assert {name: x.dtype for name, x in tree_flatten(made.parameters())} == types
    moved = [name for name, x in numbers(made).items() if not np.array_equal(x, before[name])]
    assert len(moved) == len(before)


def test_a_new_student_of_a_teacher_in_half_precision() -> None:
    done = run(student(mx.float32), steps=5, learning_rate=5e-3)
    assert done.log[-1]["held_out"]["kl"] < done.before["kl"]


@pytest.mark.parametrize("kind", HALVES)
def test_checkpoints_keep_float32_and_resume_to_the_same_bits(
    tmp_path: Path, kind: mx.Dtype
) -> None:
    class Killed(Exception):
        pass

    class Kill:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if info["iteration"] == 5:
                raise Killed

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            pass

    whole, parts = student(kind), student(kind)
    run(whole, tmp_path / "whole", checkpoint_every=2)
    teacher = tiny_model("llama")
    teacher.set_dtype(mx.bfloat16)
    arguments: dict[str, Any] = {"folder": tmp_path / "parts", "batch_size": 3, "quiet": True}
    config = TrainingConfig(steps=6, learning_rate=1e-3, warmup=0.0, checkpoint_every=2)
    with pytest.raises(Killed):
        distill(
            parts, teacher, texts(), valid=texts(4), training=config, callback=Kill(), **arguments
        )
    again = student(kind)
    run(again, tmp_path / "parts", checkpoint_every=2)
    assert numbers(again).keys() == numbers(whole).keys()
    for name, array in numbers(whole).items():
        np.testing.assert_array_equal(numbers(again)[name], array)
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        for file in ("network.safetensors", "optimizer.safetensors"):
            kept = mx.load(str(checkpoints(folder)[-1] / file))
            assert isinstance(kept, dict)
            assert {x.dtype for x in kept.values()} <= {mx.float32, mx.uint64, mx.int32}
    masters = mx.load(str(checkpoints(tmp_path / "whole")[-1] / "network.safetensors"))
    assert isinstance(masters, dict)
    rounded = masters["student.lm_head.weight"].astype(kind)
    assert mx.array_equal(rounded, whole.lm_head.weight).item()
    assert not mx.array_equal(rounded.astype(mx.float32), masters["student.lm_head.weight"]).item()


# ------------------------------------------------------------------------------ sums and divisions


class Scalars(nn.Module):
    """Two numbers, and nothing else."""

    def __init__(self, kind: mx.Dtype):
        super().__init__()
        self.weight = mx.ones((2,), kind)


def moments(folder: Path) -> mx.array:
    state = mx.load(str(checkpoints(folder)[-1] / "optimizer.safetensors"))
    assert isinstance(state, dict)
    return next(x for name, x in state.items() if name.endswith("weight.m"))


@pytest.mark.parametrize("count", [60_000.0, 70_000.0, 1e7])
@pytest.mark.parametrize("kind", [*HALVES, mx.float32])
def test_counts_beyond_the_largest_half(tmp_path: Path, kind: mx.Dtype, count: float) -> None:
    """65,504 is float16's largest number: a division by more would make every gradient zero."""
    network = Scalars(kind)
    steps = train(
        network,
        lambda batch: ((network.weight.astype(mx.float32) * 100).sum(), mx.array(count)),
        lambda number: number,
        dict,
        TrainingConfig(steps=1),
        tmp_path,
    )
    progress = next(iter(steps))
    list(steps)
    assert progress.loss == pytest.approx(200 / count, rel=1e-5)
    np.testing.assert_allclose(moments(tmp_path), [10 / count] * 2, rtol=1e-4)


def test_sums_of_many_batches_are_float32(tmp_path: Path) -> None:
    """In bfloat16 the 256th batch's 1 would be lost."""
    network = Scalars(mx.bfloat16)
    config = TrainingConfig(steps=1, accumulate=600, max_grad_norm=1e6)
    loss: Any = lambda batch: (network.weight.astype(mx.float32).sum(), mx.array(0.5))  # noqa: E731
    list(train(network, loss, lambda number: number, dict, config, tmp_path))
    np.testing.assert_allclose(moments(tmp_path), [0.2, 0.2], rtol=1e-5)


def test_gradients_that_overflow_are_made_again_with_a_smaller_loss() -> None:
    network = Scalars(mx.float16)

    def loss(batch: float) -> tuple[mx.array, mx.array]:
        return batch * network.weight.astype(mx.float32).sum(), mx.array(1.0)

    gradients = Gradients(network, loss, has_float16=True)
    first = gradients.sums([3.0]).mean_gradients()
    assert gradients.scale == 1
    second = gradients.sums([1e6]).mean_gradients()
    assert gradients.scale == 1 / 16
    np.testing.assert_array_equal(first["weight"], [3, 3])
    np.testing.assert_allclose(second["weight"], [1e6, 1e6], rtol=1e-3)


def test_a_step_moves_a_weight_by_the_rate(tmp_path: Path) -> None:
    """Without the bias correction, step 10 would move it 6.5 times as far."""
    network = Scalars(mx.float32)
    config = TrainingConfig(steps=1000, learning_rate=1e-3, warmup=0.0, weight_decay=0.0)
    places = [1.0]
    rates = []
    for progress in train(
        network,
        lambda batch: (0.1 * network.weight.sum(), mx.array(1.0)),
        lambda number: number,
        dict,
        config,
        tmp_path,
    ):
        places.append(network.weight[0].item())  # pyright: ignore
        rates.append(progress.learning_rate)
        if progress.step == 10:
            break
    np.testing.assert_allclose(-np.diff(places), rates, rtol=2e-3)
