"""Every kernel is CUDA, too: a compiler says so where there is one, of what MLX would give it.

One file holds them all, since most of the compiler's time goes into CUDA's own headers. What MLX
puts around a kernel is written down here: its names of types, and which shapes it passes along.
"""

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_distill.kernels.choice import Operation
from mlx_distill.kernels.program import Launch, Program, dialect, launching
from tests.kernels.harness import Noting
from tests.kernels.run import load_all

NVCC = shutil.which("nvcc")
SAMPLE = 24  # of each operation's cases: all types, and most templates
TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.int64: "int64_t",
    mx.uint64: "uint64_t",
    mx.uint16: "uint16_t",
    mx.uint8: "uint8_t",
    mx.int8: "int8_t",
    mx.bool_: "bool",
}
# What a kernel finds before its header.
HEADER = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#include <cooperative_groups.h>
#define inf cuda::std::numeric_limits<float>::infinity()
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
"""


def launched(operations: Iterable[Operation]) -> dict[str, tuple[Program, Launch]]:
    """Return what operations launch on some cases, by names: once for all types and templates.

    Templates are told apart but for the sizes among them, which no compiler trips over.
    """
    found: dict[str, tuple[Program, Launch]] = {}
    known: dict[str, str] = {}

    noting = Noting()
    with launching(noting):
        for operation in operations:
            for case in itertools.islice(operation.cases(3), SAMPLE):
                operation.tried(operation.kernel, case)
    for program, launch in noting.launches:
        kernel = re.sub(r"(constexpr int \w+ =) \d+", r"\1 0", _kernel(program, launch, ""))
        name = known.setdefault(kernel, f"{program.name}_{len(known)}")
        found.setdefault(name, (program, launch))
    return found


def source_of(launches: dict[str, tuple[Program, Launch]]) -> str:
    """Return one file of CUDA with every kernel that is launched."""
    programs: dict[str, list[str]] = {}
    for name, (program, launch) in launches.items():
        parts = programs.setdefault(program.name, [program.functions])
        parts.append(_kernel(program, launch, name))
    spaces = [f"namespace {name} {{\n{''.join(parts)}}}" for name, parts in programs.items()]
    return "\n".join([HEADER, dialect("cuda"), *spaces])


def _kernel(program: Program, launch: Launch, name: str) -> str:
    """Return a kernel as MLX writes it."""
    args = []
    for input_, array in zip(program.inputs, launch.inputs, strict=True):
        args.append(f"const {TYPES[array.dtype]}* {input_}")
        args += [
            f"const __grid_constant__ {kind} {input_}_{what}"
            for kind, what in (("Shape", "shape"), ("Strides", "strides"))
            if f"{input_}_{what}" in program.body
        ]
    outputs = zip(program.outputs, launch.output_dtypes, strict=True)
    args += [f"{TYPES[dtype]}* {output}" for output, dtype in outputs]
    constants = [
        f"using {word} = {TYPES[value]};"
        if isinstance(value, mx.Dtype)
        else f"constexpr {'bool' if isinstance(value, bool) else 'int'} {word} = {int(value)};"
        for word, value in launch.template
    ]
    lines = [f"__global__ void {name}({', '.join(args)}) {{", *constants, program.body, "}\n"]
    return "\n".join(lines)


def compiled(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    assert NVCC is not None
    file = folder / "kernels.cu"
    file.write_text(source)
    # As far as CUDA's assembly: the rest takes twice as long, and there is no mistake of ours left.
    args = [NVCC, "-std=c++17", "-arch=sm_90", "-ptx", "-Xcicc=-O0"]
    args += [str(file), "-o", str(folder / "kernels.ptx")]
    return subprocess.run(args, capture_output=True, text=True)


@pytest.mark.skipif(NVCC is None, reason="no nvcc was found")
def test_every_kernel_compiles_as_cuda(tmp_path: Path) -> None:
    launches = launched(load_all().values())
    source = source_of(launches)
    done = compiled(source, tmp_path)
    assert done.returncode == 0, done.stderr[:8000]
    made = (tmp_path / "kernels.ptx").read_bytes()
    assert all(name.encode() in made for name in launches)
