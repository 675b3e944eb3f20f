"""How much of a student's word a teacher accepts, over the vocabulary in one reading, both ways.

    accepted(p, q) = sum of min(p, q)              total variation = 1 - accepted
    LK(p, q) = w KL(p || q) + (1 - w) (1 - accepted),              w = exp(-3 accepted)

The forward pass keeps four numbers of each row, the backward pass makes the gradient of them and
of the logits; probabilities are never written to memory. ``losses.acceptance`` says why these.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.arrays import WIDE, log_probs, row_sum, softmax
from mlx_distill.kernels.choice import Case, Operation
from mlx_distill.kernels.comparing import differs
from mlx_distill.kernels.program import MOST_THREADS, SIMD_WIDTH, Program
from mlx_distill.losses.response import forward_kl

# How fast acceptance takes over from the divergence; the paper's. The kernel has it, too.
ETA = 3.0

BELOW = """
// Equal rows are equal whatever the order of their sums.
FUNCTION bool is_below(float q, float p) {
  return q < p * 0.999996f;
}
"""

TOTAL = """
// The logarithm of the sum of a row's exponentials.
template <typename Row>
FUNCTION float total_of(
    Row row, uint count, uint self, uint threads, SHARED_ARG(float) table, uint lane,
    uint simdgroup) {
  float greatest = -infinity();
  for (uint i = self; i < count; i += threads) {
    greatest = max(greatest, float(row[i]));
  }
  greatest = group_max(greatest, table, lane, simdgroup, threads / 32);
  float base = greatest > -infinity() ? greatest : 0.0f;
  float sum = 0.0f;
  for (uint i = self; i < count; i += threads) {
    sum += exp(float(row[i]) - base);
  }
  return base + log(group_sum(sum, table, lane, simdgroup, threads / 32));
}
"""

FORWARD = Program(
    name="acceptance",
    inputs=("student", "teacher"),
    outputs=("values", "kept"),
    functions=BELOW + TOTAL,
    body="""
  SHARED(float, table, 32);
  uint row = threadgroup_position_in_grid.y, count = student_shape[1];
  uint self = thread_index_in_threadgroup, threads = threads_per_threadgroup.x;
  uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  auto own = student + long(row) * count;
  auto other = teacher + long(row) * count;
  float own_total = total_of(own, count, self, threads, table, lane, simdgroup);
  float other_total = total_of(other, count, self, threads, table, lane, simdgroup);
  float accepted = 0.0f, divergence = 0.0f, below = 0.0f;
  for (uint i = self; i < count; i += threads) {
    float log_q = float(own[i]) - own_total, log_p = float(other[i]) - other_total;
    float q = exp(log_q), p = exp(log_p);
    accepted += min(p, q);
    below += is_below(q, p) ? q : 0.0f;
    divergence += MIXED && p > 0.0f ? p * (log_p - log_q) : 0.0f;
  }
  accepted = group_sum(accepted, table, lane, simdgroup, threads / 32);
  below = group_sum(below, table, lane, simdgroup, threads / 32);
  if (MIXED) {
    divergence = group_sum(divergence, table, lane, simdgroup, threads / 32);
  }
  if (self == 0) {
    float weight = MIXED ? exp(-3.0f * accepted) : 0.0f;
    float rejected = (1.0f - weight) * (1.0f - accepted);
    float value = MIXED ? weight * divergence + rejected : rejected;
    // What is no number would be left out of a minimum.
    values[row] = isnan(own_total + other_total) ? own_total + other_total : value;
    kept[row * 4] = own_total;
    kept[row * 4 + 1] = other_total;
    kept[row * 4 + 2] = below;
    kept[row * 4 + 3] = weight;
  }
""",
)

BACKWARD = Program(
    name="acceptance_gradient",
    inputs=("student", "teacher", "kept", "cotangents"),
    outputs=("gradient",),
    functions=BELOW,
    body="""
  uint i = thread_position_in_grid.x, row = thread_position_in_grid.y, count = student_shape[1];
  if (i < count) {
    long place = long(row) * count + i;
    float q = exp(float(student[place]) - kept[row * 4]);
    float p = exp(float(teacher[place]) - kept[row * 4 + 1]);
    // Where q is below p, more of it is accepted; the softmax takes that from all tokens.
    float rejected = q * (kept[row * 4 + 2] - (is_below(q, p) ? 1.0f : 0.0f));
    float weight = kept[row * 4 + 3];
    float mixture = weight * (q - p) + (1.0f - weight) * rejected;
    gradient[place] = T(mixture * cotangents[row]);
  }
""",
)


def _threads(count: int) -> int:
    return min(MOST_THREADS, -(-count // SIMD_WIDTH) * SIMD_WIDTH)


def _forward(student: mx.array, teacher: mx.array, mixture: bool) -> tuple[mx.array, mx.array]:
    rows, count = student.shape
    threads = _threads(count)
    values, kept = FORWARD(
        [student, teacher],
        template=[("MIXED", mixture)],
        grid=(threads, rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows,), (rows, 4)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return values, kept


def _backward(
    student: mx.array, teacher: mx.array, kept: mx.array, cotangents: mx.array
) -> mx.array:
    rows, count = student.shape
    threads = _threads(count)
    (gradient,) = BACKWARD(
        [student, teacher, kept, cotangents.astype(mx.float32)],
        template=[("T", student.dtype)],
        grid=(-(-count // threads) * threads, rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[student.shape],
        output_dtypes=[student.dtype],
    )
    return gradient


def _fused(mixture: bool) -> Any:
    """Return the differentiable function of rows: values, and what the backward pass needs."""

    @mx.custom_function
    def fused(student: mx.array, teacher: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(student, teacher, mixture)

    @fused.vjp
    def fused_vjp(primals, cotangents, outputs):
        student, teacher = primals
        return _backward(student, teacher, outputs[1], cotangents[0]), mx.zeros_like(teacher)

    return fused


_FUSED = {mixture: _fused(mixture) for mixture in (False, True)}


def _kernel(
    mixture: bool, student: Float[mx.array, "... V"], teacher: Float[mx.array, "... V"]
) -> Float[mx.array, "..."]:
    shape = student.shape
    rows = [x.reshape(-1, shape[-1]) for x in (student, mx.stop_gradient(teacher))]
    return _FUSED[mixture](*rows)[0].reshape(shape[:-1])


# ------------------------------------------------------------------------------------------ twins


def _plain_mixture(
    student: Float[mx.array, "... V"], teacher: Float[mx.array, "... V"]
) -> Float[mx.array, "..."]:
    teacher = mx.stop_gradient(teacher).astype(mx.float32)
    values, _ = _mixed(  # pyright: ignore[reportGeneralTypeIssues]
        student.astype(mx.float32), teacher
    )
    return values


@mx.custom_function
def _mixed(student: mx.array, teacher: mx.array) -> tuple[mx.array, mx.array]:
    """Return the values and their gradients, which need nothing that the values do not."""
    p, q = softmax(teacher), softmax(student)
    below = q < p
    accepted = row_sum(mx.minimum(p, q))
    weight = mx.exp(-ETA * accepted)
    values = weight * forward_kl(student, teacher, p) + (1 - weight) * (1 - accepted)
    # Of the share that is rejected: where q is below p, more of it is accepted; the softmax takes
    # that from all tokens.
    rejected = q * (row_sum(q * below)[..., None] - below)
    weight = weight[..., None]
    return values, weight * (q - p) + (1 - weight) * rejected


@_mixed.vjp
def _mixed_vjp(primals, cotangents, outputs):
    return outputs[1] * cotangents[0][..., None], mx.zeros_like(primals[1])


def _plain_variation(
    student: Float[mx.array, "... V"], teacher: Float[mx.array, "... V"]
) -> Float[mx.array, "..."]:
    return 0.5 * row_sum(mx.abs(mx.exp(mx.stop_gradient(teacher)) - mx.exp(student)))


# ------------------------------------------------------------------------------------------ cases

SIZES = (1, 2, 31, 97, 1000, 32_000)
LARGE = (128_256, 151_936, 262_144)
# On a CPU the sums of the twin's gradient are off by more in wide rows.
WIDE_TOLERANCE = 5e-5
NEARLY = 3e-5  # of logarithms


def _cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    while True:
        size = int(random.choice(LARGE if random.random() < 0.01 else SIZES))
        rows = int(random.choice([1, 2, 3, 16, 64] if size <= 1000 else [1, 2]))
        kind = str(random.choice(["normal", "near", "equal", "one-hot", "flat", "apart", "nan"]))
        teacher = random.normal(size=(rows, size)).astype(np.float32) * 3
        student = random.normal(size=(rows, size)).astype(np.float32) * 3
        if kind == "near":
            student = teacher + 0.1 * random.normal(size=teacher.shape).astype(np.float32)
        elif kind == "equal":
            student = teacher
        elif kind == "one-hot":
            teacher[:] = -np.inf
            teacher[np.arange(rows), random.integers(0, size, rows)] = 1
        elif kind == "flat":
            student[:], teacher[:] = 2, 2
        elif kind == "apart":
            student, teacher = np.abs(student) * 5, -np.abs(teacher) * 5
        elif kind == "nan":
            student[random.integers(rows), random.integers(size)] = np.nan
        dtype = [mx.float32, mx.float16, mx.bfloat16][random.integers(3)]
        args = tuple(mx.array(x).astype(dtype) for x in (student, teacher))
        yield Case(f"{kind}, {rows} rows of {size} in {dtype}", args, {})


class Tried(NamedTuple):
    """A loss's values, and the gradient of their weighted sum."""

    values: mx.array
    gradient: mx.array


def _tried(function: Callable[..., mx.array], case: Case) -> Tried:
    """Return a loss's values and its gradient."""
    student, teacher = case.args
    cotangents = mx.arange(1, student.shape[0] + 1) / student.shape[0]
    values, gradients = mx.vjp(lambda x: function(x, teacher), [student], [cotangents])
    return Tried(values[0], gradients[0])


def _tried_normalised(function: Callable[..., mx.array], case: Case) -> Tried:
    """Return the same of log-probabilities; the gradient is the logits'."""

    def of_logits(student: mx.array, teacher: mx.array) -> mx.array:
        return function(log_probs(student), log_probs(teacher))

    return _tried(of_logits, case)


def _differ(case: Case, found: Tried, expected: Tried) -> str:
    """Return in what a loss differs.

    Where p and q are equal but for rounding, either may be below: the gradient of the row is open
    by as much as there is of q. Rows that are the same are equal, whatever the rounding.
    """
    differs_at_all = mx.any(case.args[0] != case.args[1], axis=-1, keepdims=True)
    student, teacher = (log_probs(x) for x in case.args)
    open_ = (mx.abs(student - teacher) < NEARLY) & differs_at_all
    allowed = mx.where(open_, mx.exp(student), 0).sum(axis=-1, keepdims=True)
    apart = found.gradient - expected.gradient
    same = mx.isnan(apart) | (mx.abs(apart) > allowed)
    gradient = mx.where(same, found.gradient, expected.gradient)
    wide = case.args[0].shape[-1] > WIDE and case.args[0].dtype == mx.float32
    most = {"gradient": WIDE_TOLERANCE} if wide else {}
    return differs(most)(case, Tried(found.values, gradient), expected)


mixture = Operation(
    "likely_acceptance", partial(_kernel, True), _plain_mixture, _cases, _differ, tried=_tried
)
"""Return the LK loss of logits, per row; the teacher has no gradient."""

variation = Operation(
    "total_variation",
    partial(_kernel, False),
    _plain_variation,
    _cases,
    _differ,
    tried=_tried_normalised,
)
"""Return the total variation of log-probabilities, per row; the teacher has no gradient.

The kernel's gradient is that of the logits, whose softmax they are: it sums to zero.
"""
