"""What tells models and tokenizers from others of their kind."""

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten


def weights_hash(model: nn.Module) -> str:
    """Return a hash of some of every array of a model, which tells a fine-tuned one from its base.

    It reads the first values of each array only, so an edit of a few rows can go unnoticed.
    """
    digest = hashlib.sha256()
    arrays: dict[str, Any] = dict(tree_flatten(model.parameters()))
    firsts = {name: array.reshape(-1)[:256].view(mx.uint8) for name, array in arrays.items()}
    mx.eval(firsts)
    for name, some in firsts.items():
        digest.update(name.encode() + bytes(memoryview(some)))
    return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's tokens and their ids; it is computed once."""
    if tokenizer not in _hashes:
        tokens = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        _hashes[tokenizer] = hashlib.sha256(tokens).hexdigest()[:16]
    return _hashes[tokenizer]


_hashes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
