"""Every kernel as MLX launches it on a GPU: compared with its twin, then timed beside it.

    python -m tests.kernels.on_device --seconds 60 --output kernels-gpu.json

The cases are those of ``tests.kernels.run``. Each operation is compared in a process of its own,
all at once, since one fault of memory ends a process's use of the GPU, and compilers run on the
CPU. Those that were right are timed afterwards, alone, as the probe times them. ``--harness`` tries
this very script without a GPU. The exit status is 0 if all are right, 1 if not, 2 without a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# Full precision is what kernels are compared with; read when MLX is first asked for a product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from mlx_distill import checkpoint  # before MLX, since the BLAS comes first

# isort: split
import mlx.core as mx

from mlx_distill.calibration.kernels import in_use
from mlx_distill.calibration.pair import Pair
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.files import write_whole
from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.probe import timed
from mlx_distill.kernels.program import has_gpu, launching
from mlx_distill.machine import provenance
from tests.kernels.harness import Harness
from tests.kernels.large_cases import large_cases
from tests.kernels.run import load_all

MODELS = Path(__file__).parents[2] / "models"
CONTEXT = 128
MOST_SHOWN = 20  # faults of an operation
WORDS = 400  # letters of an error
STARTING_S = 90  # for a process to import MLX and to compile its first kernel
TIMING_S = 240


# ----------------------------------------------------------------------------------- comparing


def compare(operation: Operation[..., Any], seconds: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what is found of an operation so far, after every case."""
    found: dict[str, Any] = {"cases": 0, "wrong": 0, "first_s": None, "faults": []}
    begin = time.perf_counter()
    try:
        for case in operation.cases(seed):
            fault = _fault(operation, case, found)
            found["cases"] += 1
            if fault:
                found["wrong"] += 1
                found["faults"] = [*found["faults"], fault][:MOST_SHOWN]
            found["seconds"] = time.perf_counter() - begin
            yield found
            if found["seconds"] > seconds:
                return
    except Exception:  # of the cases themselves
        yield found | {"error": traceback.format_exc()[-WORDS:]}


def _fault(operation: Operation[..., Any], case: Case, found: dict[str, Any]) -> str:
    """Return what is wrong with a case, "" if nothing; the first one's time holds a compilation."""
    begin = time.perf_counter()
    try:
        result = operation.tried(operation.kernel, case)
        mx.eval(result)
    except Exception as error:
        return f"the kernel does not run: {_short(error)} at {case.name}"
    if found["first_s"] is None:
        found["first_s"] = time.perf_counter() - begin
    fault = _difference(operation, case, result)
    if not fault or mx.default_device() == mx.Device(mx.cpu):
        return fault
    # MLX's own operations may be what is wrong on a GPU, or not be there.
    with mx.stream(mx.cpu):
        again = _difference(operation, case, result)
    note = "note_twin_on_gpu_alone"
    if not again:
        found[note] = [*found.get(note, []), fault][:MOST_SHOWN]
    return again


def _difference(operation: Operation[..., Any], case: Case, result: Any) -> str:
    try:
        return operation.differ(case, result, operation.tried(operation.twin, case))
    except Exception as error:
        return f"the twin does not run: {_short(error)} at {case.name}"


def _short(error: Exception) -> str:
    """Return the beginning and the end of a message: compilers say at the end what it was."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 2 * WORDS else f"{text[:WORDS]} ... {text[-WORDS:]}"


# -------------------------------------------------------------------------------------- timing


def time_them(names: list[str], large: bool) -> Iterator[dict[str, Any]]:
    """Yield times of the kernels and their twins, one a case: of the bundled pair, then large."""
    operations = load_all()
    cases: dict[str, Callable[[], list[Case]]] = {}
    try:
        small = in_use(_bundled(), CONTEXT)
    except Exception as error:
        yield {"name": "bundled pair", "error": _short(error)}
        small = {}
    for name in names:
        cases[name] = lambda name=name: [
            *small.get(name, ()),
            *(large_cases(name) if large else ()),
        ]
        try:
            made = cases[name]()
        except Exception as error:
            yield {"name": name, "error": _short(error)}
            continue
        for case in made:
            yield {"name": name, "case": case.name, "shapes": _shapes(case)} | _time(
                operations[name], case
            )


def _time(operation: Operation[..., Any], case: Case) -> dict[str, Any]:
    try:
        fault = _fault(operation, case, {"first_s": 0})
        if fault or not has_gpu():
            return {"error": fault or "right, and not timed in the harness"}
        kernel_s, twin_s = timed(operation, case)
    except Exception as error:
        return {"error": _short(error)}
    return {"kernel_s": kernel_s, "twin_s": twin_s, "ratio": kernel_s / twin_s}


def _shapes(case: Case) -> list[str]:
    arrays = [x for x in (*case.args, *case.options.values()) if isinstance(x, mx.array)]
    return [f"{x.dtype}{list(x.shape)}".removeprefix("mlx.core.") for x in arrays]


def _bundled() -> Pair:
    model, tokenizer = checkpoint.load(MODELS / "stories-14m")
    drafter = load_drafter(str(MODELS / "stories-14m-redrafter"), model, tokenizer)
    return Pair(model, tokenizer, drafter)


# ----------------------------------------------------------------------------------- processes


def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of comparing, each operation")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--kernels", nargs="*", help="names; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--harness", action="store_true", help="execute them on the CPU")
    parser.add_argument("--part", choices=("compare", "time"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.harness and not has_gpu():
        print("no GPU here: kernels are not launched by MLX (--harness tries the script)")
        return 2
    names = options.kernels or list(load_all())
    if options.part:
        with launching(Harness(options.seed)) if options.harness else nullcontext():
            _child(options, names)
        return 0
    found = {**provenance(), "tf32": os.environ["MLX_ENABLE_TF32"], "seed": options.seed}
    found["compared"] = _compared(options, names)
    right = [name for name, one in found["compared"].items() if _is_right(one)]
    found["times"] = _timed(options, right)
    if options.output:
        write_whole(options.output, json.dumps(found, indent=1) + "\n")
    _show(found)
    return int(len(right) < len(names))


def _child(options: argparse.Namespace, names: list[str]) -> None:
    """Print a line of JSON whenever something is found: the process may not come to its end."""
    if options.part == "time":
        lines = time_them(names, large=not options.harness)
    else:
        lines = compare(load_all()[names[0]], options.seconds, options.seed)
    for line in lines:
        print(json.dumps(line), flush=True)


def _compared(options: argparse.Namespace, names: list[str]) -> dict[str, dict[str, Any]]:
    """Compare all operations at once, each in a process."""
    running = {name: _start(options, "compare", [name]) for name in names}
    found = {}
    for name, process in running.items():
        lines, error = _finish(process, options.seconds + STARTING_S)
        found[name] = lines[-1] if lines else {"cases": 0, "wrong": 0}
        if error:
            found[name]["error"] = error
    return found


def _timed(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    if not names:
        return []
    lines, error = _finish(_start(options, "time", names), TIMING_S)
    return [*lines, {"name": "timing", "error": error}] if error else lines


def _start(options: argparse.Namespace, part: str, names: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.kernels.on_device", "--part", part, "--kernels", *names]
    command += ["--seconds", str(options.seconds), "--seed", str(options.seed)]
    command += ["--harness"] if options.harness else []
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=MODELS.parent)


def _finish(process: subprocess.Popen[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Return what a process has found, and why it ended early; "" if it did not."""
    try:
        output, errors = process.communicate(timeout=seconds)
        why = f"exit status {process.returncode}: {errors[-2 * WORDS :]}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        why = f"it took more than {seconds:.0f} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return lines, "" if process.returncode == 0 else why


def _is_right(found: dict[str, Any]) -> bool:
    return found["cases"] > 0 and not found["wrong"] and not found.get("error")


def _show(found: dict[str, Any]) -> None:
    print(found["machine"]["processor"])
    for name, one in found["compared"].items():
        print(f"{name}: {one['cases']} cases, {one['wrong']} wrong, {one.get('error', '')}")
        for fault in one.get("faults", [])[:3]:
            print(f"  {fault}")
    for one in found["times"]:
        told = one.get("error") or (
            f"kernel {1e6 * one['kernel_s']:.1f} us, twin {1e6 * one['twin_s']:.1f} us, "
            f"{one['ratio']:.2f} x"
        )
        print(f"{one['name']}, {one.get('case', '')} {one.get('shapes', '')}: {told}")


if __name__ == "__main__":
    sys.exit(main())
