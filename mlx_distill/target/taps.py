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
from mlx_distill.target.reading import read_whole
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


def check_rows(network: nn.Module, layers: Sequence[Layer], width: int) -> None:
    """Raise InputError unless layers return a row of some width per token; nothing is computed.

    Some return several streams of them, as those of Gemma 3n; some are not called as modules.
    """
    with tapped(network, layers) as outputs:
        read_whole(network, mx.array([[0, 0]]))
    for layer in layers:
        shape = outputs[layer].shape if layer in outputs else "nothing"
        if shape != (1, 2, width):
            raise InputError(
                f"layer {layer} of a {type(network).__name__} returns {shape} for two tokens, "
                f"which are no rows of {width} values; a drafter cannot see it"
            )


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
