"""A value that a setting cannot have is refused where it is set, with one sentence.

Every field of every configuration is tried, so a new one is tried, too.
"""

import dataclasses
import math
from typing import Annotated, Any

import mlx.core as mx
import pytest

from mlx_distill import cli
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.completions import CompletionFilter
from mlx_distill.distillation.adapters import AdapterConfig
from mlx_distill.distillation.config import DistillConfig
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.exporting import ExportConfig
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.distillation.responses import ResponseConfig
from mlx_distill.distillation.terms import LossTerm
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.recurrent import RecurrentDrafterConfig
from mlx_distill.errors import InputError
from mlx_distill.evaluation.evaluation import EvaluationConfig
from mlx_distill.evaluation.questions import QuestionConfig
from mlx_distill.limits import Between, OneOf, check_value, hints, kind_of
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.requests import Request
from mlx_distill.training.config import TrainingConfig

NEEDED: dict[type, dict[str, Any]] = {
    DistillConfig: {"data": ("stories",), "teacher": ("t",)},
    RecurrentDrafterConfig: dict.fromkeys(("hidden_size", "vocab_size", "exit_dim"), 8)
    | {"num_draft_layers": 1},
    Request: {"prompt": mx.array([1])},
}
CONFIGS = [
    *NEEDED,
    AdapterConfig,
    BenchmarkConfig,
    CacheConfig,
    CompletionFilter,
    DraftPlan,
    DrafterTraining,
    EvaluationConfig,
    ExportConfig,
    OnPolicyConfig,
    QuestionConfig,
    ResponseConfig,
    Sampling,
    TrainingConfig,
]
WRONG = {
    int: (True, "7", 2.0, math.nan, 2**70, 10**5000),
    float: (True, "0.5", math.nan, math.inf, -math.inf, 10**400, 1e300),
    bool: (1, "yes", None),
    str: (7, True),
}
FIELDS = [
    pytest.param(config, name, id=f"{config.__name__}-{name}")
    for config in CONFIGS
    for name, hint in hints(config).items()
    if kind_of(hint).scalar in WRONG
]


def make(config: type, values: dict[str, Any]) -> Any:
    """Make a dataclass as Python does where nothing checks its types, as these tests do."""
    made = object.__new__(config)
    for field in dataclasses.fields(config):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        object.__setattr__(made, field.name, values.get(field.name, default))
    made.__post_init__()
    return made


@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_what_no_field_of_its_kind_can_be_is_refused(config: type, name: str) -> None:
    kind, given = kind_of(hints(config)[name]), NEEDED.get(config, {})
    for value in WRONG[kind.scalar]:
        wrong = (value,) if kind.many else value
        with pytest.raises(InputError, match=f"^{name} must be .*, got ") as error:
            make(config, given | {name: wrong})
        assert len(str(error.value)) < 700


@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_a_field_takes_its_limits_and_nothing_beyond(config: type, name: str) -> None:
    kind, given = kind_of(hints(config)[name]), NEEDED.get(config, {})
    if kind.scalar not in (int, float):
        return
    assert kind.rule is not None, "a number without limits"
    assert not isinstance(kind.rule, Between) or kind.rule.high is not None, "no upper limit"
    if isinstance(kind.rule, Between):
        low = kind.rule.low if kind.rule.above is None else kind.rule.above
        for beyond in (kind.rule.high + 1, -2 if low is None else low - 1):
            with pytest.raises(InputError, match=f"^{name} must be "):
                make(config, given | {name: (beyond,) if kind.many else beyond})


@pytest.mark.parametrize(
    ("config", "field", "sentence"),
    [
        (TrainingConfig, {"steps": 10**30}, "steps must be between 1 and 1,000,000,000, got 1000"),
        (TrainingConfig, {"learning_rate": math.nan}, "learning_rate must be a number, got nan"),
        (TrainingConfig, {"steps": "7"}, "steps must be a whole number, got '7'"),
        (TrainingConfig, {"steps": 10**5000}, "steps must be .*, got a longer number"),
        (TrainingConfig, {"keep_best": 1}, "keep_best must be true or false, got 1"),
        (OnPolicyConfig, {"on_policy": 2}, "on_policy must be between 0 and 1, got 2"),
        (EvaluationConfig, {"seed": 2**70}, "seed must be between 0 and 4,294,967,295, got 1180"),
        (EvaluationConfig, {"speed_tokens": 1}, "speed_tokens must be 0, or between 2 and 1,000"),
        (DistillConfig, {"teacher": "stories"}, "teacher must be a list, got stories"),
        (DistillConfig, {"training": {"steps": 3}}, "training must be a TrainingConfig, got "),
        (CompletionFilter, {"min_answer_chars": True}, "min_answer_chars must be a whole number"),
        (LossTerm, {"name": "hard", "weight": True}, "the weight of hard must be a number"),
        (LossTerm, {"name": "hard", "weight": 10**400}, "the weight of hard must be between"),
        (
            LossTerm,
            {"name": "decoupled_kd", "options": {"beta": 1e300}},
            "the beta of decoupled_kd",
        ),
    ],
)
def test_the_sentence_says_what_may_be(config: type, field: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=f"^{sentence}"):
        make(config, NEEDED.get(config, {}) | field)


@pytest.mark.parametrize(
    ("hint", "values"),
    [
        (Annotated[int, Between(2, 9, also=0)], (0, 2, 9)),
        (Annotated[float, Between(above=0, high=1)], (1e-9, 1, 1.0)),
        (Annotated[int | None, OneOf(4, 8)], (None, 4, 8)),
        (tuple[Annotated[int, Between(0, 3)], ...], ((), [0, 3], (1,))),
        (str | None, (None, "")),
        (dict[str, int], (3, "anything")),
    ],
)
def test_what_is_within_is_taken(hint: Any, values: tuple[Any, ...]) -> None:
    for value in values:
        check_value("it", value, hint)


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("distill", "--data x --seed 1180591620717411303424", "seed must be between 0 and 4,294"),
        ("distill", f"--data x --steps 1{'0' * 30}", "steps must be between 1 and 1,000,000,000"),
        ("distill", "--data x --learning-rate nan", "learning_rate must be a number, got nan"),
        ("distill", "--data x --rollout-temperature inf", "rollout_temperature must be a number"),
        ("distill", "--data x --max-answer-chars -1", "max_answer_chars must be at least 1"),
        ("distill", f"--data x --steps 1{'0' * 5000}", "argument --steps: invalid int value"),
        ("train_drafter", f"--data x --output y --max-prompts 1{'0' * 30}", "max_prompts must be"),
        ("evaluate", "--student x --data y --bootstrap 1e3", "argument --bootstrap: invalid int"),
        ("generate", f"--max-tokens 1{'0' * 30}", "max_tokens must be between 1 and 1,000"),
        ("generate", f"--seed 1{'0' * 30}", "seed must be between 0 and 9,223,372"),
    ],
)
def test_commands_say_the_same(
    capsys: pytest.CaptureFixture[str], command: str, flags: str, sentence: str
) -> None:
    try:
        status = cli.main([command, *flags.split()])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err
    assert status == 2
    assert said.startswith(f"error: {sentence}")
    assert said.count("\n") == 1
    assert len(said) < 700


def test_a_configuration_file_of_a_number_beyond_all_floats(tmp_path, capsys) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"learning_rate: 1{'0' * 400}\n")
    assert cli.main(["distill", "--data", "x", "--config", str(file)]) == 2
    assert "learning_rate is 1000" in capsys.readouterr().err
