"""How much a calibration measures."""

from dataclasses import dataclass
from typing import Annotated

from mlx_distill.drafters.protocol import BeamWidth, DraftLength
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, check_fields


@dataclass(frozen=True)
class CalibrationConfig:
    """What is measured.

    Args:
        rows: Rows of the target's calls; 1 among them, which is a plain step. Those that the
            model's table of positions is too short for are left out.
        contexts: Lengths of the text before them, in tokens; those beyond the model's context are
            left out.
        widths: Beam widths of the drafts.
        lengths: Lengths of the drafts, in tokens.
        rounds: How often each is timed.
        limit_s: After so many seconds there are no more than three rounds, and after twice as
            many none.
        cycles: Steps and cycles of decoding that are timed at once.
        deadline_s: After so many seconds nothing more is begun: neither a round nor, in the first,
            what matters least. What compilers take counts.
    """

    rows: tuple[Annotated[int, Between(1, 1024)], ...] = (*range(1, 18), 24, 32, 33, 48, 64)
    contexts: tuple[Annotated[int, Between(1, 10**7)], ...] = (128, 1024, 4096)
    widths: tuple[BeamWidth, ...] = (1, 2, 4, 8)
    lengths: tuple[DraftLength, ...] = (1, 2, 3, 4, 6, 8)
    rounds: Annotated[int, Between(3, 1000)] = 9
    limit_s: Annotated[float, Between(above=0)] = 900.0
    cycles: Annotated[int, Between(2, 1000)] = 7
    deadline_s: Annotated[float, Between(above=0)] = 86_400.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("rows", "contexts", "widths", "lengths"):
            values = tuple(sorted(set(getattr(self, name))))
            if not values:
                raise InputError(f"{name} must name at least one number")
            object.__setattr__(self, name, values)
        if self.rows[0] != 1:
            raise InputError("rows must hold 1, which is a plain step")


# What is measured at the first use of a pair, while its user waits for 20 seconds at the most: what
# is under way at the deadline still takes its time. A round takes as long as 150 plain steps.
DEADLINE_S = 16.0
QUICK = CalibrationConfig(
    rows=(1, 2, 3, 4, 5, 6, 8, 12, 16),
    contexts=(128, 512),
    widths=(1, 4),
    lengths=(1, 2, 4, 7),
    rounds=7,
    limit_s=10.0,
    deadline_s=DEADLINE_S,
)
# The same where steps are slow: a round takes as long as about 60.
COARSE = CalibrationConfig(
    rows=(1, 2, 4, 8, 16),
    contexts=(128,),
    widths=(1, 4),
    lengths=(1, 2, 4, 6),
    cycles=2,
    rounds=3,
    limit_s=10.0,
    deadline_s=DEADLINE_S,
)
SLOW_STEP_S = 0.02
