"""Make language models faster with drafters of their own, and smaller by distillation."""

# ruff: noqa: E402
from mlx_distill.openblas import load_openblas

load_openblas()  # has to come before the first import of mlx.core

from mlx_distill.checkpoint import load
from mlx_distill.data.encoding import read_texts
from mlx_distill.distillation.distiller import Examples
from mlx_distill.distillation.exporting import ExportConfig, export_student
from mlx_distill.distillation.training import Distilled, distill
from mlx_distill.drafters.ngram import NGramDrafter
from mlx_distill.drafters.packing import quantize_drafter
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.errors import InputError
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.generation import generate, stream_generate
from mlx_distill.speculation.responses import GenerationResponse
from mlx_distill.training.config import TrainingConfig

__all__ = [
    "CacheConfig",
    "Distilled",
    "DraftPlan",
    "Examples",
    "ExportConfig",
    "GenerationResponse",
    "InputError",
    "NGramDrafter",
    "TrainingConfig",
    "distill",
    "export_student",
    "generate",
    "load",
    "load_drafter",
    "quantize_drafter",
    "read_texts",
    "stream_generate",
]
