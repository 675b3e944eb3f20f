"""The training of drafters: the command from end to end, and what is made of the answers."""

import gc
import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import ModelIn
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import InputError, benchmark, train_drafter
from mlx_distill.arrays import log_probs
from mlx_distill.data.prompts import encode_prompt
from mlx_distill.data.report import Report
from mlx_distill.data.texts import Text
from mlx_distill.distillation import drafter_plan
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.drafter_memory import needed_bytes
from mlx_distill.distillation.drafter_trainer import (
    DrafterTrainer,
    frequent_tokens,
)
from mlx_distill.distillation.drafter_training import train_drafter as train_drafter_of
from mlx_distill.distillation.responses import (
    Response,
    ResponseConfig,
    answer,
    read_responses,
    write_responses,
)
from mlx_distill.drafters import shortlist
from mlx_distill.drafters.fingerprint import fingerprint
from mlx_distill.target.target import Target
from mlx_distill.training.config import TrainingConfig

TINY = [
    *("--exit-dim", "32", "--draft-vocab-size", "256", "--unroll", "3", "--batch-size", "2"),
    *("--max-tokens", "8", "--held-out", "2", "--steps", "12", "--checkpoint-every", "2"),
    *("--max-prompts", "6", "--prompt-tokens", "6", "--response-batch-size", "2", "--quiet"),
    *("--evaluate-every", "6", "--seed", "4"),
]
Arguments = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def pair(model_in: ModelIn) -> tuple[Any, Any]:
    return mlx_distill.load(model_in("tiny", "float16"))


def bits(network: nn.Module) -> dict[str, bytes]:
    """Return every parameter as bytes."""
    arrays: dict[str, Any] = dict(tree_flatten(network.parameters()))
    return {name: np.array(x.view(mx.uint8)).tobytes() for name, x in arrays.items()}


@pytest.fixture(scope="module")
def arguments(model_in: ModelIn) -> Arguments:
    """Return what makes the arguments of a tiny training from its output."""
    model = ["--model", str(model_in("tiny", "float16")), "--data", str(benchmark.PROMPTS)]
    return lambda output: [*model, "--output", str(output), *TINY]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, arguments: Arguments) -> Path:
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


class Killed(BaseException):
    """Comes from nowhere: nothing in the package expects it."""


def test_killed_training_resumes_with_the_same_bits(
    tmp_path: Path, finished: Path, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: while the target writes, and after the first checkpoint; on to the same file.

    MLX's own random state is another one each time.
    """
    output = tmp_path / "drafter"
    command = [sys.executable, "-m", "mlx_distill.train_drafter", *arguments(output)]
    responses = tmp_path / "drafter.responses.jsonl"
    killed_when(command, lambda: responses.exists() and responses.stat().st_size > 0)
    assert not output.exists()
    work = tmp_path / "drafter.partial"
    save = mx.save_safetensors

    def killed_later(path: str, *args: Any) -> None:
        if (work / "step-0000002").exists():
            raise Killed
        save(path, *args)

    mx.random.seed(98)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", killed_later)
        with pytest.raises(Killed):
            train_drafter.main([*arguments(output), "--resume"])
    assert not output.exists()
    mx.random.seed(99)
    assert train_drafter.main([*arguments(output), "--resume"]) == 0
    assert not work.exists()
    for name in ("model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (finished / name).read_bytes()
    log = json.loads((output / "training.json").read_text())["log"]
    assert log == json.loads((finished / "training.json").read_text())["log"]
    assert [row["step"] for row in log] == [6, 12]
    others = finished.with_name("drafter.responses.jsonl")
    assert responses.read_bytes() == others.read_bytes()


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
    assert all(x.dtype in (mx.float32, mx.int32) for x in weights.values())


def test_blocks_are_added_to_a_drafter_and_learn(
    pair: tuple[Any, Any], tmp_path: Path, finished: Path, arguments: Arguments
) -> None:
    """From features on disk; the drafter that was started from had none."""
    output = tmp_path / "blocks"
    shared = ["--responses", str(finished.with_name("drafter.responses.jsonl"))]
    more = ["--context-blocks", "1", "--context-window", "16", "--loss", "lk", "--epochs", "3"]
    more += ["--features", str(tmp_path / "features"), "--start-from", str(finished)]
    assert train_drafter.main([*arguments(output), *shared, *more, "--starts", "8"]) == 0
    drafter = mlx_distill.load_drafter(output, *pair)
    assert (drafter.config.context_blocks, drafter.config.context_window) == (1, 16)
    assert drafter.network.blocks.layers[0].out.weight.any().item()
    expected = mlx_distill.generate(*pair, "Once upon a time", max_tokens=20)
    found = mlx_distill.generate(*pair, "Once upon a time", drafter=drafter, max_tokens=20)
    assert found == expected
    assert "look_back" in json.loads((tmp_path / "features" / "features.json").read_text())


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


# ------------------------------------------------------------------------------------ the answers


def test_answers_left_out_are_counted_as_prompts_are(
    tmp_path: Path, arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = {"prompt_len": np.array([2] * 8), "answer_len": np.array([4] * 8)}
    tokens = {"prompt": np.array([1, 5] * 8), "answer": np.arange(3, 35)}
    np.savez(tmp_path / "answers.npz", greedy=np.array([True] * 8), **lengths, **tokens)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once upon a time"}\n' * 8)
    flags = arguments(tmp_path / "drafter")
    for flag in ("--data", "--prompt-tokens"):
        flags[flags.index(flag) : flags.index(flag) + 2] = []
    for noun, given in (("answer", "--answers answers.npz"), ("prompt", "--data p.jsonl")):
        name, file = given.split()
        output = ["--output", str(tmp_path / noun), "--steps", "1"]
        assert train_drafter.main([*flags, name, str(tmp_path / file), *output]) == 0
        assert f"2 behind the first 6: {noun} 7; {noun} 8" in capsys.readouterr().err
        rows = json.loads((tmp_path / noun / "training.json").read_text())["rows"]
        left_out = {"behind the first 6": {"count": 2, "places": [f"{noun} 7", f"{noun} 8"]}}
        assert rows == {"rows": 8, "kept": 6, "dropped": left_out, "changed": {}}


@pytest.mark.parametrize("name", ["gemma3n", "iquestloopcoder"])
def test_layers_that_return_no_rows_are_seen_by_no_drafter(name: str) -> None:
    """Nobody had asked for them, and all answers were written before they were refused."""
    target = Target.of(tiny_model(name))
    assert DrafterTraining().taps(target) == ()
    with pytest.raises(InputError, match=r"layer 1 of a Model returns .* a drafter cannot see it"):
        DrafterTraining(tap_layers=(1,)).taps(target)


def test_layers_that_are_not_there_are_refused_before_anything_is_written(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    config = DrafterTraining(tap_layers=(99,), held_out=1)
    with pytest.raises(InputError, match="there is no layer 99"):
        mlx_distill.train_drafter(*pair, ["Once", "Ben"], tmp_path / "drafter", config=config)
    assert not list(tmp_path.iterdir())


def test_most_frequent_tokens_of_the_answers() -> None:
    texts = [Text.behind([9, 9, 9, 5, 5, 2], 3), Text.behind([9, 5, 7, 2], 1)]
    assert frequent_tokens(texts, 2, 10) == ([2, 5], pytest.approx(5 / 6))
    assert frequent_tokens(texts, 3, 10) == ([2, 5, 7], 1.0)
    assert frequent_tokens(texts, 5, 10) == ([0, 1, 2, 5, 7], 1.0)


def trainer_of(pair: tuple[Any, Any], lengths: list[int], **options: Any) -> DrafterTrainer:
    """Return the training of a tiny drafter on made-up answers of some lengths."""
    random = np.random.default_rng(0)
    responses = [
        Response([1, 5], random.integers(3, 4096, size=length).tolist()) for length in lengths
    ]
    options = {"held_out": 2, **options}
    config = DrafterTraining(exit_dim=32, draft_vocab_size=64, unroll=2, **options)
    return DrafterTrainer(Target.of(pair[0]), responses, config)


@pytest.mark.parametrize("starts", [16, 2048, 100_000])
def test_the_time_of_an_epoch_counts_the_drafts_that_there_are(
    pair: tuple[Any, Any], starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(pair, [8, 9, 10, 11, 12], starts=starts)
    clock = iter(range(100))  # whatever is timed takes a second
    monkeypatch.setattr(drafter_plan.time, "perf_counter", lambda: next(clock))
    drafts = sum(
        trainer.order.at(step).numbers.size for step in range(trainer.order.steps_per_epoch)
    )
    learning_s = drafter_plan.measured_epoch(trainer).learning_s
    assert learning_s == pytest.approx(drafts / min(starts, drafter_plan.MEASURED_STARTS))


def test_held_out_answers_are_of_every_temperature(pair: tuple[Any, Any]) -> None:
    lengths = list(range(10, 50))  # so that each answer is known by its length
    options = {"responses": ResponseConfig(temperatures=(0.0, 0.7, 1.0)), "held_out": 9}
    rows = []
    for seed in (0, 0, 1):
        trainer = trainer_of(pair, lengths, seed=seed, **options)
        rows.append([len(text.tokens) - 12 for text in trainer.held_out])
        assert len(trainer.training) == 31
    assert rows[0] == rows[1] != rows[2]
    assert np.bincount([row % 3 for row in rows[0]]).tolist() == [3, 3, 3]
    assert rows[0] != list(range(31, 40))


def test_batches_are_padded_to_their_own_longest(pair: tuple[Any, Any]) -> None:
    """One long answer makes one batch long."""
    trainer = trainer_of(pair, [*range(4, 20), 200], batch_size=4)
    assert max(len(text.tokens) for text in trainer.training) == 202
    seen = []
    read = trainer.target.model.__class__.__call__

    def recording(model: nn.Module, inputs: mx.array, *args: Any, **options: Any) -> mx.array:
        seen.append(inputs.shape)
        return read(model, inputs, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.target.model.__class__, "__call__", recording)
        view = trainer.reader.view(trainer.training)
    widths = sorted(shape[1] for shape in seen)
    assert widths[-1] == 201
    assert widths[-2] < 22
    assert view.tokens.size == sum(text.num_learned for text in trainer.training)


def test_a_view_is_what_the_target_says_of_each_answer_alone(pair: tuple[Any, Any]) -> None:
    trainer = trainer_of(pair, [5, 9, 12, 3, 7])
    view = trainer.reader.view(trainer.training)
    found = np.array(log_probs(trainer.target_logits(view.goals)))
    expected, hidden, ahead, tokens = [], [], [], []
    for text in sorted(trainer.training, key=lambda text: len(text.tokens)):
        logits, states = trainer.target.read(mx.array([text.tokens[:-1]]))
        ids = trainer.network.token_ids
        expected.append(np.array(mx.softmax(logits[0, 1:][:, ids].astype(mx.float32), axis=-1)))
        hidden.append(np.array(states[0, 1:].astype(mx.float32)))
        ahead += range(len(expected[-1]) - 1, -1, -1)
        tokens += text.tokens[1:-1]
    np.testing.assert_allclose(np.exp(found), np.concatenate(expected), atol=1e-5)
    states = np.array(view.hidden.astype(mx.float32))
    np.testing.assert_allclose(states, np.concatenate(hidden), atol=1e-4)
    assert view.ahead.tolist() == ahead
    assert view.tokens.tolist() == tokens


@pytest.mark.parametrize(
    ("batch_size", "length", "exit_dim", "blocks", "kind"),
    [
        *((4, 80, None, 0, "recurrent"), (2, 24, 1024, 0, "recurrent")),
        *((4, 60, None, 1, "recurrent"), (4, 80, None, 0, "medusa")),
    ],
)
def test_memory_is_estimated(
    bundled_pair: tuple[Any, Any],
    tmp_path: Path,
    batch_size: int,
    length: int,
    exit_dim: int | None,
    blocks: int,
    kind: str,
) -> None:
    """Where the batch takes most of it, and where the drafter does, its blocks or heads."""
    target = Target.of(bundled_pair[0])
    config = DrafterTraining(
        drafter_kind=kind,
        exit_dim=exit_dim,
        context_blocks=blocks,
        held_out=1,
        batch_size=batch_size,
        starts=512 if blocks else 2048,
        responses=ResponseConfig(max_tokens=length),
        training=TrainingConfig(steps=2),
    )
    random = np.random.default_rng(0)
    answers = random.integers(3, 4096, size=(batch_size + 1, length)).tolist()
    limit = mx.set_cache_limit(0)
    gc.collect()  # what other tests left and is let go meanwhile would be taken off the peak
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    trainer = DrafterTrainer(target, [Response([1, 5, 7], one) for one in answers], config)
    trainer.run(tmp_path / "work", quiet=True)
    mx.set_cache_limit(limit)
    num_tokens = (batch_size + 1) * length
    _, trained, kept, step = needed_bytes(target, config, length + 3, num_tokens)
    # Beside what was there before: the target, and what other tests left.
    measured = mx.get_peak_memory() - before
    assert trained + kept + step == pytest.approx(measured, rel=0.15)


class Unopened(Target):
    """A target by its shape alone: opening it would compute."""

    def __init__(self, model: Any):
        self.model = model
        self.embed = model.model.embed_tokens
        self.hidden_size, self.vocab_size = model.args.hidden_size, model.args.vocab_size


def test_a_drafter_of_llama_3_8b_needs_less_than_6_gb_beside_its_target() -> None:
    """Of the default form, however many answers there are; no array of the model is made."""
    shape = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32}
    shape |= {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape |= {"rms_norm_eps": 1e-5, "vocab_size": 128_256, "tie_word_embeddings": False}
    model: Any = llama.Model(llama.ModelArgs.from_dict(shape))
    model.set_dtype(mx.bfloat16)
    config = DrafterTraining()
    weights, trained, kept, step = needed_bytes(Unopened(model), config, 192 + 64, 10**7)
    assert weights == pytest.approx(2 * 8.03e9, rel=0.01)
    assert 2e9 < trained + kept + step < 6e9


# ------------------------------------------------------------------- the command, as it is used


def figures(output: Path) -> dict[str, Any]:
    return json.loads((output / "training.json").read_text())


def test_command_on_weights_as_a_gpu_loads_them(
    tiny_on_a_gpu: Path,
    tmp_path: Path,
    arguments: Arguments,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The drafter learns in the model's type and drafts for it."""
    output = tmp_path / "drafter"
    flags = [*arguments(output), "--model", str(tiny_on_a_gpu), "--evaluate-every", "2"]
    flags += ["--checkpoint-every", "12"]
    assert train_drafter.main([*flags, "--learning-rate", "0.01"]) == 0
    assert "memory: about" in capsys.readouterr().err
    log = figures(output)["log"]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    generate = importlib.import_module("mlx_distill.generate")
    flags = ["--model", str(tiny_on_a_gpu), "--drafter", str(output), "--json"]
    assert generate.main([*flags, "--max-tokens", "8"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["drafted_tokens"] > 0


def test_start_from_a_drafter(tmp_path: Path, finished: Path, arguments: Arguments) -> None:
    """It begins where the other one ended, and card and settings say so."""
    output = tmp_path / "more"
    flags = [*arguments(output), "--start-from", str(finished), "--learning-rate", "1e-9"]
    flags += ["--steps", "6"]
    assert train_drafter.main(flags) == 0
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (finished, output))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    for name, array in before.items():
        np.testing.assert_allclose(np.array(after[name]), np.array(array), atol=1e-3)
    assert figures(output)["start_from"] == finished.name
    assert f"started from {finished.name}" in (output / "README.md").read_text()


CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<{{ who or 'bot' }}>"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, model_in: ModelIn) -> Path:
    """Return a tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model_in("tiny", "float16"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    return folder


def test_chats_are_never_cut(tmp_path: Path, chat_model: Path) -> None:
    questions = [f"Who ran {number}?" for number in range(6)] + ["Tom ran. " * 40]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    output = tmp_path / "drafter"
    flags = ["--model", str(chat_model), "--data", str(data), "--output", str(output), *TINY]
    flags += ["--prompt-tokens", "32", "--max-prompts", "20", "--steps", "2"]
    assert train_drafter.main([*flags, "--chat-template-config", '{"who": "Lily"}']) == 0
    rows = (tmp_path / "drafter.responses.jsonl").read_text().splitlines()[1:]
    _, tokenizer = mlx_distill.load(chat_model)
    asked = [tokenizer.decode(json.loads(row)["prompt"]) for row in rows]
    assert len(set(asked)) == 6
    assert all(text.endswith("\n<Lily>") for text in asked)
    made = figures(output)
    assert made["rows"]["rows"] == 7
    assert made["rows"]["kept"] == 6
    assert sum(one["count"] for one in made["rows"]["dropped"].values()) == 1
    assert made["chat_template_config"] == {"who": "Lily"}
    card = (output / "README.md").read_text()
    assert "Of 7 rows were not used: 1 " in card
    assert "who" in card


def test_prompts_without_room_for_an_answer_are_counted(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    """The model reads 512 tokens; an answer that comes near is shorter, and there is no more."""
    model, tokenizer = pair
    prompts = [[1] * length for length in (10, 600, 508, 512, 20)]
    report = Report(rows=5)
    config = DrafterTraining(
        exit_dim=32,
        draft_vocab_size=64,
        unroll=2,
        batch_size=2,
        held_out=1,
        responses=ResponseConfig(max_tokens=8),
        training=TrainingConfig(steps=1),
    )
    output = tmp_path / "drafter"
    train_drafter_of(model, tokenizer, prompts, output, config, report=report, quiet=True)
    assert (report.kept, report.dropped.total()) == (3, 2)
    lengths = [len(r.prompt) for r in read_responses(tmp_path / "drafter.responses.jsonl")]
    assert lengths == [10, 508, 20]
    answers = [len(r.response) for r in read_responses(tmp_path / "drafter.responses.jsonl")]
    assert answers[1] <= 4 < answers[0]
    assert "2 without room for an answer" in (output / "README.md").read_text()


def test_prompts_in_python_are_texts_chats_or_token_ids(tmp_path: Path, chat_model: Path) -> None:
    model, tokenizer = mlx_distill.load(str(chat_model))
    chat = [{"role": "user", "content": "Who are you?"}]
    ids = encode_prompt(tokenizer, chat)
    config = DrafterTraining(
        exit_dim=8,
        unroll=2,
        held_out=1,
        responses=ResponseConfig(max_tokens=3),
        training=TrainingConfig(steps=1),
    )
    prompts = ["Who are you?", chat, ids, [1, 5, 6]]
    mlx_distill.train_drafter(model, tokenizer, prompts, tmp_path / "d", config, quiet=True)
    read = [one.prompt for one in read_responses(tmp_path / "d.responses.jsonl")]
    assert sorted(read) == sorted([ids, ids, ids, [1, 5, 6]])
    assert mlx_distill.load_drafter(str(tmp_path / "d"), model, tokenizer)
    with pytest.raises(InputError, match="the prompt is empty"):
        mlx_distill.train_drafter(model, tokenizer, ["", *prompts], tmp_path / "e", config)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "a prompt is empty"), ([97], "prompts hold token 97"), ([-1], "prompts hold token -1")],
)
def test_prompts_that_the_target_cannot_read(
    pair: tuple[Any, Any], tmp_path: Path, prompt: list[int], message: str
) -> None:
    model = tiny_model("llama")  # of 97 tokens, fewer than the tokenizer's
    with pytest.raises(InputError, match=message):
        mlx_distill.train_drafter(model, pair[1], [[5, 9], prompt], tmp_path / "drafter")
    assert not list(tmp_path.iterdir())


def test_an_answer_that_was_cut_off_does_not_end(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    end = next(iter(tokenizer.eos_token_ids))
    config = ResponseConfig(max_tokens=3, temperatures=(0.0,))
    [cut] = answer(model, {end}, [[1, 5]], 0, config)
    assert len(cut) == 3
    assert end not in cut
    [ended] = answer(model, {cut[1]}, [[1, 5]], 0, config)
    assert ended == cut[:2]


HOLD = (
    "import sys, pathlib; from mlx_distill.locks import locked\n"
    "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def test_two_trainings_do_not_share_a_file(
    tmp_path: Path, arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "answers.jsonl"
    flags = [*arguments(tmp_path / "a"), "--responses", str(shared), "--steps", "1"]
    pipe = subprocess.PIPE
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(shared)], stdin=pipe, stdout=pipe)
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert train_drafter.main(flags) == 2
        assert f"{shared} is being written by another run" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
        other.kill()  # what it held is let go
    assert train_drafter.main(flags) == 0


def test_a_wide_heads_directions_lie_beside_it_and_are_kept_when_it_is_packed(
    arguments: Arguments,
    pair: tuple[Any, Any],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not (finished / shortlist.FILE).exists()
    monkeypatch.setattr(shortlist, "DIRECTIONS", 8)
    monkeypatch.setattr(shortlist, "LISTED", 16)
    assert train_drafter.main([*arguments(tmp_path / "wide"), "--steps", "2"]) == 0
    mlx_distill.quantize_drafter(tmp_path / "wide", tmp_path / "packed", 8)
    for name in ("wide", "packed"):
        drafter: Any = mlx_distill.load_drafter(tmp_path / name, *pair)
        assert drafter.directions.into.shape == (32, 8)
    assert (tmp_path / "wide" / shortlist.FILE).read_bytes() == (
        tmp_path / "packed" / shortlist.FILE
    ).read_bytes()
