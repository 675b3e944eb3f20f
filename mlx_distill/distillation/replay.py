"""Texts that a drafter learns from again and again, with what the target computed of them.

A folder holds a file per text, in two bytes a number. Together they are no larger than a bound; the
oldest make room. Every fifth is never learned but judges what was learned from the others.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_distill.distillation.drafter import TargetView
from mlx_distill.distillation.feature_store import short
from mlx_distill.distillation.recording import HeardText
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import write_arrays
from mlx_distill.safetensors import check_safetensors, read_arrays

HELD_OUT_EVERY = 5  # the first text is held out, too: without one nothing can be judged


class Replay:
    """The texts of a folder.

    Args:
        folder: Made with its first text.
        most_bytes: Of all of them.
        embed: Makes embeddings of tokens, in float32.
        dtype: Of the target's numbers.

    Raises:
        InputError: If a file is damaged.
    """

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        embed: Callable[[mx.array], mx.array],
        dtype: mx.Dtype,
    ):
        self._folder, self._most_bytes = folder, most_bytes
        self._embed, self._dtype = embed, dtype
        for number in self.numbers(held_out=None):
            check_safetensors(self._path(number))

    def numbers(self, held_out: bool | None) -> list[int]:
        """Return the numbers of the texts that are held out, or learned; None for all."""
        found = sorted(int(path.stem) for path in self._folder.glob("[0-9]*.safetensors"))
        return [n for n in found if held_out in (None, n % HELD_OUT_EVERY == 0)]

    def add(self, text: HeardText) -> int:
        """Keep a text, and return its number; the oldest texts make room.

        Raises:
            InputError: If it cannot be written.
        """
        number = max(self.numbers(held_out=None), default=-1) + 1
        arrays = {
            "tokens": mx.array(text.tokens, mx.int32),
            "ahead": mx.array(text.ahead, mx.int32),
            "hidden": short(text.hidden),
            **{f"tap-{place}": short(tap) for place, tap in enumerate(text.taps)},
        }
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{self._folder} cannot be written: {one_line(error)}") from None
        write_arrays(self._path(number), arrays)
        self._make_room()
        return number

    def view(self, numbers: Sequence[int]) -> TargetView:
        """Return the target's view of some texts; what the drafter is given is in float32."""
        files = [read_arrays(self._path(number)) for number in numbers]
        names = sorted(name for name in files[0] if name.startswith("tap-"))
        taps = tuple(mx.concatenate([file[name] for file in files]) for name in names)
        hidden = mx.concatenate([file["hidden"] for file in files])
        return TargetView(
            hidden.astype(mx.float32),
            mx.concatenate([file["tokens"] for file in files]),
            mx.concatenate([file["ahead"] for file in files]),
            hidden.astype(self._dtype),
            self._embed,
            tuple(tap.astype(mx.float32) for tap in taps),
        )

    def _make_room(self) -> None:
        sizes = {n: self._path(n).stat().st_size for n in self.numbers(held_out=None)}
        total = sum(sizes.values())
        for number, size in list(sizes.items())[:-1]:  # the newest stays
            if total <= self._most_bytes:
                return
            self._path(number).unlink()
            total -= size

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:07d}.safetensors"
