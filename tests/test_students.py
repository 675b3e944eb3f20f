"""Students: where they come from, which of their parameters learn, and what is left of them."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from students import SMALL, TOKENS, arrays, bits, learn, logits
from tiny_models import TINY_CONFIGS, tiny_config, tiny_model

from mlx_distill import InputError
from mlx_distill.distillation.adapters import AdapterConfig, merge_adapters
from mlx_distill.distillation.students import from_config, from_layers, read_config
from mlx_distill.target.layers import layer_list

pytestmark = pytest.mark.usefixtures("not_compiled")  # so many kinds fuse a hundred


@functools.cache
def teacher_of(name: str) -> Any:
    """Return a teacher that several tests have; what is made of it leaves it as it is."""
    return tiny_model(name)


# ------------------------------------------------------------------------------------- beginnings


def test_same_seed_gives_the_same_student() -> None:
    mx.random.seed(77)
    first = from_config(tiny_config("llama"), 5)
    mx.random.seed(78)
    assert bits(from_config(tiny_config("llama"), 5)) == bits(first)
    assert bits(from_config(tiny_config("llama"), 6)) != bits(first)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "abacus"}, "the student's config cannot be used: .*abacus"),
        ({"model_type": "llama"}, "the student's config cannot be used: .*hidden_size"),
        (SMALL | {"num_attention_heads": 0}, "the student's config cannot be used: "),
        (SMALL | {"num_hidden_layers": "two"}, "the student's config cannot be used: "),
    ],
)
def test_configurations_of_no_student(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        from_config(config)


def test_configuration_of_a_file_or_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    assert read_config(path) == read_config(tmp_path) == SMALL
    for text, sentence in (
        ("{", "the config .*config.json cannot be read as JSON: "),
        ("[1]", "the config .*config.json does not hold a JSON object"),
        ('{"hidden_size": 4}', "the config .*config.json lacks the field model_type"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=sentence):
            read_config(path)
    with pytest.raises(InputError, match=r"the config .*nowhere cannot be read as JSON: "):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize("layers", [[0], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_student_of_the_teachers_layers(layers: list[int]) -> None:
    teacher, config = tiny_model("llama"), tiny_config("llama")
    student, own = from_layers(teacher, config, layers)
    assert {name: own[name] for name in config} == config | {"num_hidden_layers": len(layers)}
    assert config == tiny_config("llama")
    assert len(student.layers) == len(layers)  # pyright: ignore
    theirs = arrays(teacher)
    for name, x in arrays(student).items():
        at = re.match(r"model\.layers\.(\d)(.*)", name)
        source = f"model.layers.{layers[int(at[1])]}{at[2]}" if at else name
        assert mx.array_equal(x, theirs[source]).item(), name
    hidden = teacher.model.embed_tokens(TOKENS)  # pyright: ignore
    for layer in layers:
        hidden = teacher.layers[layer](hidden, "causal", None)  # pyright: ignore
    expected = teacher.lm_head(teacher.model.norm(hidden))  # pyright: ignore
    np.testing.assert_allclose(student(TOKENS), expected, atol=1e-4)


def test_entries_of_layers_that_are_left_out_leave_the_configuration() -> None:
    config = tiny_config("llama-sliding")
    kinds = config["layer_types"]
    assert len(set(kinds)) == 2
    student, own = from_layers(tiny_model("llama-sliding"), config, [1, 2])
    assert own["layer_types"] == kinds[1:]
    assert [layer.use_sliding for layer in student.layers] == [False, True]  # pyright: ignore
    config = tiny_config("openelm")
    _, own = from_layers(tiny_model("openelm"), config, [0, 2])
    for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
        assert own[name] == [config[name][0], config[name][2]]
    ends = [5, 6, 7]  # as many as there are layers, and not of them
    _, own = from_layers(tiny_model("llama"), tiny_config("llama") | {"eos_token_id": ends}, [0])
    assert own["eos_token_id"] == ends


@pytest.mark.parametrize("name", [name for name in TINY_CONFIGS if name != "afm7"])
def test_student_of_all_layers_is_the_teacher(name: str) -> None:
    """Of every architecture: under whatever name and wherever it keeps its layers."""
    teacher = teacher_of(name)
    layers = range(len(layer_list(teacher)[1]))
    student, own = from_layers(teacher, tiny_config(name), layers)
    assert own == tiny_config(name)
    np.testing.assert_allclose(logits(student), logits(teacher), atol=1e-4)


# Where the first and the last layer are of one kind and the architecture wants another one, too, or
# a layer shares something with another, or its scale depends on how many there are.
NO_TWO_LAYERS = {
    *("afm7", "llama-sliding", "afmoe", "gemma3n", "gemma4", "gemma4_text", "gpt_oss", "hunyuan"),
    *("laguna", "llama4", "mellum", "mimo_v2_flash", "ministral3", "olmo3", "jamba"),
    *("kimi_k3", "kimi_linear", "lfm2", "lfm2-vl"),
    *("lfm2_moe", "nemotron_h", "plamo2", "recurrent_gemma"),
}


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_student_of_the_first_and_the_last_layer(name: str) -> None:
    """It has layers of the teacher's kinds, or there is a sentence."""
    teacher = teacher_of(name)
    last = len(layer_list(teacher)[1]) - 1
    if name in NO_TWO_LAYERS:
        with pytest.raises(InputError, match=r"teacher's (layers|config)"):
            from_layers(teacher, tiny_config(name), [0, last])
        return
    student, own = from_layers(teacher, tiny_config(name), [0, last])
    again = from_config(own)
    again.update(student.parameters())
    np.testing.assert_allclose(logits(again), logits(student), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layers", "kinds"),
    [
        ("gemma3_text", [0, 1, 2, 5], ["sliding", "sliding", "global", "global"]),
        ("gemma3_text", [0, 2, 5, 8], None),
        ("gemma3_text", [2, 5, 8], ["global", "global", "global"]),
        ("gemma3_text", [0, 8], ["sliding", "global"]),
        ("cohere2", [0, 2, 3, 5], ["sliding", "global", "sliding", "global"]),
        ("cohere2", [0, 2, 5], None),
    ],
)
def test_chosen_layers_keep_their_kinds(
    name: str, layers: list[int], kinds: list[str] | None
) -> None:
    """Every third of nine is global; a period can say some choices, and not others."""
    count = {"num_hidden_layers": 9, "sliding_window_pattern": 3}
    config = tiny_config(name) | count
    teacher = from_config(config)
    if name == "gemma3_text" and layers == [0, 1, 2, 5]:
        kinds = None  # two sliding ones, then two global ones
    if kinds is None:
        with pytest.raises(InputError, match="no student can be made of the teacher's layers"):
            from_layers(teacher, config, layers)
        return
    student, _ = from_layers(teacher, config, layers)
    found = [
        getattr(a, "is_sliding", getattr(a, "use_sliding_window", None))
        for a in (layer.self_attn for layer in layer_list(student)[1])
    ]
    assert ["sliding" if sliding else "global" for sliding in found] == kinds


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([3], "there is no layer 3: the teacher has 3, 0 to 2"),
        ([-1], "there is no layer -1: the teacher has 3, 0 to 2"),
        ([2, 0], "the teacher's layers must be named once, in order, got [2, 0]"),
        ([1, 1], "the teacher's layers must be named once, in order, got [1, 1]"),
        ([], "the teacher's layers must be named once, in order, got []"),
    ],
)
def test_layers_that_make_no_student(layers: list[int], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        from_layers(tiny_model("llama"), tiny_config("llama"), layers)


def test_teachers_whose_layers_cannot_be_taken() -> None:
    config = tiny_config("llama") | {"quantization": {"bits": 4, "group_size": 32}}
    with pytest.raises(InputError, match="cannot be made of a quantised teacher's layers"):
        from_layers(tiny_model("llama"), config, [0])
    with pytest.raises(InputError, match="the teacher's config says no number of layers"):
        from_layers(tiny_model("llama"), {"model_type": "llama"}, [0])


def test_layers_with_adapters_make_no_student_before_they_are_merged() -> None:
    teacher = tiny_model("llama")
    AdapterConfig("lora").apply(teacher)
    with pytest.raises(InputError, match="layers with adapters; merge them first"):
        from_layers(teacher, tiny_config("llama"), [0])
    merge_adapters(teacher)
    assert from_layers(teacher, tiny_config("llama"), [0])


def test_teacher_of_the_layers_does_not_learn_with_the_student(tmp_path: Path) -> None:
    teacher = tiny_model("llama")
    before = bits(teacher)
    student, _ = from_layers(teacher, tiny_config("llama"), [0, 2])
    start = bits(student)
    for x in arrays(student).values():
        x[0] = x[0] + 0.5  # not even what is changed in place
    assert bits(teacher) == before
    learn(tmp_path, student, teacher)
    assert bits(teacher) == before
    assert all(x != start[name] for name, x in bits(student).items())
