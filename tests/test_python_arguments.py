"""What Python gives the public functions: taken as it is meant, or refused in one sentence."""

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from chat_templates import CHATML
from conftest import ModelIn
from distillers import TEXTS
from drafting import random_drafter
from half_models import REFERENCE
from mlx import nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_distill
from mlx_distill import DraftPlan, Examples, InputError
from mlx_distill.checkpoint import bundled
from mlx_distill.core.sampling import Sampling
from mlx_distill.distillation.answer_writing import write_answers
from mlx_distill.distillation.config import DistillConfig
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.responses import ResponseConfig
from mlx_distill.distillation.terms import LossTerm
from mlx_distill.distillation.training import distill
from mlx_distill.evaluation.judging import JudgingConfig
from mlx_distill.training.config import TrainingConfig

pytestmark = pytest.mark.usefixtures("unchecked_types")
IDS = [[1, 5, 7], [1, 9, 4], [1, 8]]


@pytest.fixture(scope="module")
def pair(model_in: ModelIn) -> tuple[Any, Any]:
    return mlx_distill.load(model_in("tiny", "float32"))


def config(**options: Any) -> DrafterTraining:
    small = {"held_out": 1, "starts": 8, "exit_dim": 16, "draft_vocab_size": 64}
    how = {"training": TrainingConfig(steps=1), "responses": ResponseConfig(max_tokens=4)}
    return DrafterTraining(**{**small, **how, **options})


# --------------------------------------------------------------------------------------- drafters


@pytest.mark.parametrize(
    "prompts",
    [
        (one for one in IDS),
        tuple(map(tuple, IDS)),
        [np.array(one) for one in IDS],
        [mx.array(one) for one in IDS],
        [[np.int64(token) for token in one] for one in IDS],
    ],
    ids=["generator", "tuples", "numpy", "mlx", "numpy's numbers"],
)
def test_prompts_in_every_form(tmp_path: Path, pair: tuple[Any, Any], prompts: Iterable[Any]):
    mlx_distill.train_drafter(*pair, prompts, tmp_path / "drafter", config(), quiet=True)
    _, *rows = (tmp_path / "drafter.responses.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == IDS
    rows = json.loads((tmp_path / "drafter" / "training.json").read_text())["rows"]
    assert (rows["rows"], rows["kept"]) == (3, 3)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ("Why is the sky blue?", "prompts must be a list, got 'Why is the sky blue"),
        (b"abc", "prompts must be a list, got b'abc'"),
        ({"prompt": "a"}, "prompts must be a list, got {"),
        (5, "prompts must be a list, got 5"),
        (np.array(5), "prompts must be a list, got "),
        (mx.array(5), "prompts must be a list, got "),
        ([b"abc", b"abd"], "prompt 1 must be a text, a chat or token ids, got b'abc'"),
        (["a", None], "prompt 2 must be a text, a chat or token ids, got None"),
        ([1, 2, 3], "prompt 1 must be a text, a chat or token ids, got 1"),
        ([[1.0, 2.0], [3]], "prompt 1 must be a text, a chat or token ids, got "),
        ([[True], [3]], "prompt 1 must be a text, a chat or token ids, got "),
        ([[1, "a"], [3]], "prompt 1 must be a text, a chat or token ids, got "),
        ([np.array([[1, 2]]), [3]], "prompt 1 must be a text, a chat or token ids, got "),
    ],
)
def test_what_is_no_list_of_prompts(
    tmp_path: Path, pair: tuple[Any, Any], prompts: Any, sentence: str
):
    with pytest.raises(InputError, match=f"^{sentence}"):
        mlx_distill.train_drafter(*pair, prompts, tmp_path / "drafter", config(), quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokenizer", [None, 5, "tokenizer.json"])
def test_what_is_no_tokenizer(tmp_path: Path, pair: tuple[Any, Any], tokenizer: Any):
    model = pair[0]
    output, drafter = tmp_path / "drafter", bundled("stories-14m-redrafter")
    for call in (
        lambda: mlx_distill.train_drafter(model, tokenizer, IDS, output, config(), quiet=True),
        lambda: mlx_distill.train_drafter(model, tokenizer, ["a"], output, config(), quiet=True),
        lambda: write_answers(model, tokenizer, IDS, tmp_path / "answers.npz", ResponseConfig()),
        lambda: mlx_distill.generate(model, tokenizer, "Once"),
        lambda: mlx_distill.generate(model, tokenizer, [1, 2]),
        lambda: mlx_distill.batch_generate(model, tokenizer, [[1, 2]]),
        lambda: mlx_distill.load_drafter(drafter, model, tokenizer or 5),
    ):
        with pytest.raises(InputError, match="the tokenizer must be one, as load returns"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_transformers_is_one(tmp_path: Path, pair: tuple[Any, Any]):
    model, own = pair
    theirs = own._tokenizer
    options = {"max_tokens": 4, "drafter": None}
    assert mlx_distill.generate(model, theirs, [1, 5], **options) == mlx_distill.generate(
        model, own, [1, 5], **options
    )
    mlx_distill.train_drafter(model, theirs, IDS, tmp_path / "drafter", config(), quiet=True)
    assert mlx_distill.load_drafter(tmp_path / "drafter", model, own) is not None


def test_a_tokenizer_of_transformers_reads_files(tmp_path: Path, pair: tuple[Any, Any]):
    """It says in its own way that it has a chat template, and which tokens end a text."""
    theirs = copy.deepcopy(pair[1]._tokenizer)
    theirs.chat_template = CHATML
    wrapped = TokenizerWrapper(theirs)
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "A cat."}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    for read in (mlx_distill.read_prompts, mlx_distill.read_texts):
        assert read(data, theirs) == read(data, wrapped)
        with pytest.raises(InputError, match="the tokenizer must be one, as load returns"):
            read(data, None)
    texts = []
    for name, tokenizer in (("a", wrapped), ("b", theirs)):
        drafter = random_drafter(pair[0])
        with mlx_distill.Learner(tmp_path / name, drafter, pair[0], tokenizer) as learner:
            options = {"drafter": learner.drafter, "max_tokens": 6}
            answer = mlx_distill.stream_generate(pair[0], tokenizer, [1, 5], **options)
            texts.append([response.token for response in learner.listen(answer)])
            learner.learn()
        assert json.loads((tmp_path / name / "learning.json").read_text())["answers"] == 1
    assert texts[0] == texts[1]


@pytest.mark.parametrize("prompts", ["Once", b"Once", {"a": 1}, 5])
def test_texts_are_written_to_several_prompts(pair: tuple[Any, Any], prompts: Any):
    with pytest.raises(InputError, match="prompts must be a list, got "):
        mlx_distill.batch_generate(*pair, prompts, max_tokens=1)
    with pytest.raises(InputError, match="a prompt is a text or token ids, got b'Once'"):
        mlx_distill.generate(*pair, b"Once", max_tokens=1)
    (answer,) = mlx_distill.batch_generate(*pair, (one for one in IDS[:1]), max_tokens=1)
    assert answer.error is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"config": {"steps": 3}}, "config must be a DrafterTraining, got {'steps': 3}"),
        ({"start": "models/drafter"}, "start must be a drafter's network, got 'models/drafter'"),
        ({"about": {"x": {1}}}, "about must hold names and values of JSON: Object of type set"),
        ({"about": ["x"]}, "about must hold names and values of JSON"),
        ({"about": {"data": 5}}, "the data of about must be a list, got 5"),
        ({"model": None}, "a model must be a network, as load returns, got None"),
        ({"model": "models/x"}, "a model must be a network, as load returns, got 'models/x'"),
    ],
)
def test_what_is_of_another_kind(
    tmp_path: Path, pair: tuple[Any, Any], options: dict[str, Any], sentence: str
):
    named = {"model": pair[0], "config": config(), **options}
    with pytest.raises(InputError, match=f"^{sentence}"):
        mlx_distill.train_drafter(
            tokenizer=pair[1], prompts=IDS, output=tmp_path / "drafter", quiet=True, **named
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda model: mlx_distill.NGramDrafter("a"), "longest must be a whole number, got 'a'"),
        (lambda model: mlx_distill.NGramDrafter(16.5), "longest must be a whole number, got 16.5"),
        (
            lambda model: mlx_distill.NGramDrafter(shortest=2.5),
            "shortest must be a whole number, got 2.5",
        ),
        (
            lambda model: mlx_distill.NGramDrafter(store_tokens=-1),
            "store_tokens must be at least 0, got -1",
        ),
        (
            lambda model: mlx_distill.NGramDrafter(store_tokens="many"),
            "store_tokens must be a whole number, got 'many'",
        ),
        (
            lambda model: mlx_distill.MixedDrafter(mlx_distill.NGramDrafter(), "ngram"),
            "ngrams must be an NGramDrafter, got 'ngram'",
        ),
        (
            lambda model: mlx_distill.MixedDrafter(mlx_distill.NGramDrafter),
            "n-grams are mixed with a drafter, got <class",
        ),
        (
            lambda model: mlx_distill.DraftModelDrafter("models/small", 97),
            "a draft model must be a network, as load returns, got 'models/small'",
        ),
        (
            lambda model: mlx_distill.DraftModelDrafter(model, "97"),
            "vocab_size must be a whole number, got '97'",
        ),
        (
            lambda model: mlx_distill.DraftModelDrafter(model, 97, max_kv_size="8"),
            "max_kv_size must be a whole number, got '8'",
        ),
    ],
)
def test_what_makes_no_drafter(
    pair: tuple[Any, Any], make: Callable[[nn.Module], Any], sentence: str
):
    with pytest.raises(InputError, match=f"^{sentence}"):
        make(pair[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"plan": "wide"}, "plan must be a DraftPlan, or plan drafts, got 'wide'"),
        ({"plan": {"nodes": 3}}, "plan must be a DraftPlan, or plan drafts, got {'nodes': 3}"),
        ({"plan": DraftPlan}, "plan must be a DraftPlan, or plan drafts, got <class"),
        ({"drafter": mlx_distill.NGramDrafter}, "a type is no drafter; load one with load_drafter"),
        ({"draft_verification": "block"}, "draft_verification is for the chains of a draft_model"),
        ({"exact_rows": "no"}, "exact_rows must be true or false, got 'no'"),
    ],
)
def test_what_drafts_nothing(pair: tuple[Any, Any], options: dict[str, Any], sentence: str):
    with pytest.raises(InputError, match=f"^{sentence}"):
        mlx_distill.generate(*pair, IDS[0], max_tokens=2, **options)


@pytest.mark.parametrize("prompt", [{5: 6}, {5, 6}, frozenset([5])])
def test_ids_without_an_order_are_no_prompt(pair: tuple[Any, Any], prompt: Any):
    with pytest.raises(InputError, match="a prompt is a text or token ids, got "):
        mlx_distill.generate(*pair, prompt, max_tokens=1)


def test_numbers_of_numpy_say_how_much_is_drafted(tmp_path: Path, pair: tuple[Any, Any]):
    options = {"draft_model": pair[0], "max_tokens": 6}
    text = mlx_distill.generate(*pair, IDS[0], num_draft_tokens=2, **options)
    assert mlx_distill.generate(*pair, IDS[0], num_draft_tokens=np.int64(2), **options) == text
    (answer,) = mlx_distill.batch_generate(*pair, IDS[:1], batch=np.int32(2), max_tokens=6)
    assert answer.text == text
    mlx_distill.quantize_drafter(REFERENCE, tmp_path / "packed", bits=np.int64(4))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4


@pytest.mark.parametrize("name", ["tokenizer_config", "model_config"])
def test_what_a_model_is_loaded_with_has_names(name: str):
    with pytest.raises(InputError, match=f"^{name} must hold names and values, got 'x'"):
        mlx_distill.load(bundled("stories-4m"), **{name: "x"})


# --------------------------------------------------------------------------------------- settings


def test_lists_and_numbers_of_numpy_are_settings():
    assert config(tap_layers=[-1]) == config(tap_layers=(-1,))
    assert config(tap_layers=[-1]).tap_layers == (-1,)
    assert config(tap_layers=[np.int64(0), 1]).tap_layers == (0, 1)
    ways = ResponseConfig(temperatures=[0.0, np.float32(0.5)], max_tokens=np.int64(3))
    assert ways == ResponseConfig(temperatures=(0.0, 0.5), max_tokens=3)
    assert (
        json.dumps([ways.temperatures, ways.max_tokens, ways.response_seed]) == "[[0.0, 0.5], 3, 0]"
    )
    assert JudgingConfig(nodes=[3, 4]) == JudgingConfig(nodes=(3, 4))
    named = {"data": ["a"], "teacher": ["t"], "student_layers": [0, 1]}
    assert DistillConfig(**named) == DistillConfig(**{k: tuple(v) for k, v in named.items()})
    assert type(Sampling(temperature=np.float32(0.5)).temperature) is float
    for wrong in (np.float64("nan"), np.bool_(True), np.array([1]), "3"):
        with pytest.raises(InputError, match="steps must be a whole number, got "):
            TrainingConfig(steps=wrong)


# --------------------------------------------------------------------------------------- students


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))


def frozen() -> nn.Module:
    student = network()
    student.freeze()
    return student


def examples() -> Examples:
    draws = np.random.default_rng(0)
    return Examples.of(draws.normal(size=(8, 6)).astype(np.float32), np.arange(8) % 4)


def unweighted() -> Examples:
    """Return examples none of which counts."""
    return replace(examples(), mask=mx.zeros(8))


def run(folder: Path, student: Any = None, teacher: Any = None, data: Any = None, **options: Any):
    how = {"training": TrainingConfig(steps=2), "quiet": True}
    given = examples() if data is None else data
    student, teacher = student or network(), teacher or network()
    return distill(student, teacher, given, folder=folder, **{**how, **options})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"eos_token_ids": ["a"]}, "eos_token_ids must be a whole number, got 'a'"),
        ({"training": {"steps": 3}}, "training must be a TrainingConfig, got {"),
        ({"on_policy": 0.5}, "on_policy must be an OnPolicyConfig, got 0.5"),
        ({"teacher": "models/stories-4m"}, "a teacher must be a network, .* got 'models/stori"),
        ({"teacher": [network(), "x"]}, "a teacher must be a network, as load returns, got 'x'"),
        ({"teacher": Path("x")}, "a teacher must be a network, as load returns, got "),
        ({"student": "models/x"}, "the student must be a network, as load returns, got 'models"),
        ({"student": frozen()}, "the student has nothing to train: all of its weights are frozen"),
        ({"data": ["Once"]}, "data must hold texts, as read_texts returns, got 'Once'"),
        ({"data": "Once"}, "data must be a list, got 'Once'"),
        ({"valid": ["Once"]}, "valid must hold texts, as read_texts returns, got 'Once'"),
        ({"valid": []}, "valid must hold examples, as the data do"),
        ({"data": TEXTS, "valid": examples()}, "valid must hold texts, as the data do"),
        ({"data": TEXTS, "valid": []}, "valid holds no texts"),
        ({"valid": examples().take([])}, "no example of valid has a weight above 0"),
        ({"data": unweighted()}, "no example of data has a weight above 0"),
        ({"losses": 3}, "losses must be a list, got 3"),
        ({"losses": [{"name": "hard"}]}, "a loss must be a text such as forward_kl:weight=0.9, go"),
        ({"eos_token_ids": 2}, "eos_token_ids must be a list, got 2"),
        ({"eos_token_ids": None}, "eos_token_ids must be a list, got None"),
        ({"valid": examples(), "valid_teacher": "x"}, "a teacher must be a network, as load ret"),
    ],
)
def test_what_a_distillation_does_not_take(tmp_path: Path, options: dict[str, Any], sentence: str):
    with pytest.raises(InputError, match=f"^{sentence}"):
        run(tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


def test_a_loss_and_a_network_are_taken_alone(tmp_path: Path):
    judged = []
    for name, judge in (("a", network()), ("b", None)):
        how = {"valid": examples(), "valid_teacher": judge, "losses": LossTerm("forward_kl")}
        mx.random.seed(1)
        judged.append(run(tmp_path / name, **how).log[-1]["held_out"]["kl"])
    assert judged[0] != judged[1]


def test_numbers_of_numpy_are_a_seed(tmp_path: Path):
    def losses(seed: Any, ends: Any, name: str) -> list[float]:
        mx.random.seed(1)
        how = {"seed": seed, "eos_token_ids": ends, "batch_size": np.int32(4)}
        return [row["loss"] for row in run(tmp_path / name, **how).log]

    assert losses(np.int64(3), [np.int64(2)], "a") == losses(3, (2,), "b")
    settings = [json.loads((tmp_path / name / "settings.json").read_text()) for name in "ab"]
    assert settings[0]["seed"] == 3
    assert settings[0]["eos_token_ids"] == [2]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Examples.of(np.float32(3), [1]), "inputs must be an array with an example per"),
        (lambda: Examples.of(np.zeros((2, 3)), ["a", "b"]), r"labels must be an array of numbers"),
        (lambda: Examples.of(np.zeros((2, 3)), np.array(["a", "b"])), "labels must be an array of"),
        (lambda: Examples.of(np.zeros((2, 3)), 1), "labels must be the classes' numbers"),
        (lambda: Examples.of([[1], [2, 3]], [1, 2]), "inputs must be an array of numbers, got"),
        (lambda: Examples.of(None, [1]), "inputs must be an array of numbers, got None"),
    ],
)
def test_what_are_no_examples(make: Callable[[], Examples], sentence: str):
    with pytest.raises(InputError, match=f"^{sentence}"):
        make()
