"""Steps that the host does not wait for: the same as those that it does, compiled or not."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_distill.errors import InputError
from mlx_distill.training import quick_steps
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.loop import Progress, train


class Gpu:
    """The array library of a machine whose default device is a GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def default_device(self) -> mx.Device:
        return mx.Device(mx.gpu)


def batch_at(step: int) -> list[mx.array]:
    random = np.random.default_rng(step)
    inputs = mx.array(random.normal(size=(8, 3)).astype(np.float32))
    return [inputs, inputs.sum(axis=1, keepdims=True)]


def run(folder: Path, quick: bool, dtype: mx.Dtype = mx.float32, **options: Any) -> list[Progress]:
    mx.random.seed(0)
    network = nn.Linear(3, 1)
    network.set_dtype(dtype)

    def loss(batch: list[mx.array]) -> tuple[mx.array, mx.array]:
        inputs, goals = batch
        found = network(inputs.astype(dtype)).astype(mx.float32)
        return mx.square(found - goals).sum(), mx.array(len(inputs))

    config = TrainingConfig(**{"steps": 30, "learning_rate": 0.05, "evaluate_every": 10, **options})

    def judge() -> dict[str, float]:
        weights = network.weight.astype(mx.float32)[0]
        return {str(place): weight.item() for place, weight in enumerate(weights)}

    return list(train(network, loss, batch_at, judge, config, folder, quick=quick))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_quick_steps_learn_what_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: mx.Dtype
):
    expected = run(tmp_path / "a", False, dtype)
    if compiled:
        monkeypatch.setattr(quick_steps, "mx", Gpu())
    found = run(tmp_path / "b", True, dtype)
    assert len(found) == 30
    for one, other in zip(found, expected, strict=True):
        assert one.evaluation == pytest.approx(other.evaluation, rel=1e-5)
        if one.evaluation:
            assert one.loss == pytest.approx(other.loss, rel=1e-3)
    assert found[-1].loss < 0.6 * found[0].loss


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path):
    whole = run(tmp_path / "a", True)[-1]
    run(tmp_path / "b", True, steps=30, checkpoint_every=7)
    for folder in sorted((tmp_path / "b").glob("step-*"))[-1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = run(tmp_path / "b", True, checkpoint_every=7)
    assert again[0].step == 29
    assert (again[-1].loss, again[-1].evaluation) == (whole.loss, whole.evaluation)


@pytest.mark.parametrize("quick", [False, True])
def test_time_ends_a_training_with_its_rate_at_the_end(tmp_path: Path, quick: bool):
    last = run(tmp_path, quick, steps=10**9, max_minutes=0.02, evaluate_every=10**8)[-1]
    assert last.ended
    assert last.evaluation
    assert last.step < 10**8
    assert last.learning_rate < 0.001


def test_a_loss_that_is_no_number_is_found(tmp_path: Path):
    with pytest.raises(InputError, match="is nan"):
        run(tmp_path, True, learning_rate=1000.0, max_grad_norm=1e9, weight_decay=1000.0)
