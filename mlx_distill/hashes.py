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


# What tokenizers do differently: words, numbers, spaces, code, marks, and scripts.
SAMPLES = (
    "Once upon a time there was a little girl, and she wasn't afraid of the 1,024 dragons.",
    "Unbelievably, the committee's re-examination of photosynthesis cost $3.50 (or 12%).",
    "def f(x):\n    return {'a': [x ** 2, 0xFF], \"b\": None}  # twice\n\n\tprint(f(10))\n",
    'https://example.org/?q=a_b-c&d=%20 <div class="x">&amp;</div> \\frac{1}{2} != \u2260',
    "L'\u00e9t\u00e9 na\u00efve, Stra\u00dfe, \u041f\u0440\u0438\u0432\u0435\u0442, \U0001f600",
    "\u4f60\u597d, \u3053\u3093\u306b\u3061\u306f, \uc548\ub155, \u0645\u0631\u062d\u0628\u0627",
)
MOST_MOVED = 64  # tokens that are looked at; some are never written


def first_other_encoding(one: Any, other: Any) -> str | None:
    """Return a text that two tokenizers encode differently; None if they encode all alike.

    Their sizes say nothing: one may be padded, or have tokens that are never written. What a token
    of both stands for, which is not the same one in both, is looked at, too.
    """
    theirs = other.get_vocab()
    moved = sorted(i for token, i in one.get_vocab().items() if theirs.get(token, i) != i)
    texts = (*SAMPLES, *(one.decode([i]) for i in moved[:MOST_MOVED]))
    differ = (text for text in texts if _encoded(one, text) != _encoded(other, text))
    return next(differ, None)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def template_hash(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's chat template; empty where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]


def weights_type(model: nn.Module) -> str:
    """Return how a model's weights are held: "4-bit", or the types of the floating ones.

    Hashes of weights can be compared where it is the same.
    """
    bits = sorted({module.bits for module in model.modules() if hasattr(module, "bits")})
    if bits:
        return " and ".join(f"{one}-bit" for one in bits)
    arrays: dict[str, Any] = dict(tree_flatten(model.parameters()))
    types = {str(x.dtype) for x in arrays.values() if mx.issubdtype(x.dtype, mx.floating)}
    return " and ".join(sorted(one.removeprefix("mlx.core.") for one in types))


_hashes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
