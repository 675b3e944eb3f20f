"""The networks that are trained to draft, whichever their kind."""

from dataclasses import replace
from typing import Any

from mlx_distill.drafters.medusa import MedusaConfig, MedusaHeads
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig

Network = RecurrentDrafter | MedusaHeads
Shape = RecurrentDrafterConfig | MedusaConfig
# By the model_type of config.json.
SHAPES: dict[str, type[Shape]] = {
    shape.model_type: shape for shape in (RecurrentDrafterConfig, MedusaConfig)
}


def network_of(shape: Shape) -> Network:
    """Return a network of a shape, with its first weights."""
    if isinstance(shape, MedusaConfig):
        return MedusaHeads(shape)
    return RecurrentDrafter(shape)


def change_shape(network: Network, **fields: Any) -> None:
    """Let fields of a network's shape hold other values; its arrays stay as they are."""
    if isinstance(network, MedusaHeads):
        network.config = replace(network.config, **fields)
    else:
        network.config = replace(network.config, **fields)
