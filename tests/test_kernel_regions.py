"""Kernels are counted as what they send, and compute what their twins compute."""

import mlx.core as mx

from mlx_distill.arrays import in_memory
from mlx_distill.benchmarking.dispatches import in_graph
from mlx_distill.benchmarking.kernel_regions import standing_in
from mlx_distill.core.sampling import Sampling
from mlx_distill.kernels.beam_step import beam_step
from mlx_distill.kernels.choice import forced, performing
from mlx_distill.kernels.sampler import draw
from mlx_distill.kernels.tree_attention import tree_attention

LOGITS = mx.random.normal((3, 50), key=mx.random.key(0))
mx.eval(LOGITS)


def test_a_kernel_counts_as_its_dispatches() -> None:
    """A step of a beam search is two, a draw is one; what is before and behind counts as ever."""
    others = mx.zeros((3, 1), mx.uint32), mx.arange(50)[None], 4, 16
    mx.eval(others)
    plain = beam_step(LOGITS * 2, *others)
    with forced(), performing(standing_in):
        marked = beam_step(LOGITS * 2, *others)
        drawn = draw(LOGITS, Sampling())
        both = draw(LOGITS + marked.view(mx.float32).sum(), Sampling())
    assert in_graph([marked + 1, marked]).total() == 1 + 2 + 1
    assert in_graph([drawn.tokens]).total() == 1
    assert in_graph([both.tokens]).total() == 1 + 2 + 2 + 1
    assert mx.array_equal(plain, marked).item()


def test_within_a_compiled_function_kernels_count_one_by_one() -> None:
    def twice(logits: mx.array) -> mx.array:
        return draw(logits, Sampling()).tokens + draw(2 * logits, Sampling()).tokens

    with forced(), performing(standing_in):
        found = mx.compile(twice)(LOGITS)
    assert in_graph([found]).total() == 1 + 1 + 2
    assert mx.array_equal(found, 2 * mx.argmax(LOGITS, axis=-1)).item()


def test_a_result_lies_as_the_kernels_does() -> None:
    """Attention's lies token by token, whatever its twin's does; a copy less is sent for it."""
    q, k, v = mx.random.normal((3, 1, 4, 3, 32), key=mx.random.key(1))
    inside = mx.tri(3) > 0
    with forced(), performing(standing_in):
        found = tree_attention(q, k, v, inside, inside, 0.2)
    assert in_memory(found.transpose(0, 2, 1, 3)).flags.c_contiguous
    assert mx.allclose(found, tree_attention.twin(q, k, v, inside, inside, 0.2)).item()
