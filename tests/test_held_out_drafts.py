"""What held-out answers say of a drafter: how far they reach, and which weights are the best."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import ModelIn
from damage import Run
from mlx import nn
from mlx.utils import tree_flatten

import mlx_distill
from mlx_distill import InputError, train_drafter
from mlx_distill.data.selection import held_out_rows
from mlx_distill.distillation.answer_files import WrittenAnswers, save_answers
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.drafter_plan import plan
from mlx_distill.distillation.drafter_trainer import DrafterTrainer, chain_score
from mlx_distill.distillation.responses import Response
from mlx_distill.target.target import Target
from mlx_distill.training.best import Best
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.masters import Masters

STEPS = {"steps": 12, "checkpoint_every": 3, "evaluate_every": 3, "learning_rate": 1e-2}


def config(kind: str = "recurrent", **training: Any) -> DrafterTraining:
    """Return what trains a tiny drafter of three tokens."""
    return DrafterTraining(
        drafter_kind=kind,
        exit_dim=32 if kind == "recurrent" else None,
        draft_vocab_size=64,
        unroll=3,
        batch_size=2,
        held_out=2,
        starts=8,
        training=TrainingConfig(**{**STEPS, **training}),
    )


@pytest.fixture(scope="module")
def pair(model_in: ModelIn) -> tuple[Any, Any]:
    return mlx_distill.load(model_in("tiny", "float32"))


def answers(held_out: int = 12) -> WrittenAnswers:
    """Return answers of twelve tokens, but for those that the seed 0 holds out."""
    random, short = np.random.default_rng(0), held_out_rows([True] * 6, 2, 0)
    lengths = [held_out if row in short else 12 for row in range(6)]
    rows = [Response([1, 5, 6], random.integers(3, 40, length).tolist()) for length in lengths]
    return WrittenAnswers(rows, [True] * 6, [])


def trainer(pair: tuple[Any, Any], given: WrittenAnswers, made: DrafterTraining) -> DrafterTrainer:
    return DrafterTrainer(Target.of(pair[0]), given.responses, made, kinds=given.greedy)


def made_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "training.json").read_text())


def test_a_chain_is_scored_by_its_expected_length() -> None:
    """A token counts if those before it were right, too."""
    found = {"acceptance_greedy": [0.5, 0.25, 1.0], "acceptance_sampled": [0.1, 0.1, 0.1]}
    assert chain_score(found) == -(0.5 + 0.125 + 0.125)
    assert chain_score({"acceptance_greedy": [0.0]}) == 0
    assert chain_score({"acceptance_greedy": []}) is None


def test_an_equal_evaluation_is_no_better(tmp_path: Path) -> None:
    """Though a score is kept with fewer digits than it has."""
    masters = Masters(nn.Linear(1, 1))
    for score in (-1.1, -0.3, 1 / 3, 2 / 3):
        best = Best(tmp_path, TrainingConfig(patience=2), lambda _, score=score: score)
        for step in (1, 2, 3):
            best.see(step, {}, masters)
        assert best.enough, score
        assert best.state["step"].item() == 1


# ------------------------------------------------------------------- the best weights, and patience


def bits(network: nn.Module) -> dict[str, bytes]:
    arrays: dict[str, Any] = dict(tree_flatten(network.parameters()))
    return {name: np.array(x.view(mx.uint8)).tobytes() for name, x in arrays.items()}


def falling(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> list[dict[str, bytes]]:
    """Let evaluations find acceptances by their number; return the weights that each judged."""
    judged: list[dict[str, bytes]] = []

    def evaluate(one: DrafterTrainer) -> dict[str, list[float]]:
        judged.append(bits(one.network))
        found = [scores[len(judged)], 0.5, 0.5]
        return {"acceptance_greedy": found, "acceptance_sampled": found}

    monkeypatch.setattr(DrafterTrainer, "evaluate", evaluate)
    return judged


@pytest.mark.parametrize("kind", ["recurrent", "medusa"])
def test_the_best_weights_are_kept(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The log is whole; what is fitted and what the card says is of the weights that were kept."""
    judged = falling(monkeypatch, {1: 0.2, 2: 0.6, 3: 0.3, 4: 0.6})
    output = tmp_path / "drafter"
    made = config(kind, keep_best=True)
    mlx_distill.train_drafter(*pair, answers(), output, made, quiet=True)
    written = mx.load(str(output / "model.safetensors"))
    assert isinstance(written, dict)
    found = {name: np.array(x.view(mx.uint8)).tobytes() for name, x in written.items()}
    assert found == {name: judged[1][name] for name in found}
    assert judged[1] != judged[3]
    log = made_of(output)["log"]
    assert [row["step"] for row in log] == [3, 6, 9, 12]
    assert ["calibration_error" in row for row in log] == [False, True, False, False]
    assert made_of(output)["kept_step"] == 6
    card = (output / "README.md").read_text()
    assert "12 steps of at most 8 drafts" in card
    assert "The weights are those of step 6, the best on held-out answers." in card
    assert "| 1 | 0.600 | 0.600 |" in card


def test_patience_ends_a_training(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without keeping the best, the weights are the last ones."""
    judged = falling(monkeypatch, {1: 0.2, 2: 0.1, 3: 0.2})
    output = tmp_path / "drafter"
    mlx_distill.train_drafter(*pair, answers(), output, config(patience=2), quiet=True)
    assert len(judged) == 3
    assert [row["step"] for row in made_of(output)["log"]] == [3, 6, 9]
    assert made_of(output)["kept_step"] == 9
    assert "The weights are those of step" not in (output / "README.md").read_text()


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_resumed_training_keeps_the_same_weights(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed behind some evaluations, their checkpoints not yet written."""
    made = config(keep_best=True, patience=2)
    mlx_distill.train_drafter(*pair, answers(), tmp_path / "whole", made, quiet=True)
    evaluate, asked = DrafterTrainer.evaluate, []

    def killed(one: DrafterTrainer) -> dict[str, list[float]]:
        asked.append(1)
        if len(asked) > after:
            raise Killed
        return evaluate(one)

    output = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(DrafterTrainer, "evaluate", killed)
        with pytest.raises(Killed):
            mlx_distill.train_drafter(*pair, answers(), output, made, quiet=True)
    mlx_distill.train_drafter(*pair, answers(), output, made, resume=True, quiet=True)
    for name in ("model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name in ("log", "kept_step"):
        assert made_of(output)[name] == made_of(tmp_path / "whole")[name]


# ------------------------------------------------------------------ answers that are short, or end


@pytest.mark.parametrize(("length", "depth"), [(1, 0), (2, 1), (3, 2), (4, 3), (12, 3)])
def test_acceptance_is_known_as_far_as_held_out_answers_reach(
    pair: tuple[Any, Any], length: int, depth: int
) -> None:
    found = trainer(pair, answers(length), config())
    assert found.judged_depth == depth
    assert {name: len(shares) for name, shares in found.evaluate().items()} == {
        "acceptance_greedy": depth,
        "acceptance_sampled": depth,
    }
    told = plan(found)
    assert ("no held-out answer has two tokens: nothing judges the drafter" in told) == (not depth)
    beyond = f"no held-out answer reaches beyond the first {depth} of 3 drafted tokens"
    assert (beyond in told) == (0 < depth < 3)


@pytest.mark.parametrize("kind", ["recurrent", "medusa"])
def test_what_nothing_judges_has_no_figures(
    pair: tuple[Any, Any], tmp_path: Path, kind: str
) -> None:
    for length in (1, 2):
        output = tmp_path / str(length)
        mlx_distill.train_drafter(*pair, answers(length), output, config(kind), quiet=True)
        log, card = made_of(output)["log"], (output / "README.md").read_text()
        assert [row["step"] for row in log] == [3, 6, 9, 12]
        assert all(len(row["acceptance_greedy"]) == length - 1 for row in log)
        assert ("Acceptance was not measured: the 2 held-out answers" in card) == (length == 1)
        assert card.count("\n| ") == (0 if length == 1 else 2)
        assert ("Deeper than 1 no held-out answer reaches." in card) == (length == 2)
        drafter: Any = mlx_distill.load_drafter(output, *pair)
        assert not getattr(drafter.config, "hit_rates", ())  # of the second head nothing is known


@pytest.mark.parametrize("training", [{"patience": 2}, {"keep_best": True}])
def test_the_best_cannot_be_found_by_answers_of_one_token(
    pair: tuple[Any, Any], tmp_path: Path, training: dict[str, Any]
) -> None:
    """It is said before anything is trained, and nothing is left."""
    with pytest.raises(InputError, match="patience and keep_best need held-out answers of two"):
        mlx_distill.train_drafter(
            *pair, answers(1), tmp_path / "drafter", config(**training), quiet=True
        )
    assert not list(tmp_path.iterdir())


def test_the_command_knows_the_best(model_in: ModelIn, tmp_path: Path, refused: Run) -> None:
    flags = ["--model", str(model_in("tiny", "float32")), "--exit-dim", "32", "--starts", "8"]
    flags += ["--draft-vocab-size", "64", "--unroll", "3", "--held-out", "2", "--steps", "4"]
    flags += ["--evaluate-every", "1", "--keep-best", "--patience", "2", "--quiet"]
    for length in (1, 12):
        save_answers(tmp_path / f"{length}.npz", answers(length), {2})
    output = str(tmp_path / "drafter")
    flags += ["--output", output]
    sentence = refused(train_drafter.main, *flags, "--answers", tmp_path / "1.npz", alone=False)
    assert "by which to judge; hold out others, with a larger held_out or another seed" in sentence
    assert train_drafter.main([*flags, "--answers", str(tmp_path / "12.npz")]) == 0
    assert made_of(Path(output))["kept_step"] in (1, 2, 3, 4)
