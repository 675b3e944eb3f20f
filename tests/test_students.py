"""Students: where they come from, which of their parameters learn, and what is left of them."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import TINY_CONFIGS, tiny_config, tiny_model

import mlx_distill
from mlx_distill import InputError, TrainingConfig
from mlx_distill.checkpoint import bundled
from mlx_distill.data.texts import Text
from mlx_distill.distillation.adapters import AdapterConfig, merge_adapters
from mlx_distill.distillation.checkpointing import checkpoint_layers
from mlx_distill.distillation.exporting import ExportConfig, compact, export
from mlx_distill.distillation.students import from_config, from_layers, read_config
from mlx_distill.distillation.training import distill
from mlx_distill.hashes import tokenizer_hash
from mlx_distill.target.layers import layer_list
from mlx_distill.training.checkpoints import checkpoints

TOKENS = mx.array([[5, 9, 33, 2, 7], [60, 1, 1, 4, 90]])
RANDOM = np.random.default_rng(0)
TEXTS = [Text(RANDOM.integers(1, 97, n).tolist()) for n in (12, 9, 17, 20, 8, 11)]
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return mlx_lm.utils.load_tokenizer(bundled("stories-14m"))


def arrays(network: nn.Module) -> dict[str, Any]:
    return dict(tree_flatten(network.parameters()))


def trained(network: nn.Module) -> dict[str, Any]:
    return dict(tree_flatten(network.trainable_parameters()))


def bits(network: nn.Module) -> dict[str, bytes]:
    return {name: bytes(memoryview(x)) for name, x in arrays(network).items()}


def clear(network: nn.Module) -> nn.Module:
    """Widen random weights, so that some tokens are clearly the best ones."""
    network.update(tree_map(lambda x: 4 * x if x.ndim > 1 else x, network.parameters()))
    return network


def learn(folder: Path, student: Any, teacher: Any, **options: Any) -> None:
    steps = {"steps": 4, "learning_rate": 1e-2, "checkpoint_every": 2}
    training = TrainingConfig(**{**steps, **options})
    distill(
        student, teacher, TEXTS, folder=folder, training=training, batch_size=2, quiet=True, seed=1
    )


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


def logits(network: nn.Module) -> mx.array:
    """Return logits for a text that is longer than every window of the tiny models."""
    tokens = mx.array([[(7 * i) % 90 + 1 for i in range(40)]])
    return network(tokens, cache=make_prompt_cache(network))


@pytest.mark.parametrize("name", [name for name in TINY_CONFIGS if name != "afm7"])
def test_student_of_all_layers_is_the_teacher(name: str) -> None:
    """Of every architecture: under whatever name and wherever it keeps its layers."""
    teacher = tiny_model(name)
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
    teacher = tiny_model(name)
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


# --------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_adapters_learn(kind: str, tmp_path: Path) -> None:
    student = tiny_model("llama")
    base = bits(student)
    AdapterConfig(kind, lora_rank=4, lora_layers=2).apply(student)
    names = {".lora_a", ".lora_b", *((".m",) if kind == "dora" else ())}
    assert {name[name.rindex(".") :] for name in trained(student)} == names
    assert {name.split(".")[2] for name in trained(student)} == {"1", "2"}
    learn(tmp_path, student, tiny_model("llama", seed=1))
    after = bits(student)
    for name, x in base.items():
        inner = re.sub(r"(.*)\.(weight|bias)$", r"\1.linear.\2", name)
        assert after.get(name, after.get(inner)) == x, name
    saved = mx.load(str(checkpoints(tmp_path)[-1] / "network.safetensors"))
    assert set(saved) == {f"student.{name}" for name in trained(student)}
    size = (checkpoints(tmp_path)[-1] / "network.safetensors").stat().st_size
    assert size < 0.5 * sum(map(len, base.values()))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_killed_adapters_go_on_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    found = []
    for name in ("whole", "parts"):
        for steps in (4,) if name == "whole" else (2, 4):
            student = tiny_model("llama")
            mx.random.seed(len(found) + steps)  # of whatever ran before
            AdapterConfig(kind, lora_rank=4).apply(student)
            learn_some(tmp_path / name, student, steps)
        found.append(bits(student))
    assert found[0] == found[1]


class Killed(Exception):
    pass


def learn_some(folder: Path, student: Any, steps: int) -> None:
    class Kill:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if info["iteration"] == steps + 1:
                raise Killed

    training = TrainingConfig(steps=4, learning_rate=1e-2, checkpoint_every=2)
    teacher = tiny_model("llama", seed=1)
    try:
        distill(
            *(student, teacher, TEXTS),
            folder=folder,
            training=training,
            batch_size=2,
            callback=Kill(),
            quiet=True,
        )
    except Killed:
        assert steps < 4


def test_all_layers_have_adapters() -> None:
    student = tiny_model("llama")
    AdapterConfig("lora").apply(student)
    assert {name.split(".")[2] for name in trained(student)} == {"0", "1", "2"}
    whole = tiny_model("llama")
    AdapterConfig().apply(whole)
    assert set(trained(whole)) == set(arrays(whole))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"fine_tune": "some"}, "fine_tune must be full, lora or dora, got some"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"lora_layers": 0}, "lora_layers must be -1, or between 1 and 10,000, got 0"),
        ({"lora_layers": -2}, "lora_layers must be -1, or between 1 and 10,000, got -2"),
    ],
)
def test_adapters_that_mean_nothing(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        AdapterConfig(**fields)


def test_quantised_student_learns_by_adapters_alone() -> None:
    student = from_config(SMALL)
    compact(student, SMALL, ExportConfig(export_bits=4))
    with pytest.raises(InputError, match="a quantised student cannot be trained; train adapters"):
        AdapterConfig().apply(student)
    AdapterConfig("lora").apply(student)
    names = [name for name, _ in tree_flatten(student.trainable_parameters())]
    assert names
    assert all("lora" in name for name in names)


def test_more_adapters_than_layers() -> None:
    with pytest.raises(InputError, match="lora_layers is 4, the student has 3"):
        AdapterConfig("lora", lora_layers=4).apply(tiny_model("llama"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_adapters_answer_as_before(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    config = tiny_config("llama") | {"vocab_size": 4096}
    student = clear(from_config(config))
    plain = student(TOKENS)
    AdapterConfig(kind, lora_rank=4).apply(student)
    np.testing.assert_allclose(student(TOKENS), plain, atol=1e-4)
    learn(tmp_path / "work", student, clear(from_config(config, seed=1)))
    adapted = student(TOKENS)
    assert mx.abs(adapted - plain).max().item() > 0.1  # pyright: ignore
    num_values = sum(x.size for x in arrays(from_config(config)).values())
    export(
        tmp_path / "student",
        student,
        compact(student, config, ExportConfig("float32")),
        tokenizer,
        {},
    )
    model, _ = mlx_lm.load(str(tmp_path / "student"))[:2]
    np.testing.assert_allclose(model(TOKENS), adapted, atol=2e-3)
    assert sum(x.size for x in arrays(model).values()) == num_values
    assert not any("lora" in name for name in arrays(model))
    merge_adapters(model)  # there are none left


def test_adapters_on_a_quantised_base(tmp_path: Path, tokenizer: Any) -> None:
    """As mlx-lm does: the base stays as it is, and merged weights are quantised again."""
    config = tiny_config("llama") | {"vocab_size": 4096}
    student = clear(from_config(config))
    nn.quantize(student, group_size=32, bits=8)
    config |= {"quantization": {"group_size": 32, "bits": 8}}
    AdapterConfig("lora", lora_rank=4).apply(student)
    assert all("lora" in name for name in trained(student))
    learn(tmp_path / "work", student, clear(from_config(tiny_config("llama"), seed=1)))
    adapted = student(TOKENS)
    export(
        tmp_path / "student",
        student,
        compact(student, config, ExportConfig("float32")),
        tokenizer,
        {},
    )
    model, _ = mlx_lm.load(str(tmp_path / "student"))[:2]
    difference = mx.abs(nn.softmax(model(TOKENS)) - nn.softmax(adapted)).max().item()
    assert difference < 0.05  # pyright: ignore


# ----------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Return the folder of a student."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    files = {"README.md": "# Ä student\n", "curves.png": b"\x89PNG\xff"}
    student = clear(from_config(SMALL))
    own = compact(student, SMALL, ExportConfig("float16"))
    export(folder, student, own, tokenizer, files)
    return folder


def test_exported_folder_is_a_model(exported: Path, tokenizer: Any) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer_config.json"} <= names
    assert not exported.with_name("student.writing").exists()
    config = json.loads((exported / "config.json").read_text())
    assert config == {k: v for k, v in SMALL.items() if k != "torch_dtype"} | {"dtype": "float16"}
    assert (exported / "README.md").read_text(encoding="utf-8") == "# Ä student\n"
    assert (exported / "curves.png").read_bytes() == b"\x89PNG\xff"
    model, again = mlx_lm.load(str(exported))[:2]
    assert {x.dtype for x in arrays(model).values()} == {mx.float16}
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    for text in ("Once upon a time", " two  spaces", "Ä", "<s>"):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.eos_token_ids == tokenizer.eos_token_ids
    found, _ = mlx_distill.load(exported)
    np.testing.assert_allclose(found(TOKENS), clear(from_config(SMALL))(TOKENS), atol=0.05)


def test_exported_student_writes_as_a_target(exported: Path) -> None:
    model, tokenizer = mlx_distill.load(exported)
    expected = mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=12)
    assert len(expected) > 3
    found = mlx_distill.generate(model, tokenizer, "Once upon a time", max_tokens=12)
    assert found == expected


def test_exported_student_drafts_in_mlx_lm(exported: Path) -> None:
    draft, _ = mlx_distill.load(exported)
    model, tokenizer = mlx_distill.load(bundled("stories-14m"))
    expected = mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=12)
    stream = mlx_lm.stream_generate(
        model, tokenizer, "Once upon a time", max_tokens=12, draft_model=draft, num_draft_tokens=2
    )
    assert "".join(response.text for response in stream) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_of_the_type_that_is_said(dtype: str, tmp_path: Path, tokenizer: Any) -> None:
    student = from_config(SMALL)
    export(
        tmp_path / "student", student, compact(student, SMALL, ExportConfig(dtype)), tokenizer, {}
    )
    saved = mx.load(str(tmp_path / "student" / "model.safetensors"))
    assert isinstance(saved, dict)
    assert {str(x.dtype) for x in saved.values()} == {f"mlx.core.{dtype}"}
    assert json.loads((tmp_path / "student" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_export(bits: int, tmp_path: Path, tokenizer: Any) -> None:
    expected = clear(from_config(SMALL))

    def fits(_: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0

    nn.quantize(expected, bits=bits, class_predicate=fits)
    student = clear(from_config(SMALL))
    export(
        tmp_path / "student",
        student,
        compact(student, SMALL, ExportConfig("float32", bits)),
        tokenizer,
        {},
    )
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["quantization"]["bits"] == bits
    model, _ = mlx_lm.load(str(tmp_path / "student"))[:2]
    q_proj = model.layers[0].self_attn.q_proj
    assert isinstance(q_proj, nn.QuantizedLinear)
    assert q_proj.bits == bits
    assert mx.array_equal(model(TOKENS), expected(TOKENS)).item()


def test_student_that_computed_twice_is_exported_as_any(tmp_path: Path, tokenizer: Any) -> None:
    names = []
    for twice in (False, True):
        student = from_config(SMALL)
        if twice:
            checkpoint_layers(student)
        learn(tmp_path / f"work-{twice}", student, from_config(SMALL, seed=1))
        folder = tmp_path / f"student-{twice}"
        own = compact(student, SMALL, ExportConfig("float32"))
        export(folder, student, own, tokenizer, {})
        model, _ = mlx_lm.load(str(folder))[:2]
        names.append(arrays(model))
    assert set(names[0]) == set(names[1])
    for name, x in names[0].items():
        np.testing.assert_allclose(names[1][name], x, atol=1e-3, err_msg=name)


def full_disk(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fails", ["weights", "short weights", "config", "tokenizer", "card"])
def test_failing_export_leaves_nothing_behind(
    fails: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = mx.save_safetensors

    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("[save] Failed to write 1048576 bytes")

    def short(path: str, *args: Any, **options: Any) -> None:
        save(path, *args, **options)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) - 8)

    files = {"README.md": "card"}
    student = from_config(SMALL)
    config = compact(student, SMALL, ExportConfig("float32"))
    with monkeypatch.context() as patch:
        if fails == "weights":
            patch.setattr(mx, "save_safetensors", broken)
        elif fails == "short weights":
            patch.setattr(mx, "save_safetensors", short)
        elif fails == "config":
            patch.setattr("mlx_distill.distillation.exporting.save_config", full_disk)
        elif fails == "tokenizer":
            kind = type(tokenizer.save_pretrained.__self__)  # what the wrapper wraps
            patch.setattr(kind, "save_pretrained", full_disk)
        else:
            patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(InputError, match="student could not be written: ") as error:
            export(tmp_path / "student", student, config, tokenizer, files)
        reasons = {"weights": "Failed to write", "short weights": "is damaged"}
        assert reasons.get(fails, "No space left on device") in str(error.value)
    assert not list(tmp_path.iterdir())
    export(tmp_path / "student", student, config, tokenizer, files)  # there is room again
    model, _ = mlx_lm.load(str(tmp_path / "student"))[:2]
    assert mx.array_equal(model(TOKENS), from_config(SMALL)(TOKENS)).item()


def test_export_is_not_confused_by_what_a_kill_left(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "student.writing").mkdir()
    (tmp_path / "student.writing" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    export(tmp_path / "student", from_config(SMALL), SMALL, tokenizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert len(list((tmp_path / "student").glob("*.safetensors"))) == 1
