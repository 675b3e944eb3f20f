"""What quantised weights cost a drafter: the same answers, drafted for before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.calibration.measuring import Pair
from mlx_distill.distillation.answer_files import WrittenAnswers
from mlx_distill.drafters.packing import quantize_drafter
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.errors import InputError
from mlx_distill.evaluation.drafts import judge_drafts

PLAN = DraftPlan(4, 6, 8)


@dataclass(frozen=True)
class Drafted:
    """What a drafter's trees of 8 nodes were worth.

    Args:
        bits: Of a weight; None for those it was trained with.
        num_bytes: Of its file of weights.
        tokens_per_call: At temperature 0.
        acceptance: The share of drafts that had one, two, ... tokens of the text in a row.
    """

    bits: int | None
    num_bytes: int
    tokens_per_call: float
    acceptance: tuple[float, ...]

    def line(self) -> str:
        """Return it as a line."""
        name = "as it was" if self.bits is None else f"{self.bits} bits"
        shares = " ".join(f"{share:.3f}" for share in self.acceptance)
        return (
            f"{name}: {self.num_bytes / 1e6:.1f} MB, {self.tokens_per_call:.3f} tokens per call, "
            f"acceptance by depth {shares}"
        )


def quantize_and_judge(
    pair: Pair, folder: str | Path, output: str | Path, bits: int, answers: WrittenAnswers
) -> tuple[Drafted, Drafted]:
    """Write a drafter's folder with quantised weights; return its worth before and after.

    Args:
        pair: The target, with the drafter of the folder.
        folder: The drafter's.
        output: The new one; must not exist.
        bits: Of a weight: 4, 5, 6 or 8.
        answers: The target's, at temperature 0.

    Raises:
        InputError: If the folder cannot be quantised, or there is nothing to judge by.
    """
    if not any(len(one.response) > 1 for one in answers.responses):
        raise InputError("no answer has two tokens; there is nothing to judge by")
    quantize_drafter(folder, output, bits)
    packed = load_drafter(output, pair.model, pair.tokenizer)
    pairs = ((pair, folder, None), (Pair(pair.model, pair.tokenizer, packed), output, bits))
    before, after = (_judged(*one, answers) for one in pairs)
    return before, after


def _judged(pair: Pair, folder: str | Path, bits: int | None, answers: WrittenAnswers) -> Drafted:
    judged = judge_drafts(pair.drafter, pair.target, answers.responses, {"tree": PLAN})
    worth = judged.worth["tree"][""]
    reached: Sequence[int] = worth.reached
    shares = tuple(count / max(1, worth.calls) for count in reached)
    size = (Path(folder) / "model.safetensors").stat().st_size
    return Drafted(bits, size, worth.tokens_per_call, shares)
