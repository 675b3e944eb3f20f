"""Kernels are counted as what they send, and compute what their twins compute."""

import mlx.core as mx

from mlx_distill.benchmarking.dispatches import in_graph
from mlx_distill.benchmarking.kernel_regions import standing_in
from mlx_distill.core.sampling import Sampling
from mlx_distill.kernels.beam_step import beam_step
from mlx_distill.kernels.choice import forced, performing
from mlx_distill.kernels.sampler import draw

LOGITS = mx.random.normal((3, 50), key=mx.random.key(0))
mx.eval(LOGITS)


def test_a_kernel_counts_as_its_dispatches() -> None:
    """A step of a beam search is two, a draw is one; what is before and behind counts as ever."""
    above = mx.zeros((3,))
    mx.eval(above)
    plain = beam_step(LOGITS * 2, above, 4)
    with forced(), performing(standing_in):
        marked = beam_step(LOGITS * 2, above, 4)
        drawn = draw(LOGITS, Sampling())
        both = draw(LOGITS + marked.scores.sum(), Sampling())
    assert in_graph([marked.places + 1, marked.scores]).total() == 1 + 2 + 1
    assert in_graph([drawn.tokens]).total() == 1
    assert in_graph([both.tokens]).total() == 1 + 2 + 2 + 1
    assert mx.array_equal(mx.sort(plain.places), mx.sort(marked.places)).item()


def test_within_a_compiled_function_kernels_count_one_by_one() -> None:
    def twice(logits: mx.array) -> mx.array:
        return draw(logits, Sampling()).tokens + draw(2 * logits, Sampling()).tokens

    with forced(), performing(standing_in):
        found = mx.compile(twice)(LOGITS)
    assert in_graph([found]).total() == 1 + 1 + 2
    assert mx.array_equal(found, 2 * mx.argmax(LOGITS, axis=-1)).item()
