"""Executes kernels' sources on the CPU: a launcher that stands in for the GPU.

Each source is compiled with the system's C++ compiler against ``runtime.h``, which runs the whole
grid with its threads in random order and checks every access to memory. So what is tested is what
a GPU is given: the very source, and the wrapper that chooses its grid.

    with launching(Harness(seed=0)):
        found = walk.kernel(tokens, parents, drawn)       # executed here, not on a GPU

What only a GPU has stays open: its rounding of exp and log, its speed, and its compiler.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.arrays import in_memory
from mlx_distill.kernels.program import DIALECT, Launch, Program, launching

HERE = Path(__file__).parent
BUILT = HERE / ".built"
RUNTIME = HERE / "runtime.h"
# Metal is C++14; variables that nobody has set hold what shows. -Og compiles in half of -O1's time.
FLAGS = ("-std=c++14", "-Og", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing")
FLAGS += ("-w", "-Werror=uninitialized", "-Werror=return-type", "-ftrivial-auto-var-init=pattern")
MESSAGE_BYTES = 512

# Metal's words for a thread's place, and where the harness keeps them.
PLACES = {
    "thread_position_in_grid": ("uint3", "position_in_grid()"),
    "thread_position_in_threadgroup": ("uint3", "position_in_group()"),
    "threadgroup_position_in_grid": ("uint3", "machine.group_position"),
    "threads_per_threadgroup": ("uint3", "machine.group_size"),
    "thread_index_in_threadgroup": ("uint", "machine.current->index"),
    "thread_index_in_simdgroup": ("uint", "machine.current->lane"),
    "simdgroup_index_in_threadgroup": ("uint", "machine.current->simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "(machine.size + LANES - 1) / LANES"),
}
TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.int32: "int",
    mx.uint32: "uint",
    mx.int64: "int64_t",
    mx.uint64: "uint64_t",
    mx.uint16: "uint16_t",
    mx.uint8: "uint8_t",
    mx.int8: "int8_t",
    mx.bool_: "bool",
}


class KernelFault(Exception):
    """What a kernel did that it must not do."""


class Harness:
    """A launcher that executes programs here.

    Args:
        seed: Of the order in which threads run, and of how the grid's end is cut.
    """

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)

    def __call__(self, program: Program, launch: Launch) -> list[mx.array]:
        """Return a program's outputs.

        Raises:
            KernelFault: If it touched memory that it must not touch, or threads wait for ever.
        """
        sizes = zip(launch.output_shapes, launch.output_dtypes, strict=True)
        outputs = [np.zeros(shape, _numpy_type(dtype)) for shape, dtype in sizes]
        inputs = [_as_it_lies(x, program.any_layout) for x in launch.inputs]
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        _compiled(program, launch)(
            _pointers([x for x, _ in inputs] + outputs),
            (ctypes.c_long * (len(inputs) + len(outputs)))(
                *(x.size for x, _ in inputs), *(x.size for x in outputs)
            ),
            _pointers([np.array(x.shape, np.int32) for x in launch.inputs]),
            _pointers([np.array(strides, np.int64) for _, strides in inputs]),
            (ctypes.c_uint * 3)(*launch.grid),
            (ctypes.c_uint * 3)(*launch.threadgroup),
            int(self.random.integers(2)),
            ctypes.c_uint64(int(self.random.integers(1, 2**62))),
            message,
        )
        if message.value:
            raise KernelFault(f"{program.name}: {message.value.decode()}")
        made = zip(outputs, launch.output_dtypes, strict=True)
        return [mx.array(x).view(dtype).reshape(x.shape) for x, dtype in made]


class Noting:
    """A launcher that executes nothing: it notes what is launched, and returns zeros."""

    def __init__(self):
        self.launches: list[tuple[Program, Launch]] = []

    def __call__(self, program: Program, launch: Launch) -> list[mx.array]:
        self.launches.append((program, launch))
        sizes = zip(launch.output_shapes, launch.output_dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in sizes]


def no_compiler() -> str:
    """Return why kernels cannot be executed here; "" if they can."""
    return "" if compiler() else "no C++ compiler was found"


@cache
def compiler() -> str | None:
    """Return the system's C++ compiler."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((name for name in names if name and shutil.which(name)), None)


def source_of(program: Program, launch: Launch) -> str:
    """Return the C++ of a program, for the types that it is launched with.

    Its entry has the name ``ENTRY``, which the file defines.
    """
    read = [TYPES[x.dtype] for x in launch.inputs]
    written = [TYPES[dtype] for dtype in launch.output_dtypes]
    inputs = list(zip(program.inputs, read, strict=True))
    outputs = list(zip(program.outputs, written, strict=True))
    fields = [f"Input<{kind}> {name};" for name, kind in inputs]
    fields += [f"Output<{kind}> {name};" for name, kind in outputs]
    fields += [f"const int* {name}_shape; const int64_t* {name}_strides;" for name, _ in inputs]
    lines = [
        program.functions,
        f"static struct {{ {' '.join(fields)} }} args;",
        "static void kernel() {",
        *_template(launch.template),
        *(f"  auto {name} = args.{name};" for name, _ in inputs + outputs),
        *(
            f"  auto {name}_{what} = args.{name}_{what};"
            for name, _ in inputs
            for what in ("shape", "strides")
            if f"{name}_{what}" in program.body
        ),
        *(
            f"  {kind} {name} = {value};"
            for name, (kind, value) in PLACES.items()
            if re.search(rf"\b{name}\b", program.body)
        ),
        program.body,
        "}",
        *_entry(inputs, outputs),
    ]
    return "\n".join(lines)


def _template(template: Sequence[tuple[str, Any]]) -> list[str]:
    lines = []
    for name, value in template:
        if isinstance(value, mx.Dtype):
            lines.append(f"  typedef {TYPES[value]} {name};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"  constexpr {kind} {name} = {str(value).lower()};")
    return lines


def _entry(inputs: list[tuple[str, str]], outputs: list[tuple[str, str]]) -> list[str]:
    """Return the function that is called from here."""
    lines = [
        'extern "C" int ENTRY(void** data, const long* sizes, const int* const* shapes,',
        "    const int64_t* const* strides, const uint* grid, const uint* group, int cut,",
        "    uint64_t seed, char* message) {",
    ]
    for place, (name, kind) in enumerate(inputs):
        values = f"(const {kind}*)data[{place}], 0, sizes[{place}]"
        lines.append(f'  args.{name} = {{{values}, "{name}"}};')
        lines.append(f"  args.{name}_shape = shapes[{place}];")
        lines.append(f"  args.{name}_strides = strides[{place}];")
    for place, (name, kind) in enumerate(outputs, start=len(inputs)):
        values = f"({kind}*)data[{place}], sizes[{place}]"
        lines.append(f'  args.{name} = output_of({values}, "{name}");')
    lines += [
        "  uint3 threads = {grid[0], grid[1], grid[2]}, size = {group[0], group[1], group[2]};",
        "  bool right = run_grid(threads, size, cut, seed, kernel, message);",
        *(f"  check_written(args.{name}, message);" for name, _ in outputs),
        "  return right;",
        "}",
    ]
    return lines


_loaded: dict[str, Any] = {}


def compile_together(launches: Sequence[tuple[Program, Launch]]) -> None:
    """Compile what is going to be launched in one file: half of the time goes into what all share.

    Raises:
        KernelFault: If something does not compile.
    """
    sources = {source_of(*launch): launch[0].name for launch in launches}
    new = [source for source in sources if source not in _loaded]
    if not new:
        return
    parts = [f'#include "{RUNTIME.name}"', (DIALECT / "common.h").read_text()]
    for number, source in enumerate(new):
        parts.append(f"#define ENTRY run_{number}\nnamespace kernel_{number} {{\n{source}\n}}")
        parts.append("#undef ENTRY")
    library = ctypes.CDLL(str(_built(sources[new[0]], "\n".join(parts))))
    for number, source in enumerate(new):
        _loaded[source] = library[f"run_{number}"]


def compile_what_is_launched(run: Callable[[], Any]) -> None:
    """Compile together what a function launches; it is told that all kernels return zeros."""
    noting = Noting()
    with launching(noting):
        run()
    compile_together(noting.launches)


def _compiled(program: Program, launch: Launch) -> Any:
    compile_together([(program, launch)])
    return _loaded[source_of(program, launch)]


def _built(name: str, source: str) -> Path:
    """Return the compiled source, which is kept by what it was made of."""
    command = compiler()
    assert command is not None
    text = "".join((command, *FLAGS, RUNTIME.read_text(), source))
    file = BUILT / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if file.exists():
        return file
    BUILT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        cpp, made = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        cpp.write_text(source)
        args = [command, *FLAGS, f"-I{HERE}", str(cpp), "-o", str(made)]
        done = subprocess.run(args, capture_output=True, text=True)
        if done.returncode:
            raise KernelFault(f"{name} does not compile:\n{done.stderr[:4000]}")
        made.replace(file)
    return file


def _pointers(arrays: Sequence[np.ndarray]) -> ctypes.Array[ctypes.c_void_p]:
    pointers = (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays))
    pointers.arrays = arrays  # pyright: ignore[reportAttributeAccessIssue]  # alive meanwhile
    return pointers


def _as_it_lies(x: mx.array, any_layout: bool) -> tuple[np.ndarray, list[int]]:
    """Return a copy of an array's memory, and its strides; what lies between is no number."""
    mx.eval(x)
    lying = in_memory(x)
    if not any_layout:
        lying = np.ascontiguousarray(lying)
    strides = [stride // lying.itemsize for stride in lying.strides]
    steps = zip(lying.shape, strides, strict=True)
    size = 1 + sum((length - 1) * stride for length, stride in steps) if lying.size else 0
    memory = np.frombuffer(b"\xff" * (size * lying.itemsize), lying.dtype).copy()
    np.lib.stride_tricks.as_strided(memory, lying.shape, lying.strides)[...] = lying
    return memory, strides


def _numpy_type(dtype: mx.Dtype) -> np.dtype[Any]:
    return np.dtype("uint16") if dtype == mx.bfloat16 else in_memory(mx.zeros(1, dtype)).dtype
