"""What networks compute inside: outputs of layers, seen in the forward that happens anyway.

A drafter or a loss that wants more than the hidden states at the head taps layers around a call:

    with tapped(target.model, drafter.taps) as outputs:
        call = target.verify(tree, caches)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_distill.errors import InputError
from mlx_distill.target.layers import numbered_layers
from mlx_distill.target.watching import Call, Heard, listening

Layer = int | str


def find_layer(network: nn.Module, layer: Layer) -> nn.Module:
    """Return a layer by its number among the network's layers, or by its name.

    Raises:
        InputError: If there is none.
    """
    if isinstance(layer, int):
        layers = numbered_layers(network)
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
    """Collect the outputs of layers, by layer, while this thread calls the network within.

    Where a layer returns several arrays, the first one is its output.
    """
    outputs: dict[Layer, mx.array] = {}
    with listening(heard_layers(network, layers, outputs)):
        yield outputs


def heard_layers(
    network: nn.Module, layers: Sequence[Layer], outputs: dict[Layer, mx.array]
) -> list[Heard]:
    """Return what has to stand around a network's layers so that their outputs are collected."""

    def record(layer: Layer) -> Call:
        def around(call: Call, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            outputs[layer] = output[0] if isinstance(output, tuple | list) else output
            return output

        return around

    return [Heard(find_layer(network, layer), record(layer)) for layer in layers]
