"""What a smaller form costs a drafter: the same answers, drafted for before and after."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.calibration.pair import Pair
from mlx_distill.distillation.answer_files import WrittenAnswers
from mlx_distill.distillation.narrow_head import narrow_head
from mlx_distill.distillation.responses import Response
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.packing import quantize_drafter
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.registry import TrainedDrafter, load_drafter
from mlx_distill.errors import InputError
from mlx_distill.evaluation.drafts import judge_drafts
from mlx_distill.files import output_path, usable_path

PLAN = DraftPlan(4, 6, 8)


@dataclass(frozen=True)
class Form:
    """A drafter's smaller form.

    Args:
        bits: Of a weight: 4, 5, 6 or 8. None leaves weights as they are.
        head_rank: Width between the two matrices that the head becomes. None leaves it as it is.
    """

    bits: int | None = None
    head_rank: int | None = None

    def __post_init__(self) -> None:
        if self.bits is None and self.head_rank is None:
            raise InputError("name what is to change: the bits of weights, the head's rank or both")


@dataclass(frozen=True)
class Drafted:
    """What a drafter's trees of 8 nodes were worth.

    Args:
        form: Of the drafter, in words.
        num_bytes: Of its file of weights.
        tokens_per_call: At temperature 0.
        acceptance: The share of drafts that had one, two, ... tokens of the text in a row.
    """

    form: str
    num_bytes: int
    tokens_per_call: float
    acceptance: tuple[float, ...]

    def line(self) -> str:
        """Return it as a line."""
        shares = " ".join(f"{share:.3f}" for share in self.acceptance)
        return (
            f"{self.form}: {self.num_bytes / 1e6:.1f} MB, {self.tokens_per_call:.3f} tokens per "
            f"call, acceptance by depth {shares}"
        )


def convert_and_judge(
    pair: Pair,
    folder: str | Path,
    output: str | Path,
    form: Form,
    answers: WrittenAnswers,
    fitted: Sequence[Response],
) -> list[Drafted]:
    """Write a drafter's folder in a smaller form; return its worth before, and after every step.

    Args:
        pair: The target, with the drafter of the folder.
        folder: The drafter's.
        output: The new one; must not exist.
        form: The smaller one.
        answers: The target's, at temperature 0, to judge by.
        fitted: The target's answers that a narrower head is fitted on.

    Raises:
        InputError: If the folder cannot be converted, or there is nothing to judge by.
    """
    if not all(any(len(one.response) > 1 for one in some) for some in (answers.responses, fitted)):
        raise InputError("no answer has two tokens; there is nothing to judge by")
    if not isinstance(pair.drafter, TrainedDrafter):
        raise InputError(f"{folder} has no weights; it has no smaller form")
    folder, output = usable_path(folder, "the drafter"), output_path(output)
    steps, source = [], folder
    with tempfile.TemporaryDirectory() as temporary:
        if form.head_rank is not None:
            if not isinstance(pair.drafter, BoundDrafter):
                raise InputError(f"{folder} is no recurrent drafter; its head stays one matrix")
            narrow = output if form.bits is None else Path(temporary) / "narrow"
            narrow_head(source, narrow, form.head_rank, pair.drafter, pair.target, fitted)
            steps.append((f"a head of rank {form.head_rank}", narrow))
            source = narrow
        if form.bits is not None:
            quantize_drafter(source, output, form.bits)
            steps.append((f"{form.bits} bits", output))
        found = [_judged("as it was", pair, folder, answers)]
        for words, path in steps:
            changed = load_drafter(path, pair.model, pair.tokenizer)
            found.append(_judged(words, Pair(pair.model, pair.tokenizer, changed), path, answers))
    return found


def _judged(form: str, pair: Pair, folder: str | Path, answers: WrittenAnswers) -> Drafted:
    judged = judge_drafts(pair.drafter, pair.target, answers.responses, {"tree": PLAN})
    worth = judged.worth["tree"][""]
    reached: Sequence[int] = worth.reached
    shares = tuple(count / max(1, worth.calls) for count in reached)
    size = (Path(folder) / "model.safetensors").stat().st_size
    return Drafted(form, size, worth.tokens_per_call, shares)
