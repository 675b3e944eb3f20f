"""A kernel's source as a program, and what executes programs: Metal, CUDA, or who stands in.

A program is the body of a kernel in the dialect of ``dialect/``, and the functions it calls. This
is the only file of the package that knows which language that becomes. Others may stand in: the
test harness executes programs on a processor, and the counter of dispatches only counts them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

DIALECT = Path(__file__).parent / "dialect"
SIMD_WIDTH = 32
MOST_THREADS = 1024

Triple: TypeAlias = tuple[int, int, int]


class Launch(NamedTuple):
    """What a program is launched with.

    Args:
        inputs: In the order of the program's names; none is a scalar.
        template: Types and numbers that the source is compiled for.
        grid: How many threads there are.
        threadgroup: How many of them form a group: whole simdgroups.
        output_shapes: Of the results.
        output_dtypes: Of the results.
    """

    inputs: Sequence[mx.array]
    template: Sequence[tuple[str, Any]]
    grid: Triple
    threadgroup: Triple
    output_shapes: Sequence[tuple[int, ...]]
    output_dtypes: Sequence[mx.Dtype]


@dataclass(frozen=True)
class Program:
    """A kernel's source.

    Args:
        name: Of the kernel; no other program has it.
        inputs: Names of the arrays that are read; ``x_shape`` and ``x_strides`` of an array ``x``
            are known where the body names them.
        outputs: Names of the arrays that are written, in row order.
        body: Statements in the dialect. Here alone may a thread ask for its place, by Metal's
            names, as ``thread_position_in_grid``.
        functions: What the body calls, beside the functions of the dialect.
        any_layout: Whether inputs may lie in memory as they like; else what is not in row order is
            copied first.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    functions: str = ""
    any_layout: bool = False

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Sequence[tuple[str, Any]] = (),
        grid: Triple,
        threadgroup: Triple,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Return the outputs; this is one dispatch, beside copies of what is not in row order."""
        x, y, z = threadgroup
        assert x * y * z % SIMD_WIDTH == 0, "a threadgroup is whole simdgroups"
        assert x * y * z <= MOST_THREADS
        assert all(array.ndim for array in inputs), "Metal has references for scalars"
        launch = Launch(inputs, template, grid, threadgroup, output_shapes, output_dtypes)
        return _launchers[-1](self, launch)


Launcher: TypeAlias = Callable[[Program, Launch], list[mx.array]]


def has_gpu() -> bool:
    """Return whether kernels can run on the device in use."""
    return mx.default_device() == mx.Device(mx.gpu) and _compiler() is not None


@contextmanager
def launching(launcher: Launcher) -> Iterator[None]:
    """Let somebody else than a GPU execute the programs that are launched meanwhile."""
    _launchers.append(launcher)
    try:
        yield
    finally:
        _launchers.remove(launcher)


def dialect(language: str) -> str:
    """Return the header of a language, and the functions that all kernels share."""
    return "".join((DIALECT / f"{name}.h").read_text() for name in (language, "common"))


@cache
def _compiler() -> str | None:
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


@cache
def _compiled(program: Program) -> Callable[..., list[mx.array]]:
    language = _compiler()
    assert language is not None
    make = mx.fast.metal_kernel if language == "metal" else mx.fast.cuda_kernel
    kernel: Any = make(
        name=f"mlx_distill_{program.name}",
        input_names=list(program.inputs),
        output_names=list(program.outputs),
        source=program.body,
        header=dialect(language) + program.functions,
        ensure_row_contiguous=not program.any_layout,
    )
    return kernel


def _on_gpu(program: Program, launch: Launch) -> list[mx.array]:
    return _compiled(program)(
        inputs=list(launch.inputs),
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=launch.output_shapes,
        output_dtypes=launch.output_dtypes,
        stream=mx.gpu,
    )


_launchers: list[Launcher] = [_on_gpu]
