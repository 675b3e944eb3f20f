"""Faster generation for any mlx-lm model: draft with a small network, verify with the model."""

# ruff: noqa: E402
from mlx_distill.openblas import load_openblas

load_openblas()  # has to come before the first import of mlx.core

from mlx_distill.checkpoint import load, load_drafter
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.errors import InputError
from mlx_distill.speculation.decoding import CacheConfig
from mlx_distill.speculation.generation import GenerationResponse, generate, stream_generate

__all__ = [
    "CacheConfig",
    "DraftPlan",
    "GenerationResponse",
    "InputError",
    "generate",
    "load",
    "load_drafter",
    "stream_generate",
]
