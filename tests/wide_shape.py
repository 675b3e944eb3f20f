"""A drafter trained at the widths of Llama 3 8B: the measured memory beside the estimate.

    python tests/wide_shape.py --layers 4 --starts 2048

The target has random weights, few layers and everything else of the 8B: what is trained above it
has the real shapes. It computes in float32 on a processor, where half precision would take hours;
the estimate beside it is for bfloat16, as a GPU loads the model. Not collected by pytest: it takes
minutes, and about 18 GB.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx_distill  # the BLAS comes first
from mlx_distill import machine
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.drafter_memory import needed_bytes
from mlx_distill.distillation.drafter_trainer import DrafterTrainer
from mlx_distill.distillation.responses import Response, ResponseConfig
from mlx_distill.target.target import Target
from mlx_distill.training.config import TrainingConfig

import mlx.core as mx  # isort: skip
import numpy as np  # isort: skip
from mlx.utils import tree_map  # isort: skip
from mlx_lm.models import llama  # isort: skip

SHAPE = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336}
SHAPE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
SHAPE |= {"vocab_size": 128_256, "rope_theta": 500_000.0, "tie_word_embeddings": False}
PROMPTS = 20_000


def model_of(num_layers: int) -> Any:
    """Return a model of random weights that are like those of a trained one in size."""
    model: Any = llama.Model(llama.ModelArgs.from_dict({**SHAPE, "num_hidden_layers": num_layers}))
    small = lambda x: mx.random.normal(x.shape) * 0.02 if x.ndim == 2 else x  # noqa: E731
    model.update(tree_map(small, model.parameters()))
    mx.eval(model.parameters())
    return model


def measured(model: Any, config: DrafterTraining, answers: list[Response]) -> dict[str, float]:
    """Return the peak beside the target, and the seconds, of a training."""
    target = Target.of(model)
    mx.set_cache_limit(0)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    trainer = DrafterTrainer(target, answers, config)
    with tempfile.TemporaryDirectory() as folder:
        log = trainer.run(Path(folder) / "work", quiet=False)
    peak = mx.get_peak_memory() - before
    return {"peak_gb": peak / 1e9, "seconds": time.perf_counter() - start, "loss": log[-1]["loss"]}


def estimated(model: Any, config: DrafterTraining, width: int, tokens: int) -> dict[str, float]:
    """Return the estimate's parts in GB, and their sum."""
    names = ("target", "trained", "features", "step")
    sizes = needed_bytes(Target.of(model), config, width, tokens)
    parts = {name: size / 1e9 for name, size in zip(names, sizes, strict=True)}
    return {**parts, "beside_the_target": sum(sizes[1:]) / 1e9}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--starts", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--answers", type=int, default=34)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    model = model_of(arguments.layers)
    config = DrafterTraining(
        starts=arguments.starts,
        held_out=2,
        batch_size=8,
        feature_gb=0.3,
        responses=ResponseConfig(max_tokens=arguments.length),
        training=TrainingConfig(steps=arguments.steps, evaluate_every=arguments.steps),
    )
    random = np.random.default_rng(0)
    ids = random.integers(
        3, SHAPE["vocab_size"], size=(arguments.answers, arguments.length)
    ).tolist()
    width, tokens = arguments.length + 3, arguments.answers * arguments.length
    found = {
        "estimated": estimated(model, config, width, tokens),
        "measured": measured(model, config, [Response([1, 5, 7], one) for one in ids]),
    }
    model.set_dtype(mx.bfloat16)
    many = PROMPTS * arguments.length
    found["estimated_bfloat16_20000_answers"] = estimated(model, config, width, many)
    print(json.dumps({**found, "starts": arguments.starts, **machine.provenance()}, indent=1))


if __name__ == "__main__":
    assert mlx_distill
    main()
