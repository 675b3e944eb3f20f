"""A commit writes the accepted rows and nothing else."""

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.target.target import Target


def test_a_commit_does_not_copy_the_cache() -> None:
    model = tiny_model("llama")
    target = Target.of(model)
    caches = make_prompt_cache(model)
    for cache in caches:
        keys = mx.random.normal((1, 2, 100_000, 16))
        cache.update_and_fetch(keys, keys)
    mx.eval([cache.state for cache in caches])
    tree = PrefixTree.from_beams([[1, 2, 3], [1, 4, 5], [1, 6, 7]])
    mx.eval(tree.tokens, tree.parents, tree.mask, tree.depths)

    def extra_bytes(path: list[int]) -> int:
        """Return how much more than the cache two cycles hold, the first with this path."""
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        call = target.verify(tree, caches)
        mx.eval(call.logits)
        call.commit(path)
        call = target.verify(tree, caches)
        mx.eval(call.logits)
        call.rewind(0)
        return mx.get_peak_memory() - before

    extra_bytes([0, 1, 2])  # the first one grows the cache
    assert extra_bytes([0, 3, 4]) < extra_bytes([0, 1, 2]) + caches[0].keys.nbytes // 2
