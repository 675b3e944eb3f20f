"""Texts of the command ``generate``: statistics, chats, adapters, interrupts."""

import importlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from commanding import WHOLE, last_line
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_distill
from mlx_distill import (
    GenerationResponse,
    benchmark,
    calibrate,
    checkpoint,
)
from mlx_distill.checkpoint import bundled

pytestmark = pytest.mark.usefixtures("no_hub", "bundled_once")


# The package has a function of that name, too.
generate = importlib.import_module("mlx_distill.generate")


COUNTERS = (
    "prompt_tokens",
    "prompt_tps",
    "generation_tokens",
    "generation_tps",
    "peak_memory",
    "finish_reason",
    "target_calls",
    "tokens_per_call",
    "drafted_tokens",
    "accepted_tokens",
    "verified_tokens",
    "beam_tokens",
)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[{{ name or 'assistant' }}]{% endif %}"
)


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a comparison begin after some cycles; its speeds are not looked at."""
    monkeypatch.setattr(generate, "WARM_UP", 8)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, bundled_part: Path) -> Path:
    """Return two layers of the bundled model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    folder.mkdir()
    for file in bundled_part.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# -------------------------------------------------------------------------------------- generate


def test_generate_writes_the_text_and_the_statistics(
    capsys: pytest.CaptureFixture[str], expected: str
) -> None:
    assert generate.main(["--max-tokens", "24"]) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    for word in ("Prompt: 5 tokens", "Generation: 24 tokens", "tokens per call", "Peak memory"):
        assert word in err
    assert "Acceptance by depth" in err


def test_generate_json_holds_the_whole_run(
    capsys: pytest.CaptureFixture[str], expected: str
) -> None:
    arguments = ["--max-tokens", "24", "--json", "--seed", "3", "--beam-width", "3"]
    assert generate.main([*arguments, "--draft-length", "4", "--nodes", "6"]) == 0
    run = last_line(capsys.readouterr().out)
    assert run["text"] == expected
    assert set(COUNTERS) <= set(run)
    assert run["generation_tokens"] == 24
    assert run["tokens_per_call"] == 24 / run["target_calls"]
    assert run["verified_tokens"] == run["drafted_tokens"] + run["target_calls"]
    assert run["finish_reason"] == "length"
    assert run["interrupted"] is False
    assert run["seconds"] > 0
    assert run["comparison"] is None
    assert run["config"]["max_tokens"] == 24
    assert run["config"]["beam_width"] == 3
    assert run["config"]["seed"] == 3
    assert {"python", "mlx", "mlx-lm", "mlx-distill"} <= set(run["versions"])
    assert {"system", "processor", "cores", "memory_bytes", "device"} <= set(run["machine"])


def test_generate_without_drafter(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    assert generate.main(["--max-tokens", "24", "--no-drafter", "--json"]) == 0
    out, err = capsys.readouterr()
    run = last_line(out)
    assert run["text"] == expected
    assert run["target_calls"] == run["verified_tokens"] == 23
    assert run["drafted_tokens"] == 0
    assert "Acceptance" not in err


def test_generate_finds_the_bundled_drafter_of_a_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model", str(bundled("stories-14m")), "--max-tokens", "12", "--json"]
    assert generate.main(flags) == 0
    out, err = capsys.readouterr()
    assert out.startswith(WHOLE)
    assert err.startswith("drafting with the bundled stories-14m-redrafter,")
    assert last_line(out)["drafted_tokens"] > 0
    assert generate.main([*flags, "--no-drafter"]) == 0
    out, err = capsys.readouterr()
    assert "drafting with" not in err
    assert last_line(out)["drafted_tokens"] == 0


@pytest.mark.parametrize("change", [{"tokenizer_hash": "another"}, {"num_layers": 9}], ids=str)
@pytest.mark.parametrize("main", [generate.main, benchmark.main, calibrate.main])
def test_a_bundled_drafter_of_another_target_is_not_used(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    main: Callable[[list[str]], int],
    change: dict[str, Any],
) -> None:
    """A student has its target's tokenizer and width, but fewer layers."""
    flags = ["--model", str(bundled("stories-14m"))]
    folder = tmp_path / "models" / "other"
    shutil.copytree(bundled("stories-14m-redrafter"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["target"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(checkpoint, "PACKAGE", tmp_path)
    if main is generate.main:
        assert main([*flags, "--max-tokens", "2"]) == 0
        assert "no drafter is named and none that is bundled fits" in capsys.readouterr().err
    else:
        assert main(flags) == 2
        assert "no bundled drafter fits this model; name one" in capsys.readouterr().err


def test_generate_compares_with_mlx_lm(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    assert generate.main(["--max-tokens", "24", "--compare", "--json"]) == 0
    out, err = capsys.readouterr()
    run = last_line(out)
    assert run["text"] == expected
    assert run["comparison"]["first_difference"] is None
    assert run["comparison"]["margin"] is None
    assert run["comparison"]["generation_tps"] > 0
    ratio = run["generation_tps"] / run["comparison"]["generation_tps"]
    assert run["comparison"]["speedup"] == pytest.approx(ratio)
    assert "mlx-lm alone" in err


def test_generate_compares_with_the_same_cache_and_law(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--max-tokens", "12", "--compare", "--json", "--verbose", "false"]
    cache = ["--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"]
    assert generate.main([*arguments, *cache]) == 0
    out, err = capsys.readouterr()
    assert last_line(out)["comparison"]["first_difference"] is None
    assert err == ""
    assert generate.main([*arguments, "--temp", "1", "--top-p", "0.9", "--seed", "1"]) == 0
    assert last_line(capsys.readouterr().out)["comparison"]["speedup"] > 0


@pytest.mark.parametrize("flags", [["--stop", "day"], ["--max-kv-size", "16"]])
def test_generate_compares_what_was_written(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """What ends at a stop text is no other text, and mlx-lm remembers as little as we do."""
    assert generate.main(["--max-tokens", "40", "--compare", "--json", *flags]) == 0
    out, err = capsys.readouterr()
    assert last_line(out)["comparison"]["first_difference"] is None
    assert "differ from" not in err


def test_generate_reads_stdin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, expected: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time"))
    assert generate.main(["--prompt", "-", "--max-tokens", "24"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_stop_text_may_be_a_lines_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written as in the prompt."""
    stream, asked = generate.stream_generate, []

    def recorded(*args: Any, stop: Any, **options: Any) -> Any:
        asked.extend(stop)
        return stream(*args, stop=stop, **options)

    monkeypatch.setattr(generate, "stream_generate", recorded)
    flags = ["--max-tokens", "2", "--no-drafter", "--stop", r"\n", r"a\tb", "end"]
    assert generate.main(flags) == 0
    assert asked == ["\n", "a\tb", "end"]


@pytest.mark.parametrize("by_id", [False, True])
def test_more_tokens_end_an_answer(
    capsys: pytest.CaptureFixture[str], bundled_part: Path, by_id: bool
) -> None:
    """As mlx_lm.generate's --extra-eos-token; what is no token is none, and not the unknown one."""
    model, tokenizer = mlx_distill.load(bundled_part)
    flags = ["--model", str(bundled_part), "--no-drafter", "--max-tokens", "12", "--json"]
    responses = mlx_lm.stream_generate(model, tokenizer, "Once upon a time", max_tokens=8)
    ids = [response.token for response in responses]
    name = str(ids[5]) if by_id else tokenizer.convert_ids_to_tokens(ids[5])
    assert generate.main([*flags, "--extra-eos-token", name]) == 0
    run = last_line(capsys.readouterr().out)
    assert run["generation_tokens"] == ids.index(ids[5]) + 1
    assert run["finish_reason"] == "stop"
    for wrong in ("<no such token>", "1000000", "-1"):
        assert generate.main([*flags, f"--extra-eos-token={wrong}"]) == 2
        assert f"--extra-eos-token '{wrong}' is no token" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [None, 8])
def test_a_prompt_goes_on_behind_a_saved_one(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int | None
) -> None:
    """As with mlx_lm.generate's --prompt-cache-file: its tokens, drafted for or not."""
    file = save_prompt(chat_model, tmp_path / "cache.safetensors", bits)
    model, tokenizer = mlx_distill.load(chat_model)
    chat = [{"role": "user", "content": "Why?"}]
    opened = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    suffix = tokenizer.encode(opened[opened.index("Why?") :], add_special_tokens=False)
    cache = load_prompt_cache(str(file))
    plain = mlx_lm.stream_generate(model, tokenizer, suffix, max_tokens=16, prompt_cache=cache)
    expected = "".join(response.text for response in plain)
    flags = ["--prompt-cache-file", str(file), "--prompt", "Why?", "--max-tokens", "16"]
    for more in (["--no-drafter"], ["--draft", "ngram"], ["--model", str(chat_model)]):
        assert generate.main([*flags, *more, "--json"]) == 0
        run = last_line(capsys.readouterr().out)
        assert run["text"] == expected
        assert run["prompt_tokens"] == len(suffix)


def test_a_saved_prompt_that_cannot_be_used_is_refused(
    chat_model: Path, bundled_part: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_prompt(chat_model, tmp_path / "cache.safetensors", 8)
    text, half = tmp_path / "text.safetensors", tmp_path / "half.safetensors"
    text.write_text("no cache")
    half.write_bytes(file.read_bytes()[:-100])
    weights = bundled_part / "model.safetensors"
    for given, more, sentence in (
        (file, ["--model", str(bundled_part)], f"is a prompt cache of {chat_model}"),
        (file, ["--kv-bits", "4"], "is quantised to 8 bits in groups of 32"),
        (file, ["--system-prompt", "Be kind."], "leave --system-prompt out"),
        (file, ["--compare"], "leave --compare out"),
        (file, ["--prompt", "", "--no-drafter"], "the prompt is empty"),
        (tmp_path / "none.safetensors", [], "none.safetensors"),
        (text, [], "text.safetensors"),
        (half, [], "half.safetensors"),
        (weights, [], "is no prompt cache of mlx-lm"),
    ):
        assert generate.main(["--prompt-cache-file", str(given), "--prompt", "Why?", *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert sentence in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(("config", "status"), [("5", 0), ('{"eos_token": 5}', 0), ("{", 2)])
def test_what_a_saved_prompt_says_of_its_tokenizer(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, status: int
) -> None:
    file = save_prompt(chat_model, tmp_path / "cache.safetensors", None, config)
    flags = ["--prompt-cache-file", str(file), "--prompt", "Why?", "--max-tokens", "2"]
    assert generate.main([*flags, "--no-drafter"]) == status
    assert ("tokenizer_config is damaged" in capsys.readouterr().err) == (status == 2)


def save_prompt(
    folder: Path, file: Path, bits: int | None, config: str = '{"trust_remote_code": true}'
) -> Path:
    """Write what mlx_lm.cache_prompt writes of a user's turn that is not over."""
    model, tokenizer = mlx_distill.load(folder)
    chat = [{"role": "user", "content": "Once upon a time there was a dog."}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    cache = make_prompt_cache(model)
    model(mx.array([prompt]), cache=cache)
    if bits:
        cache = [layer.to_quantized(group_size=32, bits=bits) for layer in cache]
    about = {"model": str(folder), "tokenizer_config": config}
    save_prompt_cache(str(file), cache, about)
    return file


def test_generate_stops_at_texts(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    stop = expected[10:14]
    assert generate.main(["--max-tokens", "24", "--stop", stop, "never", "--json"]) == 0
    run = last_line(capsys.readouterr().out)
    assert run["text"] == expected[: expected.find(stop)]
    assert run["finish_reason"] == "stop"


def test_generate_repeats_with_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (5, 5, 6):
        arguments = ["--temp", "1.2", "--top-k", "50", "--min-p", "0.01", "--seed", str(seed)]
        assert generate.main([*arguments, "--max-tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_shows_the_draft(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, expected: str
) -> None:
    """Colours where they are understood, and the same text everywhere."""
    assert generate.main(["--max-tokens", "24", "--show-draft"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert generate.main(["--max-tokens", "24", "--show-draft", "--json"]) == 0
    out = capsys.readouterr().out
    run = last_line(out)
    green = out.count("\x1b[32m")
    assert 0 < green <= run["accepted_tokens"]
    shown = out.rsplit("\n", 2)[0]
    shown = shown.replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert shown == "\x1b[2mOnce upon a time" + expected  # what it goes on with, dimmed


class Fake:
    """Stands in for ``stream_generate``: hands out pieces, then ends or raises."""

    def __init__(self, pieces: list[str], error: BaseException | None = None):
        self.pieces = pieces
        self.error = error

    def __call__(self, *args: Any, **options: Any) -> Iterator[GenerationResponse]:
        for count, piece in enumerate(self.pieces, start=1):
            yield GenerationResponse(
                text=piece,
                token=count,
                logprobs=mx.zeros(4),
                from_draft=count % 2 == 0,
                prompt_tokens=5,
                prompt_tps=1.0,
                generation_tokens=count,
                generation_tps=1.0,
                peak_memory=0.1,
                finish_reason=None,
                target_calls=count,
                tokens_per_call=1.0,
                drafted_tokens=7 * count,
                accepted_tokens=0,
                verified_tokens=8 * count,
                beam_tokens=9 * count,
                acceptance_by_depth=(0.0,),
            )
        if self.error is not None:
            raise self.error


def test_generate_prints_texts_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tabs, trailing blanks, markup, long lines: what the model wrote is what is printed."""
    pieces = ["if x:\n", "\treturn", " [bold]1[/bold]  \n", ":smile: ", "日本", "\r\n", "w " * 200]
    monkeypatch.setattr(generate, "stream_generate", Fake(pieces))
    for flags in ([], ["--show-draft"]):
        assert generate.main(["--verbose", "f", *flags]) == 0
        assert capsys.readouterr().out == "".join(pieces) + "\n"


def test_generate_ends_at_ctrl_c_with_statistics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Fake(["one ", "two"], KeyboardInterrupt())
    monkeypatch.setattr(generate, "stream_generate", stream)
    assert generate.main(["--json"]) == 130
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "one two"
    run = last_line(out)
    assert run["interrupted"] is True
    assert run["text"] == "one two"
    assert run["generation_tokens"] == 2
    assert "Generation: 2 tokens" in err
    assert "Traceback" not in err


def test_generate_ends_at_ctrl_c_before_the_first_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "stream_generate", Fake([], KeyboardInterrupt()))
    assert generate.main(["--json"]) == 130
    out, err = capsys.readouterr()
    assert last_line(out)["text"] == ""
    assert "No text was written" in err


def test_generate_into_a_closed_pipe() -> None:
    """As in ``| head -1``: no traceback."""
    command = [sys.executable, "-m", "mlx_distill.generate", "--max-tokens", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(8)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(60) == 0


# --------------------------------------------------------------------------------- chat templates


def run_chat(capsys: pytest.CaptureFixture[str], model: Path, *flags: str) -> dict[str, Any]:
    arguments = ["--model", str(model), "--no-drafter", "--max-tokens", "2", "--json"]
    assert generate.main([*arguments, "--prompt", "Hello", *flags]) == 0
    return last_line(capsys.readouterr().out)


def test_chat_template(
    capsys: pytest.CaptureFixture[str], chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoded prompts are those that mlx-lm's tokenizer makes of the same chats."""
    seen = []
    stream = generate.stream_generate

    def recording(model: Any, tokenizer: Any, prompt: list[int], **options: Any) -> Any:
        seen.append(tokenizer.decode(prompt))
        return stream(model, tokenizer, prompt, **options)

    monkeypatch.setattr(generate, "stream_generate", recording)
    run_chat(capsys, chat_model)
    run_chat(capsys, chat_model, "--system-prompt", "Be kind")
    run_chat(capsys, chat_model, "--chat-template-config", '{"name": "Lily"}')
    run_chat(capsys, chat_model, "--ignore-chat-template")
    run_chat(capsys, chat_model, "--prefill-response", "Well,")
    assert seen[0].endswith("[user] Hello\n[assistant]")
    assert seen[1].endswith("[system] Be kind\n[user] Hello\n[assistant]")
    assert seen[2].endswith("[user] Hello\n[Lily]")
    assert seen[3].endswith("Hello")
    assert seen[4].endswith("[user] Hello\n[assistant] Well,")
    assert "[" not in seen[3]
    assert all(text.count("<s>") == 1 for text in seen)


def test_chat_prompt_is_encoded_as_mlx_lm_encodes_it(
    capsys: pytest.CaptureFixture[str], chat_model: Path
) -> None:
    tokenizer = mlx_lm.utils.load_tokenizer(chat_model)
    messages = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert run_chat(capsys, chat_model)["prompt_tokens"] == len(ids)


def test_a_draft_model_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that drafts for itself is always right."""
    model = str(bundled("stories-4m"))
    options = ["--model", model, "--draft-model", model, "--num-draft-tokens", "3"]
    options += ["--max-tokens", "14", "--json"]
    assert generate.main([*options, "--compare"]) == 0
    run = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run["comparison"]["first_difference"] is None
    assert run["generation_tokens"] == 14
    assert run["target_calls"] == 4  # 4 + 4 + 4 tokens, and 1, behind the first
    assert run["drafted_tokens"] == 4 * 3
    assert generate.main([*options, "--draft", "ngram+drafter", "--no-calibrate"]) == 0
    both = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert both["text"] == run["text"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num-draft-tokens", "0"], "num_draft_tokens must be at least 1, got 0"),
        (
            ["--drafter", "a", "--draft-model", "b"],
            "--drafter and --draft-model exclude each other",
        ),
        (["--draft-model", "nowhere"], "there is no folder nowhere"),
        (["--draft", "ngram", "--draft-model", "b"], "--draft ngram takes no --draft-model"),
    ],
)
def test_draft_models_that_cannot_be(
    capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert generate.main(flags) == 2
    assert sentence in capsys.readouterr().err


def test_tokenizers_of_draft_models_are_compared_by_what_they_encode(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One with more tokens, which no text has, is the same; one that splits words is another.

    So is one that gives two words each other's numbers.
    """
    options = ["--max-tokens", "4", "--json", "--draft-model", str(tmp_path / "draft")]
    shutil.copytree(bundled("stories-4m"), tmp_path / "draft")
    file = tmp_path / "draft" / "tokenizer.json"
    known = json.loads(file.read_text())
    token = {"id": 4096, "content": "<|pad|>", "special": True, "normalized": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    known["added_tokens"].append(token | flags)
    file.write_text(json.dumps(known))
    assert generate.main(options) == 0
    vocab, words = known["model"]["vocab"], ["\u2581It", "\u2581loo"]
    swapped = dict(zip(words, [vocab[word] for word in words[::-1]], strict=True))
    changed = {**known["model"], "vocab": {**vocab, **swapped}}
    file.write_text(json.dumps({**known, "model": changed}))
    assert generate.main(options) == 2
    assert "they encode 'loo' differently" in capsys.readouterr().err
    known["model"]["merges"] = known["model"]["merges"][:500]
    file.write_text(json.dumps(known))
    assert generate.main(options) == 2
    assert "they encode 'Once upon a time there w' differently" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return adapters for the bundled model, as mlx-lm writes them; they change what it says."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model, _ = mlx_distill.load(bundled("stories-14m"))
    linear_to_lora_layers(model, 2, settings)
    mx.random.seed(1)
    weights = {
        name: mx.random.normal(value.shape)
        for name, value in tree_flatten(model.parameters())
        if "lora_" in name
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder


def test_adapters_are_those_of_mlx_lm(
    capsys: pytest.CaptureFixture[str], adapters: Path, expected: str
) -> None:
    model, tokenizer = mlx_lm.load(str(bundled("stories-14m")), adapter_path=str(adapters))
    model.set_dtype(mx.float32)
    text = mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=12)
    assert not expected.startswith(text)
    for flags in (["--no-drafter"], []):
        arguments = ["--adapter-path", str(adapters), "--max-tokens", "12", *flags]
        assert generate.main(arguments) == 0
        assert capsys.readouterr().out == text + "\n"


def test_adapters_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--adapter-path", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
