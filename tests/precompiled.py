"""The header of MLX's compiled operations, compiled once for all of them.

Off a GPU every fused operation that MLX meets for the first time becomes a C++ file of some lines
and one header, and the header takes most of the compiler's second. The suite meets hundreds. So the
compiler that is found first looks in another folder before, where the header lies precompiled. It
is taken for the very flags that it was made with; with others, the header is read as ever.
"""

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

HEADER = Path("mlx/backend/cpu/compiled_preamble.h")
FLAGS = ("-std=c++17", "-O3", "-Wall", "-fPIC")  # as MLX compiles


def precompile(include: Path, kept: Path) -> None:
    """Let what is started from now on find a compiler that knows the header.

    Args:
        include: Holds MLX's headers.
        kept: Where the header is found again by the next run; a folder of this MLX's own.
    """
    compiler = shutil.which("g++")
    if compiler is None or not (include / HEADER).is_file():
        return
    made = kept / f"{HEADER}.gch"
    if not made.is_file() and not _made(compiler, include, made):
        return
    wrapper = kept / "bin" / "g++"
    if not wrapper.is_file():
        wrapper.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as folder:
            script = Path(folder) / "g++"
            script.write_text(f'#!/bin/sh\nexec "{compiler}" "-I{kept}" "$@"\n')
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
            script.replace(wrapper)
    os.environ["PATH"] = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"


def _made(compiler: str, include: Path, made: Path) -> bool:
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        new = Path(folder) / made.name
        args = [compiler, *FLAGS, f"-I{include}", "-x", "c++-header", str(include / HEADER)]
        done = subprocess.run([*args, "-o", str(new)], capture_output=True)
        if done.returncode == 0:
            new.replace(made)
    return made.is_file()
