"""Texts that a drafter learns from again and again, with what the target computed of them.

A folder holds a file per text, in two bytes a number. Together they are no larger than a bound; the
oldest make room. Every fifth is never learned but judges what was learned from the others.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_distill.arrays import all_finite, to_host
from mlx_distill.distillation.drafter import TargetView
from mlx_distill.distillation.feature_store import short
from mlx_distill.distillation.recording import HeardText
from mlx_distill.errors import InputError, one_line
from mlx_distill.files import write_arrays
from mlx_distill.safetensors import read_arrays, read_header

NUMERALS = 7  # of a file's name
_NAME = re.compile(rf"\d{{{NUMERALS}}}\.safetensors", re.ASCII)
HELD_OUT_EVERY = 5  # the first text is held out, too: without one nothing can be judged


class Replay:
    """The texts of a folder.

    Args:
        folder: Made with its first text.
        most_bytes: Of all of them.
        embed: Makes embeddings of tokens, in float32.
        dtype: Of the target's numbers.
        vocab_size: How many tokens the target has.
        widths: Of what the target's head sees, and then of what each tapped layer returns; None
            for one that is not known.

    Raises:
        InputError: If a file is damaged, or holds something else.
    """

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        embed: Callable[[mx.array], mx.array],
        dtype: mx.Dtype,
        vocab_size: int,
        widths: Sequence[int | None],
    ):
        self._folder, self._most_bytes = folder, most_bytes
        self._embed, self._dtype = embed, dtype
        for number in self.numbers(held_out=None):
            widths = _checked(self._path(number), vocab_size, widths)

    def numbers(self, held_out: bool | None) -> list[int]:
        """Return the numbers of the texts that are held out, or learned; None for all."""
        names = (path.name for path in self._folder.glob("*.safetensors"))
        found = sorted(int(name[:NUMERALS]) for name in names if _NAME.fullmatch(name))
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
        return self._folder / f"{number:0{NUMERALS}d}.safetensors"


def _checked(path: Path, vocab_size: int, widths: Sequence[int | None]) -> list[int | None]:
    """Return the widths of a text's features, of which some may have been known.

    What is read from beyond an embedding, or rows that are not there, would end the process.

    Raises:
        InputError: If they are others, or the file is no text with features.
    """
    header = read_header(path)
    names = ["hidden", *(f"tap-{place}" for place in range(len(widths) - 1))]
    if header.keys() != {"tokens", "ahead", *names}:
        raise InputError(f"{path} is damaged: it holds {', '.join(sorted(header)) or 'nothing'}")
    (count, *more) = header["tokens"].shape or (0,)
    rows = [header[name] for name in names]
    whole = count and not more and header["ahead"].shape == (count,)
    whole = whole and {header["tokens"].dtype, header["ahead"].dtype} == {"I32"}
    if not whole or any(len(one.shape) != 2 or one.shape[0] != count for one in rows):
        raise InputError(f"{path} is damaged: its tokens and their features do not fit each other")
    found = [one.shape[1] for one in rows]
    if any(width not in (None, one) for width, one in zip(widths, found, strict=True)):
        raise InputError(f"{path} is damaged: its features have the widths {found}")
    if any(one.dtype not in ("BF16", "F16") for one in rows):
        raise InputError(f"{path} is damaged: its features are no numbers of two bytes")
    arrays = read_arrays(path)
    tokens, ahead = to_host(arrays["tokens"]), to_host(arrays["ahead"])
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise InputError(f"{path} is damaged: it holds tokens that the model does not have")
    if min(ahead) < -1 or any(n >= count - place for place, n in enumerate(ahead)) or ahead[-1]:
        raise InputError(f"{path} is damaged: its answer has rows that are not there")
    if not all_finite(*(arrays[name] for name in names)):
        raise InputError(f"{path} is damaged: its features are not all finite")
    return [*found]
