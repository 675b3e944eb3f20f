"""What a stopped training of a drafter goes on with: the same answers, weights and start alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import ModelIn
from damage import Run
from mlx.utils import tree_map

import mlx_distill
from mlx_distill import InputError, train_drafter
from mlx_distill.distillation import drafter_training
from mlx_distill.distillation.answer_files import WrittenAnswers, save_answers
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.responses import Response, ResponseConfig, responses_hash
from mlx_distill.drafters.networks import network_of
from mlx_distill.target.target import Target
from mlx_distill.training.config import TrainingConfig

CONFIG = DrafterTraining(
    exit_dim=32,
    draft_vocab_size=64,
    unroll=2,
    batch_size=2,
    held_out=1,
    starts=8,
    responses=ResponseConfig(max_tokens=5),
    training=TrainingConfig(steps=4, checkpoint_every=2, evaluate_every=2),
)
FLAGS = "--exit-dim 32 --draft-vocab-size 64 --unroll 2 --batch-size 2 --held-out 1 --starts 8"
FLAGS += " --steps 4 --checkpoint-every 2 --evaluate-every 2 --quiet"


class Killed(Exception):
    pass


def killed(*_: Any) -> None:
    raise Killed


@pytest.fixture(scope="module")
def pair(model_in: ModelIn) -> tuple[Any, Any]:
    return mlx_distill.load(model_in("tiny", "float32"))


def answers(seed: int = 0) -> WrittenAnswers:
    random = np.random.default_rng(seed)
    rows = [Response([1, 5, 6], random.integers(3, 4096, 7).tolist()) for _ in range(6)]
    return WrittenAnswers(rows, [True, False] * 3, [])


def stopped(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> None:
    """Train to the last checkpoint, and be killed before the drafter is written."""
    with monkeypatch.context() as patch:
        patch.setattr(drafter_training, "_write", killed)
        with pytest.raises(Killed):
            mlx_distill.train_drafter(*arguments, quiet=True, **options)


def test_the_hash_of_answers_knows_where_each_ends() -> None:
    rows = [Response([1, 2], [3]), Response([1], [2, 3])]
    others = [[rows[0]], [rows[1]], rows, rows[::-1]]
    found = [responses_hash(one) for one in others]
    found += [responses_hash(rows, [True, False]), responses_hash(rows, [False, True])]
    assert len(set(found)) == 6


def test_other_answers_are_not_gone_on_with(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are given, those of which others are greedy, and those of other prompts."""
    output, given = tmp_path / "drafter", answers()
    stopped(monkeypatch, *pair, given, output, CONFIG)
    work = tmp_path / "drafter.partial"
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    swapped = WrittenAnswers(given.responses, given.greedy[::-1], [])
    texts = [[1, 5, number] for number in range(6)]
    for other in (answers(1), swapped, texts):
        with pytest.raises(InputError, match="cannot resume with other settings: answers was"):
            mlx_distill.train_drafter(*pair, other, output, CONFIG, resume=True, quiet=True)
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    mlx_distill.train_drafter(*pair, given, output, CONFIG, resume=True, quiet=True)
    assert json.loads((output / "training.json").read_text())["answers"]


def test_answers_that_are_written_again_are_the_same(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[1, 5, number] for number in range(6)]
    output, kept = tmp_path / "drafter", tmp_path / "drafter.responses.jsonl"
    stopped(monkeypatch, *pair, prompts, output, CONFIG)
    kept.unlink()
    other = [*prompts[1:], [1, 7]]
    with pytest.raises(InputError, match="cannot resume with other settings: answers was"):
        mlx_distill.train_drafter(*pair, other, output, CONFIG, resume=True, quiet=True)
    kept.unlink()
    mlx_distill.train_drafter(*pair, prompts, output, CONFIG, resume=True, quiet=True)
    assert output.is_dir()


def test_a_run_that_says_nothing_of_its_answers_is_refused(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older version left it; where nothing was learned yet, any answers will do."""
    output = tmp_path / "drafter"
    stopped(monkeypatch, *pair, answers(), output, CONFIG)
    path = tmp_path / "drafter.partial" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["answers"]
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="other settings: answers was None, is "):
        mlx_distill.train_drafter(*pair, answers(), output, CONFIG, resume=True, quiet=True)
    for checkpoint in path.parent.glob("step-*"):
        shutil.rmtree(checkpoint)
    mlx_distill.train_drafter(*pair, answers(1), output, CONFIG, resume=True, quiet=True)


def test_other_weights_are_not_gone_on_with(
    pair: tuple[Any, Any],
    model_in: ModelIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the target, and of the drafter that is started from."""
    shape = CONFIG.network(Target.of(pair[0]))
    starts = []
    for seed in (1, 2):
        mx.random.seed(seed)
        starts.append(network_of(shape))
    output = tmp_path / "drafter"
    stopped(monkeypatch, *pair, answers(), output, CONFIG, start=starts[0])
    more = {"resume": True, "quiet": True}
    with pytest.raises(InputError, match=r"other settings: weights.start_from was \w+, is \w+$"):
        mlx_distill.train_drafter(*pair, answers(), output, CONFIG, start=starts[1], **more)
    other, _ = mlx_distill.load(model_in("tiny", "float32"))
    other.update(tree_map(lambda x: 2 * x, other.parameters()))
    with pytest.raises(InputError, match=r"other settings: weights.target was \w+, is \w+$"):
        mlx_distill.train_drafter(
            other, pair[1], answers(), output, CONFIG, start=starts[0], **more
        )
    mlx_distill.train_drafter(*pair, answers(), output, CONFIG, start=starts[0], **more)


def test_the_command_refuses_another_file_of_the_same_name(
    model_in: ModelIn, tmp_path: Path, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name / "answers.npz" for name in "ab"]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        save_answers(path, answers(seed), {2})
    output = tmp_path / "drafter"
    flags = ["--model", str(model_in("tiny", "float32")), *FLAGS.split(), "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(drafter_training, "_write", killed)
        with pytest.raises(Killed):
            train_drafter.main([*flags, "--answers", str(paths[0])])
    flags.append("--resume")
    sentence = refused(train_drafter.main, *flags, "--answers", paths[1], alone=False)
    assert "cannot resume with other settings: answers was" in sentence
    assert train_drafter.main([*flags, "--answers", str(paths[0])]) == 0
