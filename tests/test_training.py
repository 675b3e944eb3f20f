"""Training: the same bits whatever happens in between, and nothing lost when something fails."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

import mlx_distill
from mlx_distill import InputError, benchmark, train_drafter
from mlx_distill.checkpoint import bundled
from mlx_distill.data.batches import frequent_tokens, padded_batch, shuffled_rows
from mlx_distill.data.responses import Response, ResponseConfig, read_responses, write_responses
from mlx_distill.drafters.registry import fingerprint
from mlx_distill.target.target import Target
from mlx_distill.train_drafter import DrafterTrainer, DrafterTraining
from mlx_distill.training.checkpoints import checkpoints, save
from mlx_distill.training.config import TrainingConfig, schedule
from mlx_distill.training.loop import train

TINY = [
    *("--exit-dim", "32", "--draft-vocab-size", "256", "--unroll", "3", "--batch-size", "2"),
    *("--max-tokens", "8", "--held-out", "2", "--steps", "6", "--checkpoint-every", "2"),
    *("--max-prompts", "6", "--prompt-tokens", "6", "--response-batch-size", "2", "--quiet"),
    *("--evaluate-every", "3", "--seed", "4"),
]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return mlx_distill.load(bundled("stories-14m"))


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


# ------------------------------------------------------------------------------------ the drafter


def arguments(output: Path) -> list[str]:
    return ["--data", str(benchmark.PROMPTS), "--output", str(output), *TINY]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a drafter whose training was never stopped."""
    output = tmp_path_factory.mktemp("finished") / "drafter"
    assert train_drafter.main(arguments(output)) == 0
    return output


def killed_when(command: list[str], ready: Callable[[], bool]) -> None:
    """Start a command and kill it without notice as soon as something has happened."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_killed_training_resumes_with_the_same_bits(tmp_path: Path, finished: Path) -> None:
    """Twice: while the target writes, and after the first checkpoint; on to the same file."""
    output = tmp_path / "drafter"
    command = [sys.executable, "-m", "mlx_distill.train_drafter", *arguments(output)]
    responses = tmp_path / "drafter.responses.jsonl"
    killed_when(command, lambda: responses.exists() and responses.stat().st_size > 0)
    assert not output.exists()
    work = tmp_path / "drafter.partial"
    killed_when([*command, "--resume"], lambda: (work / "step-0000002").exists())
    assert not output.exists()
    assert train_drafter.main([*arguments(output), "--resume"]) == 0
    assert not work.exists()
    for name in ("model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (finished / name).read_bytes()
    log = json.loads((output / "training.json").read_text())["log"]
    assert log == json.loads((finished / "training.json").read_text())["log"]
    assert [row["step"] for row in log] == [3, 6]
    others = finished.with_name("drafter.responses.jsonl")
    assert responses.read_bytes() == others.read_bytes()


def test_training_twice_gives_the_same_bits(tmp_path: Path, finished: Path) -> None:
    output = tmp_path / "again"
    mx.random.seed(99)
    assert train_drafter.main(arguments(output)) == 0
    found = (output / "model.safetensors").read_bytes()
    assert found == (finished / "model.safetensors").read_bytes()


def test_trained_drafter_loads_and_generates(pair: tuple[Any, Any], finished: Path) -> None:
    drafter = mlx_distill.load_drafter(finished, *pair)
    assert drafter.config.exit_dim == 32
    assert drafter.config.draft_vocab_size == 256
    expected = mlx_distill.generate(*pair, "Once upon a time", max_tokens=20)
    found = mlx_distill.generate(*pair, "Once upon a time", drafter=drafter, max_tokens=20)
    assert found == expected
    weights = mx.load(str(finished / "model.safetensors"))
    assert isinstance(weights, dict)
    ids = weights["token_ids"].tolist()
    assert ids == sorted(set(ids))
    assert len(ids) == 256
    assert max(ids) < 4096
    assert all(x.dtype in (mx.float16, mx.int32) for x in weights.values())


def test_target_is_bit_identical_after_training(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    before = bits(model)
    trainable = [name for name, _ in tree_flatten(model.trainable_parameters())]
    prompts = [tokenizer.encode(text) for text in ("Once upon", "Ben had a", "The dog", "A cat")]
    config = DrafterTraining(
        exit_dim=32,
        draft_vocab_size=128,
        unroll=2,
        batch_size=2,
        held_out=1,
        responses=ResponseConfig(max_tokens=6),
        training=TrainingConfig(steps=3),
    )
    target = Target.of(model)
    path = tmp_path / "responses.jsonl"
    list(write_responses(path, model, {2}, prompts, config.responses, fingerprint(target)))
    trainer = DrafterTrainer(target, read_responses(path), config)
    start = bits(trainer.network)
    log = trainer.run(tmp_path / "work", quiet=True)
    assert bits(model) == before
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == trainable
    moved = {name for name, value in bits(trainer.network).items() if value != start[name]}
    assert moved == set(start) - {"token_ids"}
    assert log[-1]["step"] == 3
    assert all(0 <= x <= 1 for x in log[-1]["acceptance_greedy"] + log[-1]["acceptance_sampled"])


def test_tiny_task_is_overfitted(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """Trained on one answer and judged on the same, the drafter knows it by heart."""
    model, tokenizer = pair
    target = Target.of(model)
    prompt = tokenizer.encode("Once upon a time")
    path = tmp_path / "responses.jsonl"
    config = DrafterTraining(
        exit_dim=64,
        draft_vocab_size=256,
        unroll=3,
        batch_size=1,
        held_out=1,
        responses=ResponseConfig(max_tokens=24, temperatures=(0.0,)),
        training=TrainingConfig(steps=60, learning_rate=3e-3, evaluate_every=60),
    )
    list(write_responses(path, model, {2}, [prompt] * 2, config.responses, fingerprint(target)))
    trainer = DrafterTrainer(target, read_responses(path), config)
    before = trainer.evaluate()["acceptance_greedy"]
    after = trainer.run(tmp_path / "work", quiet=True)[-1]["acceptance_greedy"]
    assert max(before) < 0.3
    assert min(after) > 0.85


# ---------------------------------------------------------------------------------- the responses


ANSWERS = ResponseConfig(max_tokens=5, temperatures=(0.0, 1.0), response_batch_size=2)
KNOWN = {"hidden_size": 384, "vocab_size": 4096, "tokenizer_hash": "1"}


@pytest.fixture(scope="module")
def prompts(pair: tuple[Any, Any]) -> list[list[int]]:
    texts = ("Once upon a time", "Ben had", "The old baker", "A dog", "One day Lily")
    return [pair[1].encode(text) for text in texts]


def answer(
    path: Path, pair: tuple[Any, Any], prompts: list[list[int]], config: Any = ANSWERS
) -> Iterator[int]:
    return write_responses(path, pair[0], {2}, prompts, config, KNOWN)


@pytest.fixture(scope="module")
def whole_file(
    pair: tuple[Any, Any], prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    path = tmp_path_factory.mktemp("responses") / "answers.jsonl"
    assert list(answer(path, pair, prompts)) == [2, 4, 5]
    return path.read_bytes()


def test_responses_are_the_targets_own(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole_file)
    responses = read_responses(path)
    assert [response.prompt for response in responses] == prompts
    for response in responses[:2]:  # the first batch is greedy
        found = mlx_distill.stream_generate(*pair, response.prompt, max_tokens=5)
        assert response.response == [r.token for r in found]
    header = json.loads(whole_file.splitlines()[0])
    assert header["target"] == KNOWN
    assert header["config"]["temperatures"] == [0.0, 1.0]


def places_to_cut(content: bytes) -> list[int]:
    """Return byte positions behind the header: random ones, and those around the ends of lines."""
    header = content.index(b"\n") + 1
    ends = [match.end() for match in re.finditer(b"\n", content)]
    near = [end + step for end in ends for step in (-1, 0, 1) if end + step >= header]
    random = np.random.default_rng(8).integers(header, len(content), 12).tolist()
    return sorted({place for place in near + random if place <= len(content)})


def test_responses_go_on_wherever_the_file_was_cut(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    wrong = []
    for place in places_to_cut(whole_file):
        path = tmp_path / f"{place}.jsonl"
        path.write_bytes(whole_file[:place])
        list(answer(path, pair, prompts))
        if path.read_bytes() != whole_file:
            wrong.append(place)
    assert not wrong, f"cut at {wrong} of {len(whole_file)} bytes"


def test_responses_begin_again_where_the_header_was_cut(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    """A kill in the first write leaves a part of the header, and no answer that could be lost."""
    header = whole_file.index(b"\n") + 1
    for place in (0, 1, header // 2, header - 1):
        path = tmp_path / f"{place}.jsonl"
        path.write_bytes(whole_file[:place])
        list(answer(path, pair, prompts))
        assert path.read_bytes() == whole_file, place


def test_more_prompts_continue_the_file(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    list(answer(path, pair, prompts[:3]))
    assert len(read_responses(path)) == 3
    list(answer(path, pair, prompts))
    assert path.read_bytes() == whole_file
    assert list(answer(path, pair, prompts[:3])) == []
    assert path.read_bytes() == whole_file


@pytest.mark.parametrize(
    ("known", "config"),
    [
        (KNOWN | {"tokenizer_hash": "2"}, ANSWERS),
        (KNOWN | {"hidden_size": 64}, ANSWERS),
        (KNOWN, ResponseConfig(max_tokens=6, temperatures=(0.0, 1.0), response_batch_size=2)),
        (KNOWN, ResponseConfig(max_tokens=5, temperatures=(0.0,), response_batch_size=2)),
    ],
)
def test_responses_of_another_target_are_refused(
    pair: tuple[Any, Any],
    prompts: list[list[int]],
    whole_file: bytes,
    tmp_path: Path,
    known: dict[str, Any],
    config: ResponseConfig,
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole_file)
    with pytest.raises(InputError, match="written by another target or with other settings"):
        list(write_responses(path, pair[0], {2}, prompts, config, known))
    assert path.read_bytes() == whole_file


def test_responses_to_other_prompts_are_not_used(
    pair: tuple[Any, Any], prompts: list[list[int]], whole_file: bytes, tmp_path: Path
) -> None:
    """The file holds answers to these prompts afterwards, or the call says that it cannot."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole_file)
    others = prompts[::-1]
    try:
        list(answer(path, pair, others))
    except InputError:
        assert path.read_bytes() == whole_file
    else:
        assert [response.prompt for response in read_responses(path)] == others


def test_damaged_rows_are_named(whole_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = whole_file.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"prompt": [1], "resp\n', *lines[3:]]))
    with pytest.raises(InputError, match=r"answers.jsonl, line 3: not JSON"):
        read_responses(path)
    path.write_bytes(b"".join([*lines[:2], b'{"prompt": [1]}\n', *lines[3:]]))
    with pytest.raises(
        InputError, match=r"answers.jsonl, line 3: expected a prompt and a response"
    ):
        read_responses(path)


# ------------------------------------------------------------------------------------ the batches


def test_every_row_is_used_once_per_epoch() -> None:
    rows = [shuffled_rows(10, 4, step, seed=3) for step in range(10)]
    assert all(len(row) == 4 for row in rows)
    stream = np.concatenate(rows)
    for epoch in range(4):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()
    np.testing.assert_array_equal(rows[3], shuffled_rows(10, 4, 3, seed=3))
    assert not np.array_equal(rows[3], shuffled_rows(10, 4, 3, seed=4))


def test_batch_larger_than_the_data_takes_several_epochs() -> None:
    rows = shuffled_rows(3, 8, 1, seed=0)
    assert len(rows) == 8
    assert set(rows.tolist()) == {0, 1, 2}


def test_texts_are_padded_and_cut() -> None:
    responses = [Response([1, 5], [6, 7, 8]), Response([1], [9])]
    texts, prompts, lengths = padded_batch(responses, 4)
    assert texts.tolist() == [[1, 5, 6, 7], [1, 9, 0, 0]]
    assert prompts.tolist() == [2, 1]
    assert lengths.tolist() == [4, 2]


def test_most_frequent_tokens_of_the_answers() -> None:
    responses = [Response([9, 9, 9], [5, 5, 2]), Response([9], [5, 7, 2])]
    assert frequent_tokens(responses, 2, 10) == [2, 5]
    assert frequent_tokens(responses, 3, 10) == [2, 5, 7]
    assert frequent_tokens(responses, 5, 10) == [0, 1, 2, 5, 7]
