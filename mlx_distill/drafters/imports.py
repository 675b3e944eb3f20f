"""Which published form a checkpoint has: recurrent, Medusa heads, or one that is none of ours.

A checkpoint of EAGLE-3 has a decoder layer in the place of a recurrence:

    ours      taps joined with what the head saw; attention over the text once per draft; then
              s_t = cell(e(g_{t-1}), s_{t-1}) token by token
    EAGLE-3   taps alone (``fc``); then, token by token, a whole decoder layer (``midlayer``) over
              [e(g_{t-1}) ; the state before], which attends to all tokens before, drafted ones too

So its weights have no place in any shape of ours, and nothing is made of them.

Source:
    Li et al. 2025, arXiv:2503.01840.
"""

from pathlib import Path

from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.foreign import read_config, shapes_in
from mlx_distill.drafters.medusa_drafter import MedusaDrafter
from mlx_distill.drafters.published import export_drafter, import_drafter
from mlx_distill.drafters.published_medusa import NUM_HEADS, export_heads, import_heads
from mlx_distill.errors import InputError
from mlx_distill.files import usable_path
from mlx_distill.target.target import Target
from mlx_distill.untyped import Fields, Tokenizer

# Of EAGLE's checkpoints, the first and the third version.
EAGLE_ARRAYS = ("midlayer.", "fc.", "d2t", "t2d")


def import_published(
    folder: str | Path, output: str | Path, target: Target, tokenizer: Tokenizer
) -> None:
    """Write a published drafter as one of ours.

    Args:
        folder: Its folder, with ``config.json`` and one safetensors file.
        output: The new folder; must not exist.
        target: The model that it was trained for.
        tokenizer: The target's.

    Raises:
        InputError: If it has no shape of ours, does not fit itself or the target, or is pickled.
    """
    source = usable_path(folder, "the drafter")
    values = read_config(source)
    if _is_eagle(source, values):
        raise InputError(
            f"{source} is an EAGLE checkpoint, which is no shape of ours: a decoder layer reads "
            "every drafted token there, with attention to all before it, where ours has a "
            "recurrence; train a drafter that sees the same layers with train_drafter --tap-layers"
        )
    by = import_heads if holds_heads(source) else import_drafter
    by(source, output, target, tokenizer)


def holds_heads(folder: str | Path) -> bool:
    """Return whether a published checkpoint is one of Medusa heads."""
    return NUM_HEADS in read_config(usable_path(folder, "the drafter"))


def export_published(drafter: BoundDrafter | MedusaDrafter, output: str | Path) -> None:
    """Write a drafter in the layout that was published with its paper.

    Raises:
        InputError: If it has parts that the published form does not know; they are named.
    """
    if isinstance(drafter, MedusaDrafter):
        export_heads(drafter, output)
    else:
        export_drafter(drafter, output)


def _is_eagle(source: Path, values: Fields) -> bool:
    named = str(values.get("architectures", "")) + str(values.get("model_type", ""))
    if "eagle" in named.lower():
        return True
    files = sorted(source.glob("*.safetensors"))
    return any(name.startswith(EAGLE_ARRAYS) for one in files[:1] for name in shapes_in(one))
