"""The layers of a model, by number, wherever and under whatever name it keeps them.

Of mlx-lm's models some keep them in ``model.layers``, others in ``transformer.h``,
``language_model.model.layers``, ``model.layers.layers`` or ``model.blocks``. Most also have a
property ``layers``, which a prompt cache is made from: that is how the list is told from others.
"""

from collections.abc import Iterator
from typing import TypeGuard

from mlx import nn

from mlx_distill.errors import InputError


def numbered_layers(network: nn.Module) -> list[nn.Module]:
    """Return the layers in the order in which the network counts them.

    Raises:
        InputError: If it has no list of layers.
    """
    own = getattr(network, "layers", None)
    if _is_stack(own):
        return list(own)
    return layer_list(network)[1]


def layer_list(network: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return where a network keeps its layers, as a dotted name, and the list itself.

    Where a network counts the layers of several lists as its own, this is the longest of them.

    Raises:
        InputError: If it has no list of layers.
    """
    stacks = list(_stacks(network, ""))
    own = getattr(network, "layers", None)
    if _is_stack(own):
        counted = {id(layer) for layer in own}
        stacks = [stack for stack in stacks if all(id(layer) in counted for layer in stack[1])]
    if not stacks:
        raise InputError(f"{type(network).__name__} has no list of layers; name them instead")
    return max(stacks, key=lambda stack: len(stack[1]))


def _stacks(module: nn.Module, path: str) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield every list of modules below a module, those further up first."""
    below = []
    for name, value in module.items():
        if isinstance(value, nn.Module):
            below.append((f"{path}{name}.", value))
        elif _is_stack(value):
            yield f"{path}{name}", list(value)
            below += [(f"{path}{name}.{i}.", layer) for i, layer in enumerate(value)]
    for inner, part in below:
        yield from _stacks(part, inner)


def _is_stack(value: object) -> TypeGuard[list[nn.Module] | tuple[nn.Module, ...]]:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(layer, nn.Module) for layer in value)
    )
