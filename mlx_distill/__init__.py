"""Make language models faster with drafters of their own, and smaller by distillation.

The public names are imported when they are first asked for: a command that writes text does not
wait for what trains.
"""

import importlib
from typing import TYPE_CHECKING

from mlx_distill import interrupts
from mlx_distill.blas.openblas import load_openblas

interrupts.begin()
load_openblas()  # has to come before the first import of mlx.core

if TYPE_CHECKING:
    from mlx_distill.checkpoint import load
    from mlx_distill.data.encoding import read_texts
    from mlx_distill.data.prompts import read_prompts
    from mlx_distill.distillation.answer_files import read_answers
    from mlx_distill.distillation.distiller import Examples
    from mlx_distill.distillation.drafter_config import DrafterTraining
    from mlx_distill.distillation.drafter_training import train_drafter
    from mlx_distill.distillation.exporting import ExportConfig, export_student
    from mlx_distill.distillation.learning import Learner
    from mlx_distill.distillation.training import Distilled, distill
    from mlx_distill.drafters.draft_model import DraftModelDrafter
    from mlx_distill.drafters.mixture import MixedDrafter
    from mlx_distill.drafters.ngram import NGramDrafter
    from mlx_distill.drafters.packing import quantize_drafter
    from mlx_distill.drafters.protocol import DraftPlan
    from mlx_distill.drafters.registry import load_drafter
    from mlx_distill.errors import InputError
    from mlx_distill.speculation.batch_generation import Answer, batch_generate
    from mlx_distill.speculation.caching import CacheConfig
    from mlx_distill.speculation.generation import generate, stream_generate
    from mlx_distill.speculation.responses import GenerationResponse
    from mlx_distill.training.config import TrainingConfig

__all__ = [
    "Answer",
    "CacheConfig",
    "Distilled",
    "DraftModelDrafter",
    "DraftPlan",
    "DrafterTraining",
    "Examples",
    "ExportConfig",
    "GenerationResponse",
    "InputError",
    "Learner",
    "MixedDrafter",
    "NGramDrafter",
    "TrainingConfig",
    "batch_generate",
    "distill",
    "export_student",
    "generate",
    "load",
    "load_drafter",
    "quantize_drafter",
    "read_answers",
    "read_prompts",
    "read_texts",
    "stream_generate",
    "train_drafter",
]

_MODULES = {
    "Answer": "speculation.batch_generation",
    "CacheConfig": "speculation.caching",
    "Distilled": "distillation.training",
    "DraftModelDrafter": "drafters.draft_model",
    "DraftPlan": "drafters.protocol",
    "DrafterTraining": "distillation.drafter_config",
    "Examples": "distillation.distiller",
    "ExportConfig": "distillation.exporting",
    "GenerationResponse": "speculation.responses",
    "InputError": "errors",
    "Learner": "distillation.learning",
    "MixedDrafter": "drafters.mixture",
    "NGramDrafter": "drafters.ngram",
    "TrainingConfig": "training.config",
    "batch_generate": "speculation.batch_generation",
    "distill": "distillation.training",
    "export_student": "distillation.exporting",
    "generate": "speculation.generation",
    "load": "checkpoint",
    "load_drafter": "drafters.registry",
    "quantize_drafter": "drafters.packing",
    "read_answers": "distillation.answer_files",
    "read_prompts": "data.prompts",
    "read_texts": "data.encoding",
    "stream_generate": "speculation.generation",
    "train_drafter": "train_drafter",  # the command's module, which is callable
}


def __getattr__(name: str) -> object:
    """Import a public name."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    value = module if name == _MODULES[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, and what is imported already."""
    return sorted({*globals(), *__all__})
