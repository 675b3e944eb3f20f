"""Tokenizers that are read once, however many tests load them."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import mlx_lm

# Files of these kinds say nothing of a tokenizer: weights, texts, and what a training writes.
OTHERS = {".safetensors", ".npz", ".jsonl", ".csv", ".png", ".md", ".yaml"}


def read_once() -> None:
    """Let what is read of a folder again, or of one whose files are the same, be a copy."""
    read = mlx_lm.utils.load_tokenizer
    found: dict[Any, tuple[str, Any]] = {}

    def load_tokenizer(folder: Any, *args: Any, **settings: Any) -> Any:
        if not Path(folder).is_dir():
            return read(folder, *args, **settings)
        alike = _digest(Path(folder)), repr(args), repr(sorted(settings.items()))
        if alike not in found:
            found[alike] = str(folder), read(folder, *args, **settings)
        return _copied(*found[alike], str(folder))

    mlx_lm.utils.load_tokenizer = load_tokenizer


def _copied(was: str, wrapper: Any, folder: str) -> Any:
    """Return a copy of a tokenizer of another folder, as if it were of this one."""
    made = copy.copy(wrapper)
    made.eos_token_ids = wrapper.eos_token_ids
    made._tokenizer = copy.copy(wrapper._tokenizer)
    made._tokenizer.init_kwargs = dict(wrapper._tokenizer.init_kwargs)
    for values in (vars(made._tokenizer), made._tokenizer.init_kwargs):
        for name, value in values.items():
            if isinstance(value, str) and value.startswith(was):
                values[name] = folder + value.removeprefix(was)
    return made


def _digest(folder: Path) -> bytes:
    """Return what the files come to that a tokenizer may be made of."""
    digest = hashlib.blake2b()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix not in OTHERS and file.name != "training.json":
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
            digest.update(file.read_bytes())
    return digest.digest()
