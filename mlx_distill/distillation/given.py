"""What a training is given, as far as its networks can read it; what they cannot is counted."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx import nn

from mlx_distill.data.report import Report
from mlx_distill.data.texts import Text
from mlx_distill.distillation.batches import Data
from mlx_distill.distillation.distiller import Examples
from mlx_distill.distillation.on_policy import OnPolicyConfig, answered, with_room
from mlx_distill.distillation.teachers import LiveTeacher, Teacher
from mlx_distill.errors import InputError
from mlx_distill.target.context import position_limit, text_limit
from mlx_distill.target.reading import check_tokens


@dataclass(frozen=True)
class Given:
    """What a training is given, as far as its networks can read it.

    Args:
        data: To learn from.
        valid: Held out.
        limit: The longest text in tokens, of all networks; None for any, and for examples.
        notes: What was left out, and why.
    """

    data: Data
    valid: Data | None
    limit: int | None = None
    notes: Sequence[str] = ()


def readable(
    student: nn.Module,
    teacher: Teacher,
    data: Data,
    valid: Data | None,
    on_policy: OnPolicyConfig | None,
    ends: set[int],
) -> Given:
    """Return the data less the questions that leave no room, and held-out ones with answers."""
    if isinstance(data, Examples):
        return Given(data, valid)
    assert not isinstance(valid, Examples)
    networks = readers(student, teacher)
    limit = text_limit(*networks)
    _check_tokens(networks, [*data, *(valid or ())])
    config = on_policy or OnPolicyConfig()
    learned, judged = (Report(rows=len(texts), kept=len(texts)) for texts in (data, valid or ()))
    if config.on_policy:
        data = with_room(data, limit, learned)
    if not data:
        raise InputError(f"nothing is left to learn: {learned.reasons()}")
    # The last of them reads the same tokens, and knows more, where there is a teacher.
    valid = valid and answered(valid, networks[-1], ends, config, limit, judged)
    notes = [
        f"of {report.rows} {name} are not used: {report.reasons()}"
        for name, report in (("texts", learned), ("held-out texts", judged))
        if report.dropped
    ]
    return Given(data, valid, limit, notes)


def readers(student: nn.Module, teacher: Teacher | None) -> list[nn.Module]:
    """Return the networks that read the student's tokens: itself, then its teachers."""
    if type(teacher) is LiveTeacher:  # others do not read these tokens
        return [student, *(answers.network for answers in teacher.answers)]
    return [student]


def _check_tokens(networks: Sequence[nn.Module], texts: Sequence[Text]) -> None:
    """Raise InputError if a text has tokens or positions that a network does not: it would not."""
    longest = max(len(text.tokens) for text in texts)
    for network in networks:
        check_tokens(network, [text.tokens for text in texts])
        name, positions = type(network).__name__, position_limit(network)
        if positions is not None and longest > positions:
            raise InputError(
                f"the longest text has {longest} tokens, but a {name} of {positions} positions is "
                "to read it; use a smaller max_length"
            )
