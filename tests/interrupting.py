"""Ctrl-C at any moment of a call, and trainings that are killed at a step.

The moments are calls and returns, those of built-in functions too, counted by a profiler: it raises
KeyboardInterrupt where a signal's handler would.
"""

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# Between a block and the call of C that takes back what held for it, no signal is handled.
TAKES_BACK = ("__exit__", "set")


class Countdown:
    """A profiler that interrupts at a moment; without one it counts them."""

    def __init__(self, moment: int | None = None):
        self.moment = moment
        self.count = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        self.count += 1
        takes_back = event == "c_call" and argument.__name__ in TAKES_BACK
        # Nor where a generator yields; raised there, it would end without its ``finally``.
        yields = event == "return" and frame.f_code.co_flags & inspect.CO_GENERATOR
        if self.moment is not None and self.count >= self.moment and not (takes_back or yields):
            self.moment = None
            raise KeyboardInterrupt


def interrupted(call: Callable[..., object], moment: int | None, *args: Any) -> int:
    """Call something, interrupt it at a moment, and return how many there were until then."""
    countdown = Countdown(moment)
    try:
        sys.setprofile(countdown)
        call(*args)
        sys.setprofile(None)
    except KeyboardInterrupt:
        sys.setprofile(None)
    return countdown.count


class Killed(Exception):
    """Stands in for the end of the process."""


class KillAt:
    """A callback that stands in for a kill."""

    def __init__(self, step: int):
        self.step = step

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        if info["iteration"] == self.step:
            raise Killed

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        pass
