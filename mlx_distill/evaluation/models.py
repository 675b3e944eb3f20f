"""The models of an evaluation by name: who they are, and how they are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx import nn
from mlx_lm.utils import hf_repo_to_path

from mlx_distill.arrays import num_bytes, num_parameters
from mlx_distill.checkpoint import load
from mlx_distill.errors import InputError
from mlx_distill.files import usable_path

TEACHER = "teacher"


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the folder or hub repository that they come from."""

    model: nn.Module
    tokenizer: Any
    source: str

    def sizes(self) -> dict[str, int]:
        """Return the number of the model's parameters and the bytes of its weights."""
        folder = usable_path(self.source, "the model")
        if not folder.is_dir():
            folder = hf_repo_to_path(self.source)  # it is here since it was loaded
        return {
            "parameters": num_parameters(self.model),
            "weights_bytes": num_bytes(self.model.parameters()),
            "file_bytes": sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
        }


@dataclass(frozen=True)
class Sources:
    """Where the models come from.

    Args:
        models: Folders or hub repositories by name; the teacher's name is "teacher".
        adapters: Folders of adapters of some of the models.
    """

    models: dict[str, str]
    adapters: dict[str, str]

    @classmethod
    def named(
        cls, teacher: str | None, students: Sequence[str], adapters: Sequence[str]
    ) -> "Sources":
        """Return the sources that texts NAME=DIR name, the teacher first.

        Raises:
            InputError: If a text is none, a name stands twice or is unknown, or there is no model.
        """
        models = {} if teacher is None else {TEACHER: teacher}
        for student in students:
            name, source = _pair("--student", student)
            if name in models:
                raise InputError(f"two models are called {name}; give each a name of its own")
            models[name] = source
        if not models:
            raise InputError("there is no model to evaluate; name one with --student NAME=DIR")
        known: dict[str, str] = {}
        for adapter in adapters:
            name, source = _pair("--adapter-path", adapter)
            if name not in models or name in known:
                names = ", ".join(models)
                raise InputError(f"--adapter-path takes each of {names} once, got {name}")
            known[name] = source
        return cls(models, known)

    @property
    def teacher(self) -> str | None:
        """The teacher's name, None if there is none."""
        return TEACHER if TEACHER in self.models else None

    def load(self, options: Mapping[str, Any]) -> dict[str, Loaded]:
        """Return the models; ``options`` are further arguments of ``checkpoint.load``."""
        return {
            name: Loaded(*load(path, adapter_path=self.adapters.get(name), **options), path)
            for name, path in self.models.items()
        }


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if not name.strip() or not source.strip():
        raise InputError(f"{flag} takes NAME=DIR, got {text:.80}")
    return name, source
