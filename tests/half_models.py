"""Small language models in the types that models for GPUs come in."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_distill.checkpoint import bundled

TYPES = ("float16", "bfloat16", "4-bit")
GROUP = {"group_size": 32, "bits": 4, "mode": "affine"}
TOKENIZER = bundled("stories-14m")
# A trained drafter of the published form. It needs none of the target's inner layers, and so fits
# models that have few of the bundled one's.
REFERENCE = Path(__file__).parent / "reference_drafter"
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder: Path, name: str, weights_type: str) -> Path:
    """Write a model's folder in a type; the values of all types come from the same weights.

    Args:
        folder: Must not exist.
        name: ``tiny`` for two random layers of width 64, or the name of a bundled model.
        weights_type: One of `TYPES`; 4 bits are affine groups of 32 with bfloat16 scales:
            with float16 a CPU takes five times as long.
    """
    model, config = (tiny_llama(), dict(TINY)) if name == "tiny" else _bundled(name)
    name = "float16" if weights_type == "float16" else "bfloat16"
    model.set_dtype(getattr(mx, name))
    config["torch_dtype"] = name
    if weights_type == "4-bit":
        nn.quantize(model, **GROUP)
        config["quantization"] = config["quantization_config"] = GROUP
    folder.mkdir(parents=True)
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    return folder


def write_part(folder: Path, name: str, layers: tuple[int, ...]) -> Path:
    """Write a folder with some layers of a bundled model, in the type that it is stored in."""
    model, config = _bundled(name)
    model["model"].layers = [model["model"].layers[number] for number in layers]
    shutil.copytree(bundled(name), folder)
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(layers)}))
    return folder


def tiny_llama(**fields: Any) -> llama.Model:
    """Return a model whose distributions are clear: they differ from each other and from even."""
    model = llama.Model(llama.ModelArgs.from_dict(TINY | fields))
    mx.random.seed(7)
    wide = [
        (name, 0.2 * mx.random.normal(value.shape) if value.ndim > 1 else value)
        for name, value in tree_flatten(model.parameters())
    ]
    model.load_weights(wide)
    model.eval()
    return model


def _bundled(name: str) -> tuple[nn.Module, dict[str, Any]]:
    config = json.loads((bundled(name) / "config.json").read_text())
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights(str(bundled(name) / "model.safetensors"))
    return model, config
