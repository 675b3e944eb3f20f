"""Training: the same bits whatever happens in between, and nothing lost when something fails."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from mlx_distill import InputError
from mlx_distill.training.best import Best, held_out_score
from mlx_distill.training.checkpoints import checkpoints, save
from mlx_distill.training.config import TrainingConfig, schedule
from mlx_distill.training.loop import train
from mlx_distill.training.masters import Masters
from mlx_distill.training.runs import check_output

# ------------------------------------------------------------------------- a network of two layers


class Small(nn.Module):
    """Two layers and an array that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(2)
        self.layers = [nn.Linear(4, 8), nn.Linear(8, 3)]
        self.fixed = mx.arange(3)
        self.freeze(keys=["fixed"], recurse=False)
        mx.eval(self.parameters())

    def __call__(self, x: mx.array) -> mx.array:
        return self.layers[1](nn.silu(self.layers[0](x))) + self.fixed


def batch_at(step: int) -> tuple[mx.array, mx.array]:
    draws = np.random.default_rng(step)
    x = draws.normal(size=(16, 4)).astype(np.float32)
    return mx.array(x), mx.array((x @ np.full((4, 3), 0.5) + 1).astype(np.float32))


def run(
    folder: Path,
    config: TrainingConfig,
    stop_at: int | None = None,
    spoil: Callable[[int, mx.array], mx.array] | None = None,
) -> tuple[Small, list[Any]]:
    """Train the small network; return it and what the loop yielded."""
    network = Small()
    step = 0

    def loss(batch: tuple[int, mx.array, mx.array]) -> tuple[mx.array, mx.array]:
        number, x, y = batch
        total = mx.square(network(x) - y).sum()
        return (total if spoil is None else spoil(number, total)), mx.array(float(y.size))

    progress = []
    steps = train(
        network,
        loss,
        lambda number: (number, *batch_at(number)),
        lambda: {"judged": True},
        config,
        folder,
    )
    for step, state in enumerate(steps, start=1):
        progress.append(state)
        if step == stop_at:
            break
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    return network, progress


def bits(network: nn.Module) -> dict[str, bytes]:
    return {name: bytes(memoryview(x)) for name, x in tree_flatten(network.parameters())}


CONFIG = TrainingConfig(steps=12, evaluate_every=5, checkpoint_every=4, learning_rate=0.05)


def test_training_learns(tmp_path: Path) -> None:
    config = TrainingConfig(steps=200, learning_rate=0.05, checkpoint_every=100)
    network, progress = run(tmp_path, config)
    assert progress[-1].loss < 0.01 * progress[0].loss
    assert mx.array_equal(network.fixed, mx.arange(3))


def test_loop_yields_every_step(tmp_path: Path) -> None:
    _, progress = run(tmp_path, CONFIG)
    assert [state.step for state in progress] == list(range(1, 13))
    judged = [state.step for state in progress if state.evaluation]
    assert judged == [5, 10, 12]
    # The loss is that of the weights before the step.
    network = Small()
    x, y = batch_at(0)
    assert progress[0].loss == pytest.approx(mx.square(network(x) - y).mean().item(), rel=1e-5)


@pytest.mark.parametrize("stop_at", [1, 4, 7, 8, 11])
def test_loop_resumes_with_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole, expected = run(tmp_path / "whole", CONFIG)
    run(tmp_path / "parts", CONFIG, stop_at=stop_at)
    resumed, progress = run(tmp_path / "parts", CONFIG)
    assert progress[0].step == (stop_at - 1) // 4 * 4 + 1  # left before that step's checkpoint
    assert bits(resumed) == bits(whole)
    losses = {state.step: state.loss for state in expected}
    assert all(state.loss == losses[state.step] for state in progress)


def test_finished_training_does_nothing_more(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, CONFIG)
    again, progress = run(tmp_path, CONFIG)
    assert progress == []
    assert bits(again) == bits(whole)


def test_the_best_network_outlives_a_kill_while_a_better_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one was removed before the new one took its name, and the training was lost."""
    config = TrainingConfig(keep_best=True)
    network = nn.Linear(2, 2)
    masters, best = Masters(network), Best(tmp_path, config, held_out_score)
    best.see(1, {"nats": 2.0}, masters)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            best.see(2, {"nats": 1.0}, masters)
    best.check(masters)
    best.take_back(masters)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    config = TrainingConfig(steps=11, checkpoint_every=2)
    seen = []
    network = Small()
    steps = train(
        network, lambda b: (network(b[0]).sum(), mx.array(1.0)), batch_at, dict, config, tmp_path
    )
    for _ in steps:
        seen.append([path.name for path in checkpoints(tmp_path)])
    assert seen[1] == []
    assert seen[2] == ["step-0000002"]
    assert seen[4] == ["step-0000002", "step-0000004"]
    assert seen[6] == ["step-0000004", "step-0000006"]
    kept = [path.name for path in checkpoints(tmp_path)]
    assert kept == ["step-0000010", "step-0000011"]
    assert not (tmp_path / "writing").exists()


def test_half_a_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    """A kill while one is written leaves a folder of another name."""
    whole, _ = run(tmp_path / "whole", CONFIG)
    run(tmp_path / "parts", CONFIG, stop_at=9)
    writing = tmp_path / "parts" / "writing"
    writing.mkdir()
    (writing / "network.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoints(tmp_path / "parts")] == [
        "step-0000004",
        "step-0000008",
    ]
    resumed, _ = run(tmp_path / "parts", CONFIG)
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize("missing", [1, 8, 64, 300, 2000])
def test_writer_that_cuts_files_short_is_noticed(tmp_path: Path, missing: int) -> None:
    weights = {"weight": mx.ones((40, 10))}
    save(tmp_path, 3, weights, {"moments": weights})
    write = mx.save_safetensors

    def cutting(path: str, arrays: Any, *rest: Any) -> None:
        write(path, arrays, *rest)
        with open(path, "r+b") as file:
            file.truncate(max(0, os.path.getsize(path) - missing))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", cutting)
        with pytest.raises(InputError, match=r"step 5 could not be written .*step-0000003"):
            save(tmp_path, 5, weights, {"moments": weights})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000003"]


def test_loss_that_is_no_number_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    def spoil(step: int, total: mx.array) -> mx.array:
        return total * mx.nan if step == 6 else total

    with pytest.raises(InputError) as error:
        run(tmp_path, CONFIG, spoil=spoil)
    assert "the loss of step 7 is nan" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "step-0000004" in str(error.value)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000004"]


def test_loss_that_is_no_number_before_any_checkpoint(tmp_path: Path) -> None:
    """There is none to name."""
    with pytest.raises(InputError) as error:
        run(tmp_path, CONFIG, spoil=lambda step, total: total * mx.inf)
    assert "the loss of step 1 is inf" in str(error.value)
    assert "last good checkpoint is in" not in str(error.value)


def test_gradient_that_is_no_number_does_not_reach_a_checkpoint(tmp_path: Path) -> None:
    """The loss of step 8 is a number, its gradient is none; step 8 writes a checkpoint."""

    def spoil(step: int, total: mx.array) -> mx.array:
        # sqrt(0) has no slope.
        return total + mx.sqrt(mx.maximum(total * 0, 0)) if step == 7 else total

    with pytest.raises(InputError):
        run(tmp_path, CONFIG, spoil=spoil)
    for folder in checkpoints(tmp_path):
        arrays = mx.load(str(folder / "network.safetensors"))
        assert isinstance(arrays, dict)
        assert all(mx.isfinite(x).all().item() for x in arrays.values()), folder.name


def test_gradient_that_is_no_number_in_the_last_step(tmp_path: Path) -> None:
    """No later loss would tell; the result must not be spoilt weights."""

    def spoil(step: int, total: mx.array) -> mx.array:
        return total + mx.sqrt(mx.maximum(total * 0, 0)) if step == 11 else total

    with pytest.raises(InputError):
        run(tmp_path, CONFIG, spoil=spoil)


@pytest.mark.parametrize(
    ("steps", "warmup"), [(100, 0.1), (1000, 0.05), (6, 0.1), (1, 0.1), (10, 0.0), (10, 1.0)]
)
def test_learning_rate(steps: int, warmup: float) -> None:
    """Linear to the peak, then half a cosine to zero."""
    rate = schedule(TrainingConfig(steps=steps, learning_rate=2.0, warmup=warmup))
    found = [rate(mx.array(step)).item() for step in range(steps)]
    rise = max(1, round(warmup * steps))
    fall = max(1, steps - rise)
    expected = [
        2.0 * (step + 1) / rise if step < rise else 1.0 + math.cos(math.pi * (step - rise) / fall)
        for step in range(steps)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert max(found) == 2.0
    assert found[rise - 1] == 2.0
    assert all(0 <= value <= 2 for value in found)
    if steps > rise + 1:
        assert 0 < found[-1] < found[rise]


def test_long_gradients_are_scaled_down(tmp_path: Path) -> None:
    """AdamW forgets a constant factor, so the moments are what tells."""
    network = Small()
    config = TrainingConfig(steps=1, max_grad_norm=0.5)
    loss: Any = lambda batch: (1e4 * network(batch[0]).sum(), mx.array(1.0))  # noqa: E731
    list(train(network, loss, batch_at, dict, config, tmp_path))
    state = mx.load(str(checkpoints(tmp_path)[0] / "optimizer.safetensors"))
    assert isinstance(state, dict)
    moments = [x for name, x in state.items() if name.endswith(".m")]
    norm = math.sqrt(  # the first moment is a tenth of the gradient
        sum(mx.square(x).sum().item() for x in moments)
    )
    assert norm == pytest.approx(0.1 * 0.5, rel=1e-3)


@pytest.mark.parametrize("output", ["/", ".", ".."])
def test_a_folder_that_is_there_is_no_output(output: str) -> None:
    with pytest.raises(InputError, match="exists; name another"):
        check_output(Path(output), resume=False)
