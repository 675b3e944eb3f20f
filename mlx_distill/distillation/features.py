"""What networks compute inside: outputs of chosen layers, and what the head is given.

Both are seen in the forward that happens anyway. A module is watched by giving it, for the time of
the call, a class of its own; parameters and names stay as they are, so gradients flow as ever.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_distill.errors import InputError

Layer = int | str


def find_layer(network: nn.Module, layer: Layer) -> nn.Module:
    """Return a layer by its number among the network's ``layers``, or by its name.

    Raises:
        InputError: If there is none.
    """
    if isinstance(layer, int):
        layers = getattr(network, "layers", None)
        if not isinstance(layers, list | tuple):
            raise InputError(f"{type(network).__name__} has no list of layers; name them instead")
        if not -len(layers) <= layer < len(layers):
            raise InputError(
                f"there is no layer {layer}: {type(network).__name__} has {len(layers)}, "
                f"0 to {len(layers) - 1}"
            )
        return layers[layer]
    found = dict(network.named_modules()).get(layer)
    if found is None or not layer:
        names = sorted((name for name, _ in network.named_modules() if name), key=len)
        raise InputError(
            f"{type(network).__name__} has no layer {layer}; it has {', '.join(names[:8])} ..."
        )
    return found


@contextmanager
def tapped(network: nn.Module, layers: Sequence[Layer]) -> Iterator[dict[Layer, mx.array]]:
    """Collect the outputs of layers, by layer, while the network is called within.

    Where a layer returns several arrays, the first one is its output.
    """
    outputs: dict[Layer, mx.array] = {}

    def record(layer: Layer) -> Callable[..., Any]:
        def around(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            outputs[layer] = output[0] if isinstance(output, tuple | list) else output
            return output

        return around

    modules = {layer: find_layer(network, layer) for layer in layers}
    kinds = [(module, type(module)) for module in modules.values()]
    for layer, module in modules.items():
        wrap(module, record(layer))
    try:
        yield outputs
    finally:
        for module, kind in reversed(kinds):
            module.__class__ = kind


def wrap(module: nn.Module, around: Callable[..., Any], method: str = "__call__") -> None:
    """Let ``around(call, *args)`` stand for a method of one module, until its class is put back."""
    kind = type(module)
    inner = getattr(kind, method)

    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(lambda *a, **k: inner(self, *a, **k), *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {method: outer})


class TiedHead(nn.Module):
    """An embedding that serves as the head."""

    def __init__(self, embed: nn.Module):
        super().__init__()
        self.embed = embed

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return the logits of hidden states."""
        return self.embed.as_linear(hidden)  # pyright: ignore


class _Reached(Exception):
    """The forward has come to the head; nothing behind it is needed."""

    def __init__(self, hidden: mx.array):
        self.hidden = hidden


class Body:
    """A language model up to its head, so that losses can make logits a few tokens at a time.

    Args:
        network: The model; called with token ids (B, T).
        module: What makes the logits in it.
    """

    def __init__(self, network: nn.Module, module: nn.Module):
        self.network = network
        self.module = module
        tied = hasattr(type(module), "as_linear")
        self.method = "as_linear" if tied else "__call__"
        self.head: nn.Module = TiedHead(module) if tied else module

    @classmethod
    def of(cls, network: nn.Module) -> "Body | None":
        """Return the model's body, or None if its logits are not simply its head's output.

        Models that cap or scale their logits behind the head are among those: that is found out by
        trying, on four tokens.
        """
        tokens = mx.array([[1, 2, 3, 1]])
        expected = network(tokens)
        for module in reversed([module for _, module in network.named_modules()]):
            weight = module.get("weight")
            if not isinstance(weight, mx.array) or weight.ndim != 2:
                continue
            if weight.shape[0] != expected.shape[-1]:
                continue
            body = cls(network, module)
            try:
                logits = body.head(body(tokens))
            except _NotReached:
                continue
            if logits.shape == expected.shape and mx.array_equal(logits, expected).item():
                return body
        return None

    def __call__(self, inputs: mx.array) -> mx.array:
        """Return what the head is given, (B, T, D)."""

        def stop(call: Callable[..., Any], hidden: mx.array) -> Any:
            raise _Reached(hidden)

        kind = type(self.module)
        wrap(self.module, stop, self.method)
        try:
            self.network(inputs)
        except _Reached as reached:
            return reached.hidden
        finally:
            self.module.__class__ = kind
        raise _NotReached


class _NotReached(Exception):
    """A module that looked like the head was not called as one."""


def uniform_map(num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Return pairs (student layer, teacher layer), evenly spread; the last ones are a pair."""
    share = num_teacher / num_student
    return [(layer, max(0, round((layer + 1) * share) - 1)) for layer in range(num_student)]


def checkpoint_layers(network: nn.Module) -> None:
    """Let every layer compute its activations again in the backward, instead of keeping them."""
    for layer in getattr(network, "layers", ()):
        wrap(layer, _checkpointed(layer))


def _checkpointed(layer: nn.Module) -> Callable[..., Any]:
    def around(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def inner(parameters: dict[str, Any], *values: Any) -> Any:
            layer.update(parameters)
            return call(*values, **kwargs)

        return mx.checkpoint(inner)(layer.trainable_parameters(), *args)

    return around
