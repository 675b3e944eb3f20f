"""Recurrent drafters in the layout that was published with the paper, in and out.

    published                                    ours
    config.json   recurrent_drafting_drafter     recurrent_drafter, with the target's fingerprint
    input_proj    also input_projs, input_projs.0, or a first 0.0 with a bias
    lm_head.i     also lm_heads.i, lm_heads.0.i, 0.i, and lm_head.layers.i as MLX writes it
    rnn_u, rnn_w
    emb_norm      left out: it was never applied

Lengths are counted in three ways. A published beam of length 5 begins with the certain token, so it
drafts 4; TensorRT-LLM's ``redrafter_draft_len_per_beam`` and our ``draft_length`` do not count it.

Source:
    Zhang et al. 2024, arXiv:2403.09919, and the checkpoints published with it.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.fingerprint import check_fingerprint, fingerprint
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
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig, Size
from mlx_distill.errors import InputError
from mlx_distill.files import output_path, read_json, usable_path, whole_folder, write_whole
from mlx_distill.limits import Between, check_value
from mlx_distill.target.target import Target
from mlx_distill.untyped import Fields, Tokenizer

PUBLISHED_TYPE = "recurrent_drafting_drafter"
FIELDS = ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers", "rnn")
Layers = Annotated[int, Between(0, 1000)]


def import_drafter(
    folder: str | Path, output: str | Path, target: Target, tokenizer: Tokenizer
) -> None:
    """Write a published drafter as one of ours.

    Args:
        folder: Its folder, with ``config.json`` and one safetensors file.
        output: The new folder; must not exist.
        target: The model that it was trained for.
        tokenizer: The target's.

    Raises:
        InputError: If an array is missing, unknown, of another shape or no finite number, each of
            them named; if the checkpoint is pickled, or was made for another target.
    """
    source = usable_path(folder, "the drafter")
    values, weights = _config(source), weights_file(source)
    made_for = fingerprint(target, tokenizer)
    check_fingerprint(
        {**made_for, **{n: values[n] for n in ("hidden_size", "vocab_size")}}, made_for
    )
    header = shapes_in(weights)
    names = our_names(header)
    # Nothing is built before it is known that the file holds as much.
    check_shapes(weights, renamed(weights, header, names), _shapes(values))
    # As published: paths are weighed by the drafter's own probabilities.
    network = RecurrentDrafter(RecurrentDrafterConfig(**values, sharpness=1.0))
    network.load_weights(list(read_finite(weights, names).items()))
    made_for["vocab_size"] = values["vocab_size"]
    card = f"# {source.name}\nA published recurrent drafter, imported; its licence goes with it.\n"
    save_drafter(output_path(output), network, made_for, {"README.md": card})


def export_drafter(drafter: BoundDrafter, output: str | Path) -> None:
    """Write a drafter of the reference form in the published layout.

    Args:
        drafter: The drafter.
        output: The new folder; must not exist.

    Raises:
        InputError: If it has parts that the published form does not know; they are named.
    """
    config = drafter.config
    plain = RecurrentDrafterConfig(**{name: getattr(config, name) for name in FIELDS})
    free = ("sharpness", "context_window", "context_heads")
    others = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in free and getattr(config, field.name) != getattr(plain, field.name)
    ]
    if others:
        raise InputError(f"the published form knows no {', '.join(others)}")
    weights: dict[str, mx.array] = dict(tree_flatten(drafter.network.parameters()))
    values = {"model_type": PUBLISHED_TYPE, **{name: getattr(config, name) for name in FIELDS}}
    values |= {"emb_norm": False, "architectures": ["Drafter"]}
    with whole_folder(output_path(output)) as writing:
        write_whole(writing / "config.json", json.dumps(values, indent=2))
        mx.save_safetensors(str(writing / "model.safetensors"), weights, {"format": "pt"})


def tensorrt_plan(folder: str | Path) -> DraftPlan | None:
    """Return the beams that TensorRT-LLM's settings in a drafter's config ask for, if any.

    Raises:
        InputError: If a number is out of its range.
    """
    values = read_json(usable_path(folder, "the drafter") / "config.json")
    width, length = (values.get(f"redrafter_{n}") for n in ("num_beams", "draft_len_per_beam"))
    if width is None or length is None:
        return None
    return DraftPlan(beam_width=width, draft_length=length, tree="beam")


def our_names(names: Shapes) -> dict[str, str]:
    """Return our name of every array of a published checkpoint; "" for what is not applied."""
    nested = any(re.match(r"lm_heads\.\d+\.\d+\.", name) for name in names)
    projected = "0.0.bias" in names  # the first of a sequence is then the projection
    return {name: _our_name(name, nested, projected) for name in names}


def _our_name(name: str, nested: bool, projected: bool) -> str:
    if name.startswith("emb_norm."):
        return ""
    name = re.sub(r"^input_projs\.(0\.)?", "input_proj.", name)
    name = re.sub(r"^lm_head\.layers\.", "lm_head.", name)
    name = re.sub(r"^lm_heads\.0\." if nested else r"^lm_heads\.", "lm_head.", name)
    found = re.match(r"^0\.(\d+)\.(.*)$", name)
    if found is None:
        return name
    place, rest = int(found[1]) - projected, found[2]
    return f"input_proj.{rest}" if place < 0 else f"lm_head.{place}.{rest}"


def _config(source: Path) -> Fields:
    """Return the fields of a published configuration that we know, checked."""
    values = read_config(source)
    missing = [name for name in FIELDS[:-1] if name not in values]
    if missing:
        raise InputError(f"{source}: the drafter's config lacks the fields: {', '.join(missing)}")
    values = {name: values.get(name, False) for name in FIELDS}
    for name in FIELDS[:-1]:
        check_value(name, values[name], Layers if name == "num_draft_layers" else Size)
    check_value("rnn", values["rnn"], bool)
    return values


def _shapes(values: Fields) -> Shapes:
    """Return the arrays of the reference form."""
    width, out = values["hidden_size"], values["exit_dim"]
    shapes: Shapes = {}
    if out != 2 * width:
        shapes |= {"input_proj.weight": (out, 2 * width), "input_proj.bias": (out,)}
    for layer in range(values["num_draft_layers"]):
        block = f"lm_head.{layer}.linear"
        shapes |= {f"{block}.weight": (out, out), f"{block}.bias": (out,)}
    shapes[f"lm_head.{values['num_draft_layers']}.weight"] = (values["vocab_size"], out)
    if values["rnn"]:
        shapes |= {"rnn_u.weight": (width, width), "rnn_u.bias": (width,)}
        shapes["rnn_w.weight"] = (width, width)
    return shapes
