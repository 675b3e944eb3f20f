"""``distill`` from its arguments to its last line: what it makes, and of whom."""

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from distilling import (
    FILES,
    TINY,
    Refuse,
    arguments,
    arrays_of,
    command,
    learn,
    log_of,
    main,
    same_result,
    without,
    write_rows,
)
from mlx import nn
from mlx.utils import tree_map

from mlx_distill import cli
from mlx_distill.checkpoint import load
from mlx_distill.data.corpus import Corpus
from mlx_distill.data.encoding import read_texts
from mlx_distill.data.report import Report
from mlx_distill.data.selection import fit
from mlx_distill.data.texts import Text
from mlx_distill.distillation.adapters import AdapterConfig
from mlx_distill.distillation.card import model_card
from mlx_distill.distillation.config import DistillConfig
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.evaluation.texts import evaluate
from mlx_distill.hashes import tokenizer_hash
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.journal import draw_curves

pytestmark = pytest.mark.usefixtures("no_hub", "no_curves")

# -------------------------------------------------------------------------------------- end to end


def test_student_of_flags(
    world: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {path.name: path.read_bytes() for path in (world / "teacher").iterdir()}
    output = learn(world, tmp_path / "deep" / "student")
    out, err = capsys.readouterr()
    for when in ("before", "after"):
        assert re.search(rf"  {when}: nats \d.*, kl \d.*, agreement 0\.\d+, perplexity \d", out)
    assert re.search(r"memory: about \d.* \(teachers .* student .* a batch of 3 x \d+ tokens", err)
    assert {path.name for path in output.iterdir()} >= FILES
    assert {path.name for path in output.parent.iterdir()} == {"student"}
    assert {path.name: path.read_bytes() for path in (world / "teacher").iterdir()} == teacher
    model, again = mlx_lm.load(str(output))[:2]
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert model.args.hidden_size == 32
    count = sum(x.size for x in arrays_of(output).values())
    assert f"{count:,} parameters" in out
    log = log_of(output)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in log if "held_out" in row] == [3, 6]
    assert all(row["loss"] == row["forward_kl"] for row in log)
    run = json.loads((output / "training.json").read_text())
    assert run["held_out"]["after"] == log[-1]["held_out"]
    assert run["held_out"]["before"]["kl"] > 1.1 * log[-1]["held_out"]["kl"]
    assert run["texts"] == {
        **{"rows": 12, "kept": 12, "dropped": {}, "changed": {}},
        "held_out": {"rows": 3, "kept": 3, "dropped": {}, "changed": {}},
        "learned_tokens": 149,
    }
    assert run["seed"] == 4
    assert {"python", "mlx", "mlx-lm", "mlx-distill"} <= set(run["versions"])
    assert run["config"]["training"]["steps"] == 6
    card = (output / "README.md").read_text()
    for part in (
        f"{count:,} parameters",
        "Teacher: teacher",
        "forward_kl",
        "Data: texts: 12 texts of 12 rows",
    ):
        assert part in card
    assert f" | {log[-1]['held_out']['kl']:.4f} |" in card


def test_training_that_ended_early(
    world: Path, tmp_path: Path, no_curves: None, finished: Path
) -> None:
    """The card says how long it was trained, and whose weights it has."""
    flags = ["--evaluate-every", "2", "--patience", "2", "--keep-best", "--steps", "4000"]
    output = learn(world, tmp_path / "student", *flags, "--learning-rate", "0.5")
    log, run = log_of(output), json.loads((output / "training.json").read_text())
    judged = {row["step"]: row["held_out"]["kl"] for row in log if "held_out" in row}
    best, last = min(judged, key=lambda step: judged[step]), log[-1]["step"]
    assert best == last - 4 < 3996
    card = (output / "README.md").read_text()
    said = f"Training: {last:,} steps of 3 texts (of 4,000); the weights are those of step {best:,}"
    assert f"{said}, the best\n" in card
    assert (run["steps"], run["weights_of_step"]) == (last, best)
    assert "Training: 6 steps of 3 texts\n" in (finished / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "2 steps of 3 texts\n"),  # it said 8, of which there are 3
        (
            {"batch_size": 2, "training": TrainingConfig(2, accumulate=4)},
            "of 4 batches of 2 texts\n",
        ),
        ({"pack": True, "batch_size": 1}, "2 steps of 1 rows of packed texts\n"),
        (
            {"rollouts": OnPolicyConfig(0.004)},  # it said 0% of them
            "3 texts; each batch was written by the student with a chance of 0.004\n",
        ),
    ],
)
def test_the_card_says_what_a_step_was(more: dict[str, Any], said: str) -> None:
    kinds = {"training": TrainingConfig(2), **more}
    config = DistillConfig(teacher=("t",), student="s", data=("d",), **kinds)
    texts = [Text([1, 2, 3]), Text([1, 2]), Text([4, 5])]
    corpus = Corpus(texts, texts[:1], Report(rows=3, kept=3), Report(rows=1, kept=1))
    figures = {"before": {"kl": 2.0}, "after": {"kl": 1.0}}
    note = "of 3 texts are not used: 1 no room for an answer within 8 tokens"
    card = model_card("s", config, corpus, [{"step": 2}], figures, 1, notes=[note])
    assert said in card
    assert f"\n* Note: {note}\n" in card


def test_log_as_a_table(finished: Path) -> None:
    log = log_of(finished)
    with (finished / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ["step", "loss", "count", "learning_rate", "forward_kl"]
    held_out = ["held_out_nats", "held_out_kl", "held_out_agreement", "held_out_perplexity"]
    assert list(rows[0]) == [*columns, *held_out]
    assert [int(row["step"]) for row in rows] == [row["step"] for row in log]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in log]
    assert rows[0]["held_out_kl"] == ""
    assert float(rows[5]["held_out_kl"]) == log[5]["held_out"]["kl"]


def test_student_learns_from_layers_of_the_bundled_teacher(
    world: Path, bundled_part: Path, tmp_path: Path
) -> None:
    argv = [
        *arguments(world, tmp_path / "student", "--teacher", bundled_part),
        *("--steps", "12", "--evaluate-every", "4", "--checkpoint-every", "12"),
        *("--loss", "forward_kl:weight=0.9", "hard:weight=0.1"),
    ]
    assert main(argv) == 0
    log = log_of(tmp_path / "student")
    kl = [row["held_out"]["kl"] for row in log if "held_out" in row]
    assert kl[-1] < 0.8 * log[0]["forward_kl"]
    assert kl == sorted(kl, reverse=True)


def test_command_is_a_verb_too_and_shows_progress_and_curves(
    world: Path,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mlx_distill.distillation.run.draw_curves", draw_curves)
    argv = arguments(world, tmp_path / "student")
    argv.remove("--quiet")
    assert cli.main(["distill", *argv]) == 0
    err = capsys.readouterr().err
    assert "6/6" in err
    assert re.search(r"forward_kl \d\.\d{3}", err)
    assert re.search(r"held out: nats \d\.\d{3} kl \d", err)
    assert same_result(tmp_path / "student", finished)
    picture = (tmp_path / "student" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1800, 480)


def test_module_is_the_function_too() -> None:
    import mlx_distill

    with pytest.raises(mlx_distill.InputError, match="there are no texts"):
        command(nn.Linear(1, 1), None, [], folder="unused-folder")


# --------------------------------------------------------------------------------------- students


SLOWLY = ["--learning-rate", "1e-6", "--steps", "2"]


def test_student_of_the_teachers_layers(world: Path, tmp_path: Path) -> None:
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    assert main([*argv, "--student-layers", "0", "2", *SLOWLY]) == 0
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    theirs, ours = arrays_of(world / "teacher"), arrays_of(tmp_path / "student")
    for name, x in ours.items():
        source = name.replace("layers.1.", "layers.2.")
        np.testing.assert_allclose(x.astype(mx.float32), theirs[source], atol=2e-3, err_msg=name)


def test_student_that_exists_already(world: Path, tmp_path: Path) -> None:
    argv = without(arguments(world, tmp_path / "student"), "--student-config")
    assert main([*argv, "--student", str(world / "student"), *SLOWLY]) == 0
    theirs, ours = arrays_of(world / "student"), arrays_of(tmp_path / "student")
    assert set(theirs) == set(ours)
    for name, x in ours.items():
        np.testing.assert_allclose(x.astype(mx.float32), theirs[name], atol=2e-3, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters(world: Path, tmp_path: Path, kind: str) -> None:
    """The seed decides their first weights, whatever ran before; the base is what it was."""
    base = ["--student", str(world / "student"), "--fine-tune", kind, "--lora-rank", "2"]
    base += ["--steps", "2"]
    for name in ("first", "second"):
        mx.random.seed(len(name))
        argv = without(arguments(world, tmp_path / name), "--student-config")
        assert main([*argv, *base, "--export-dtype", "float32"]) == 0
    assert same_result(tmp_path / "first", tmp_path / "second")
    before, after = arrays_of(world / "student"), arrays_of(tmp_path / "first")
    assert {name: x.shape for name, x in after.items()} == {n: x.shape for n, x in before.items()}
    kept = {name for name, x in after.items() if mx.array_equal(x, before[name]).item()}
    assert {name for name in before if "_proj" not in name} <= kept
    assert not any("_proj" in name for name in kept)
    count = sum(x.size for x in before.values())
    assert f"{count:,} parameters" in (tmp_path / "first" / "README.md").read_text()


def test_activations_computed_twice(world: Path, tmp_path: Path, finished: Path) -> None:
    more = ["--grad-checkpoint", "--on-policy", "0"]
    output = learn(world, tmp_path / "student", *more)
    for ours, theirs in zip(log_of(output), log_of(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for name, x in arrays_of(finished).items():
        np.testing.assert_allclose(arrays_of(output)[name], x, atol=5e-3, err_msg=name)


def test_student_learns_from_its_own_texts(world: Path, tmp_path: Path) -> None:
    """The same each time; with activations computed twice, its first texts are the same ones."""
    sets = ["--rollout-every", "3", "--rollout-texts", "4", "--rollout-max-tokens", "5"]
    sets += ["--on-policy", "0.7"]
    output = learn(world, tmp_path / "student", *sets)
    assert same_result(output, learn(world, tmp_path / "again", *sets))
    twice = learn(world, tmp_path / "twice", *sets, "--grad-checkpoint")
    losses, others = ([row["loss"] for row in log_of(one)] for one in (output, twice))
    assert all(math.isfinite(loss) for loss in losses + others)
    assert others[:3] == pytest.approx(losses[:3], rel=1e-4)


def test_quantised_teacher_and_export(world: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.json").write_text(json.dumps(TINY | {"hidden_size": 64}))
    more = ["--teacher-bits", "8", "--export-bits", "4", "--steps", "2"]
    output = learn(world, tmp_path / "student", *more, "--student-config", tmp_path / "wide.json")
    config = json.loads((output / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    model, tokenizer = mlx_lm.load(str(output))[:2]
    assert isinstance(model.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    figures = json.loads((output / "training.json").read_text())["held_out"]
    assert list(figures) == ["before", "trained", "after"]
    assert "| | before | trained | after |" in (output / "README.md").read_text()
    valid, _ = fit(read_texts(world / "texts" / "valid.jsonl", tokenizer), 512)
    expected = evaluate({"student": model}, valid)["student"]
    nats = expected["nats"].sum() / expected["tokens"].sum()
    assert figures["after"]["nats"] == pytest.approx(nats, rel=1e-3)
    assert figures["trained"]["nats"] != figures["after"]["nats"]


def test_several_teachers(world: Path, tmp_path: Path, finished: Path) -> None:
    both = ["--teacher", world / "teacher", world / "second", "--steps", "1"]
    mean = learn(world, tmp_path / "mean", *both)
    assert log_of(mean)[0]["loss"] != log_of(finished)[0]["loss"]
    logits = learn(world, tmp_path / "logits", *both, "--teacher-mean", "logits")
    assert log_of(logits)[0]["loss"] != log_of(mean)[0]["loss"]
    one = learn(world, tmp_path / "one", *both, "--teacher-weights", "1", "1e-9")
    assert log_of(one)[0]["loss"] == pytest.approx(log_of(finished)[0]["loss"], rel=1e-4)
    assert "Teacher: teacher, second" in (mean / "README.md").read_text()


def test_features_and_relations(world: Path, tmp_path: Path) -> None:
    losses = ["forward_kl", "hidden_mse:layers=0-2", "similarity_preserving:weight=10"]
    output = learn(world, tmp_path / "student", "--steps", "2", "--loss", *losses)
    row = log_of(output)[-1]
    parts = row["forward_kl"] + row["hidden_mse"] + 10 * row["similarity_preserving"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert not any("projection" in name for name in mx.load(str(output / "model.safetensors")))


# ------------------------------------------------------------------------------- another tokenizer


@pytest.mark.parametrize("teachers", [["bytes"], ["teacher", "bytes"], ["bytes", "teacher"]])
def test_other_tokenizer_names_both_ways_out(
    world: Path, tmp_path: Path, refuses: Refuse, teachers: list[str]
) -> None:
    argv = arguments(world, tmp_path / "student", "--student", world / "student")
    argv = without(argv, "--student-config")
    sentence = refuses([*argv, "--teacher", *(str(world / name) for name in teachers)])
    assert sentence == (
        "the teacher's tokenizer is not the student's, so their tokens cannot be compared one by "
        "one; compare sorted probabilities with --loss sorted_l1 (ULD), or learn from the "
        "teacher's text alone: --loss hard, on data that it wrote"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("losses", [["sorted_l1", "hard:weight=0.1"], ["hard"]])
def test_both_ways_out_of_another_tokenizer(world: Path, tmp_path: Path, losses: list[str]) -> None:
    argv = arguments(world, tmp_path / "student", "--teacher", world / "bytes", "--loss", *losses)
    argv = [*without(argv, "--student-config"), "--student", str(world / "student")]
    argv += ["--steps", "2"]
    assert main(argv) == 0
    log = log_of(tmp_path / "student")
    assert all(math.isfinite(row["loss"]) for row in log)
    assert set(log[-1]["held_out"]) == {"nats", "perplexity"}


def test_arguments_of_the_other_tokenizers_template(world: Path, tmp_path: Path) -> None:
    """The student's has no template: the teacher alone reads its questions through one."""
    teacher = shutil.copytree(world / "bytes", tmp_path / "teacher")
    template = "{{ who }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    (teacher / "chat_template.jinja").write_text(template)
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "Who?", "completion": " A dog."}] * 3)
    argv = arguments(world, tmp_path / "student", "--teacher", teacher, "--data", data)
    argv += ["--student", str(world / "student"), "--loss", "sorted_l1", "--steps", "1"]
    argv += ["--held-out", "1"]
    losses = []
    for who in ("Tom", "a cow that is called Moo"):
        config = json.dumps({"who": who})
        argv[argv.index("--output") + 1] = str(tmp_path / who[:3])
        assert main([*without(argv, "--student-config"), "--chat-template-config", config]) == 0
        losses.append(log_of(tmp_path / who[:3])[0]["loss"])
    assert losses[0] != losses[1]
    used = ["--config", str(tmp_path / "Tom" / "config.yaml"), "--output", str(tmp_path / "again")]
    assert main(used) == 0
    assert log_of(tmp_path / "again")[0]["loss"] == losses[0]


# --------------------------------------------------------------------------- what is in the folder


@pytest.fixture(scope="module")
def quantised(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a 4-bit student of two end tokens."""
    folder = tmp_path_factory.mktemp("packed")
    wide = folder / "wide.json"
    wide.write_text(json.dumps(TINY | {"hidden_size": 64, "intermediate_size": 64}))
    more = ["--export-bits", "4", "--steps", "1", "--student-config", wide]
    where = learn(world, folder / "student", *more)
    (where / "generation_config.json").write_text('{"eos_token_id": [2, 17]}')
    return where


def test_packed_weights_are_not_packed_again_after_the_training(
    world: Path, tmp_path: Path, quantised: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = without(arguments(world, tmp_path / "out", "--student", quantised), "--student-config")
    capsys.readouterr()
    assert main([*argv, "--fine-tune", "lora", "--export-bits", "4"]) == 2
    assert capsys.readouterr().err == (
        "error: the student is quantised already; leave export_bits away\n"
    )


def test_layers_of_a_teacher_with_adapters(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them are the teacher, adapters and all."""
    network, _ = load(world / "teacher")
    how = AdapterConfig("lora")
    how.apply(network)
    network.update(tree_map(lambda x: x + 0.02, network.trainable_parameters()))
    how.save(network, tmp_path / "adapters")
    argv = arguments(world, tmp_path / "out", "--student-layers", 0, 1, 2, "--steps", 1)
    argv = without(argv, "--student-config")
    befores = []
    for more in (["--teacher-adapter-path", str(tmp_path / "adapters")], []):
        output = tmp_path / f"student-{len(more)}"
        assert main([*argv, "--output", str(output), *more]) == 0
        befores.append(json.loads((output / "training.json").read_text())["held_out"]["before"])
    assert [one["kl"] for one in befores] == pytest.approx([0, 0], abs=1e-5)
    assert befores[0]["nats"] != pytest.approx(befores[1]["nats"], rel=1e-3)


def test_adapters_over_packed_weights(world: Path, tmp_path: Path, quantised: Path) -> None:
    """Every way of writing them; the figures are those of the files, and all end tokens stay."""
    for number, ways in enumerate(([], ["--keep-adapters"], ["--export-dequantized"])):
        output = tmp_path / f"student-{number}"
        argv = without(arguments(world, output, "--student", quantised), "--student-config")
        assert main([*argv, "--steps", "2", "--fine-tune", "lora", *ways]) == 0
        apart = output / "adapters" if "--keep-adapters" in ways else None
        model, tokenizer = load(output, adapter_path=apart)
        assert tokenizer.eos_token_ids == {2, 17}
        packed = any("scales" in module for module in model.modules())
        assert packed == ("--export-dequantized" not in ways)
        valid, _ = fit(read_texts(world / "texts" / "valid.jsonl", tokenizer), 512)
        found = evaluate({"student": model}, valid)["student"]
        nats = found["nats"].sum() / found["tokens"].sum()
        figures = json.loads((output / "training.json").read_text())["held_out"]
        assert figures["after"]["nats"] == pytest.approx(nats, rel=1e-4)
        trained = figures.get("trained", figures["after"])["nats"]
        if ways:  # nothing is lost
            assert figures["after"]["nats"] == pytest.approx(trained, rel=1e-3)
