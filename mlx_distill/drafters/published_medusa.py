"""Medusa heads in the layout that was published with the paper, in and out.

    published                                    ours
    config.json   medusa_num_heads, _layers      medusa_heads, with the target's fingerprint
    medusa_head.i.j.linear                       blocks.i.j.linear
    medusa_head.i.last.weight                    lm_head.i, a matrix for each head

Older files leave ``medusa_head.`` out. Widths stand in the arrays alone. Some published
configurations name fewer heads than their file holds: all of the file's are taken.

Source:
    Cai et al. 2024, arXiv:2401.10774, and the checkpoints published with it.
"""

import json
import re
from pathlib import Path

import mlx.core as mx

from mlx_distill.drafters.fingerprint import Fingerprint, check_fingerprint, fingerprint
from mlx_distill.drafters.folders import save_drafter
from mlx_distill.drafters.foreign import (
    Shapes,
    check_shapes,
    read_config,
    read_finite,
    renamed,
    shapes_in,
    weights_file,
)
from mlx_distill.drafters.medusa import Heads, Layers, MedusaConfig, MedusaHeads
from mlx_distill.drafters.medusa_drafter import MedusaDrafter
from mlx_distill.errors import InputError
from mlx_distill.files import output_path, usable_path, whole_folder, write_whole
from mlx_distill.limits import check_value
from mlx_distill.names import for_markdown
from mlx_distill.target.target import Target
from mlx_distill.untyped import Tokenizer

NUM_HEADS, NUM_LAYERS, BASE = "medusa_num_heads", "medusa_num_layers", "base_model_name_or_path"


def import_heads(
    folder: str | Path, output: str | Path, target: Target, tokenizer: Tokenizer
) -> None:
    """Write published Medusa heads as a drafter of ours.

    Args:
        folder: Their folder, with ``config.json`` and one safetensors file.
        output: The new folder; must not exist.
        target: The model that they were trained for.
        tokenizer: The target's.

    Raises:
        InputError: If an array is missing, unknown, of another shape or no finite number, each of
            them named; if the checkpoint is pickled, or was made for another target.
    """
    source = usable_path(folder, "the drafter")
    values, weights = read_config(source), weights_file(source)
    for name, hint in ((NUM_HEADS, Heads), (NUM_LAYERS, Layers)):
        check_value(name, values.get(name, 1), hint)
    header = shapes_in(weights)
    layers = values.get(NUM_LAYERS, 1)
    names = {name: _our_name(name, layers) for name in header}
    found = renamed(weights, header, names)
    made_for = _made_for(weights, found, fingerprint(target, tokenizer))
    numbers = [re.match(r"(?:blocks|lm_head)\.(\d+)\.", name) for name in found]
    heads = max(values.get(NUM_HEADS, 1), *(1 + int(one[1]) for one in numbers if one))
    check_value("the number of heads", heads, Heads)
    width, vocab_size = int(made_for["hidden_size"]), int(made_for["vocab_size"])
    check_shapes(weights, found, _shapes(heads, layers, width, vocab_size))
    # As published: paths are weighed by the heads' own probabilities.
    shape = MedusaConfig(width, vocab_size, heads, layers, shared_head=False, sharpness=1.0)
    network = MedusaHeads(shape)
    network.load_weights(list(read_finite(weights, names).items()))
    base = for_markdown(str(values.get(BASE, "a model that they do not name")))
    card = f"# {source.name}\nMedusa heads for {base}, imported; their licence goes with them.\n"
    save_drafter(output_path(output), network, made_for, {"README.md": card})


def export_heads(drafter: MedusaDrafter, output: str | Path) -> None:
    """Write Medusa heads in the published layout; a matrix that they share is written for each.

    Args:
        drafter: The heads.
        output: The new folder; must not exist.

    Raises:
        InputError: If they have parts that the published form does not know; they are named.
    """
    shape, network = drafter.config, drafter.network
    others = [name for name in ("draft_vocab_size", "taps") if getattr(shape, name)]
    if others:
        raise InputError(f"the published form knows no {', '.join(others)}")
    arrays: dict[str, mx.array] = {}
    for number, blocks in enumerate(network.blocks):
        for layer, block in enumerate(blocks):
            for part in ("weight", "bias"):
                arrays[f"medusa_head.{number}.{layer}.linear.{part}"] = block.linear[part]
        head = network.heads[0 if shape.shared_head else number]
        # Copies: a file has no arrays that share their memory.
        arrays[f"medusa_head.{number}.{shape.num_draft_layers}.weight"] = head.weight + 0
    config = {NUM_HEADS: shape.num_heads, NUM_LAYERS: shape.num_draft_layers}
    with whole_folder(output_path(output)) as writing:
        write_whole(writing / "config.json", json.dumps(config, indent=2))
        path = str(writing / "medusa_lm_head.safetensors")
        mx.save_safetensors(path, arrays, {"format": "pt"})


def _our_name(name: str, layers: int) -> str:
    """Return what an array is called here; what is not known keeps its name."""
    found = re.match(r"^(?:medusa_head\.)?(\d+)\.(\d+)\.(linear\.)?(weight|bias)$", name)
    if found is None:
        return name
    head, layer, linear, part = found.groups()
    if int(layer) == layers and not linear and part == "weight":
        return f"lm_head.{head}.weight"
    return f"blocks.{head}.{layer}.linear.{part}" if linear else name


def _made_for(weights: Path, found: Shapes, known: Fingerprint) -> Fingerprint:
    """Return the fingerprint of the target that heads were made for, by the first one's matrix.

    Raises:
        InputError: If there is none, or it is another target's.
    """
    shape = found.get("lm_head.0.weight", ())
    if len(shape) != 2:
        raise InputError(f"{weights} does not fit its config: the first head has no matrix")
    made_for: Fingerprint = {**known, "vocab_size": shape[0], "hidden_size": shape[1]}
    check_fingerprint(made_for, known)
    return made_for


def _shapes(heads: int, layers: int, width: int, vocab_size: int) -> Shapes:
    """Return the arrays of the published form under our names."""
    shapes: Shapes = {}
    for head in range(heads):
        for layer in range(layers):
            block = f"blocks.{head}.{layer}.linear"
            shapes |= {f"{block}.weight": (width, width), f"{block}.bias": (width,)}
        shapes[f"lm_head.{head}.weight"] = (vocab_size, width)
    return shapes
