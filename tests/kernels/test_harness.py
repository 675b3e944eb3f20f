"""The harness finds what a GPU would not tell: planted faults, and none in what is right."""

import zlib
from collections.abc import Sequence
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.kernels.program import Launcher, Program, launching
from tests.kernels.harness import Harness, KernelFault, Noting, compile_together, no_compiler

pytestmark = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())

X = mx.arange(96).astype(mx.float32)

# The sum of a row of 96, by three simdgroups.
SUMMING = """
  SHARED(float, parts, 3);
  float part = simd_sum(float(x[thread_index_in_threadgroup]));
  if (thread_index_in_simdgroup == 0) {
    parts[simdgroup_index_in_threadgroup] = part;
  }
  barrier();
  if (thread_index_in_threadgroup == 0) {
    y[0] = float(parts[0]) + float(parts[1]) + float(parts[2]);
  }
"""
# The row turned round, in threadgroup memory.
TURNING = """
  SHARED(float, kept, 96);
  uint self = thread_index_in_threadgroup;
  kept[self] = float(x[self]);
  barrier();
  y[self] = float(kept[95 - self]);
"""
# What lies above every value, through the lanes.
SHIFTING = """
  uint self = thread_index_in_threadgroup;
  float above = simd_shuffle(float(x[self]), (thread_index_in_simdgroup + 1) % 32);
  y[self] = above;
"""
# How many values are odd.
COUNTING = """
  SHARED_COUNTERS(counts, 2);
  uint self = thread_index_in_threadgroup;
  if (self < 2) {
    set_counter(counts, self, 0);
  }
  barrier();
  add_to_counter(counts, uint(x[self]) % 2, 1);
  barrier();
  if (self == 0) {
    y[0] = float(get_counter(counts, 1));
  }
"""
# Lanes change places in threadgroup memory, each simdgroup for itself.
WITHIN = """
  SHARED(float, kept, 96);
  uint self = thread_index_in_threadgroup;
  kept[self] = float(x[self]);
  simd_barrier();
  y[self] = float(kept[self ^ 1]);
"""
# A grid that does not fill its groups.
TAIL = """
  uint self = thread_position_in_grid.x;
  if (self < x_shape[0]) {
    y[self] = float(x[self]) + 1;
  }
"""
TILES = """
  SHARED(float, left, 64);
  SHARED(float, right, 64);
  SHARED(float, sums, 64);
  uint lane = thread_index_in_simdgroup;
  for (uint i = lane; i < 64; i += 32) {
    left[i] = float(x[i]);
    right[i] = float(x[32 + i]);
  }
  barrier();
  Tile<float> a, b, sum;
  tile_fill(sum, 0.0f);
  tile_load(a, left, 8, lane);
  tile_load(b, right, 8, lane);
  tile_multiply_add(sum, a, b, lane);
  tile_store(sum, sums, 8, lane);
  barrier();
  for (uint i = lane; i < 64; i += 32) {
    y[i] = float(sums[i]);
  }
"""


def run(
    body: str, size: int, threads: int = 96, group: int = 96, launcher: Launcher | None = None
) -> mx.array:
    program = Program(f"tried_{zlib.crc32(body.encode())}", ("x",), ("y",), body)
    with launching(launcher or Harness(0)):
        (found,) = program(
            [X],
            grid=(threads, 1, 1),
            threadgroup=(group, 1, 1),
            output_shapes=[(size,)],
            output_dtypes=[mx.float32],
        )
    return found


def run_in_orders(body: str, *shape: int) -> None:
    """Run with several seeds: the order of threads, and how the grid ends, are drawn."""
    for seed in range(12):
        run(body, *shape, launcher=Harness(seed))


VALUES = np.arange(96, dtype=np.float32)
RIGHT = {
    "sum": (SUMMING, (1,), [VALUES.sum()]),
    "turned": (TURNING, (96,), VALUES[::-1]),
    "shifted": (SHIFTING, (96,), np.roll(VALUES.reshape(3, 32), -1, axis=1).reshape(-1)),
    "counted": (COUNTING, (1,), [48]),
    "within simdgroups": (WITHIN, (96,), VALUES.reshape(-1, 2)[:, ::-1].reshape(-1)),
    "tail": (TAIL, (96, 96, 64), VALUES + 1),
    "tiles": (TILES, (64, 32, 32), (VALUES[:64].reshape(8, 8) @ VALUES[32:].reshape(8, 8)).ravel()),
}


@pytest.fixture
def compiled() -> None:
    """Have all of them compiled in one file."""
    compile_all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", sorted(RIGHT))
def test_known_results(name: str) -> None:
    body, shape, expected = RIGHT[name]
    for seed in range(4):
        found = run(body, *shape, launcher=Harness(seed))
        np.testing.assert_array_equal(np.array(found), np.array(expected, np.float32))


# What is changed in which of them, and what the harness says of it.
FAULTS: dict[str, tuple[str, Sequence[int], str, str, str]] = {
    "missing barrier": (SUMMING, (1,), "barrier();", "", "race|before anything is written"),
    "missing barrier of a turn": (TURNING, (96,), "barrier();", "", "race|before anything"),
    "missing barrier before counting": (
        *(COUNTING, (1,), "  }\n  barrier();\n  add", "  }\n  add", "race|before it is set"),
    ),
    "missing barrier after counting": (
        *(COUNTING, (1,), "1);\n  barrier();", "1);", "race|with no barrier"),
    ),
    "missing barrier of a simdgroup": (WITHIN, (96,), "simd_barrier();", "", "race|before any"),
    "a simdgroup's barrier for a group's": (
        *(TURNING, (96,), "barrier();", "simd_barrier();", "race|before anything"),
    ),
    "a barrier that some pass by": (
        *(
            TURNING,
            (96,),
            "barrier();",
            "if (self < 64) { barrier(); }",
            "deadlock|race|before any",
        ),
    ),
    "a barrier that some do not reach": (
        *(TURNING, (96,), "barrier();", "if (self > 90) { return; } barrier();", "deadlock"),
    ),
    "a lane that does not take part": (
        *(
            SHIFTING,
            (96,),
            "uint self",
            "if (thread_index_in_simdgroup == 5) { return; } uint self",
        ),
        "deadlock",
    ),
    "lanes at different operations": (
        *(SHIFTING, (96,), "y[self] = above;"),
        "y[self] = self % 2 ? simd_sum(above) : simd_max(above);",
        "different simd operations",
    ),
    "wrong lane": (SHIFTING, (96,), ") % 32)", "))", "taken from lane 32"),
    "tail out of bounds": (TURNING, (96,), "x[self]", "x[self + 1]", r"x\[96\] is read"),
    "tail of a row": (TURNING, (96,), "95 - self", "96 - self", r"kept\[96\] is used"),
    "written out of bounds": (TURNING, (96,), "y[self]", "y[self + 1]", r"y\[96\] is written"),
    "unguarded tail group": (
        TAIL,
        (96, 96, 64),
        "self < x_shape[0]",
        "true",
        r"\] is (read|written), which has 96",
    ),
    "never written": (TAIL, (96, 96, 64), "self < x_shape", "self + 1 < x_shape", "never written"),
    "two writers": (SHIFTING, (96,), "y[self] =", "y[self / 2] =", "race"),
    "two groups' writers": (TAIL, (96, 96, 32), "y[self]", "y[self % 32]", "another threadgroup"),
    "read of nothing": (
        TURNING,
        (96,),
        "kept[self] =",
        "if (self) kept[self] =",
        "before anything",
    ),
    "an output that is read first": (
        *(SHIFTING, (96,), "y[self] = above;", "y[self] = float(y[self]) + above;"),
        "before anything",
    ),
    "too much memory": (TURNING, (96,), "kept, 96", "kept, 8193", "does not fit"),
    "no such name": (SHIFTING, (96,), "above;", "abov;", "does not compile"),
}


def planted(name: str) -> str:
    body, _, before, after, _ = FAULTS[name]
    assert before in body
    return body.replace(before, after, 1)


@cache
def compile_all() -> None:
    noting = Noting()
    bodies = [(body, shape) for body, shape, _ in RIGHT.values()]
    bodies += [(planted(name), FAULTS[name][1]) for name in FAULTS if name != "no such name"]
    for body, shape in bodies:
        run(body, *shape, launcher=noting)
    compile_together(noting.launches)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", sorted(FAULTS))
def test_planted_faults_are_found(name: str) -> None:
    _, shape, _, _, said = FAULTS[name]
    changed = planted(name)
    with pytest.raises(KernelFault, match=said):
        run_in_orders(changed, *shape)


def test_what_nobody_sets_shows() -> None:
    changed = SHIFTING.replace("float above = ", "float above; if (self > 200) above = ")
    assert not np.isin(np.array(run(changed, 96)), VALUES).any()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_rounds_as_mlx_does(dtype: mx.Dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    edges = np.array([0, 65504, 65519.9, 65520, 6e-8, 2.9e-8, 6.1e-5, np.inf, -np.inf, 1e-45])
    values = np.concatenate([bits.view(np.float32), edges.astype(np.float32)])
    values = mx.array(values[~np.isnan(values)])
    size = values.size
    program = Program(
        "halves",
        ("x",),
        ("y", "z"),
        """
  uint self = thread_position_in_grid.x;
  if (self < x_shape[0]) {
    T rounded = T(float(x[self]));
    y[self] = rounded;
    z[self] = float(rounded);
  }
""",
    )
    with launching(Harness(0)):
        halves, floats = program(
            [values],
            template=[("T", dtype)],
            grid=(size, 1, 1),
            threadgroup=(1024, 1, 1),
            output_shapes=[(size,), (size,)],
            output_dtypes=[dtype, mx.float32],
        )
    assert mx.array_equal(halves, values.astype(dtype)).item()
    assert mx.array_equal(floats, values.astype(dtype).astype(mx.float32)).item()
