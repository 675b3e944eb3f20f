"""The private names of mlx-lm that the package leans on do what it expects of them.

They are there, and this file, ``test_half_models`` and ``test_generation_api`` pass, with mlx-lm
0.32.0 on mlx 0.32.0 and with mlx-lm 0.32.2 on mlx 0.32.4: the ends of what was tried within the
bounds of ``pyproject.toml``.
"""

from importlib.metadata import requires, version

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.tuner import losses
from packaging.requirements import Requirement

import mlx_distill  # noqa: F401  (the BLAS comes first)
from mlx_distill import compat


def test_the_installed_releases_are_within_the_tested_bounds() -> None:
    for name in ("mlx-lm", "mlx"):
        needed = [Requirement(line) for line in requires("mlx-distill") or []]
        bounds = [one.specifier for one in needed if one.name == name]
        assert all(any(part.operator == "<" for part in one) for one in bounds), name
        assert all(version(name) in one for one in bounds), name


def test_the_classes_of_a_configuration() -> None:
    model, arguments = compat.model_classes({"model_type": "llama"})
    assert (model.__name__, arguments.__name__) == ("Model", "ModelArgs")
    assert model.__module__ == "mlx_lm.models.llama"


def test_the_index_of_a_ring_is_where_the_next_token_goes() -> None:
    cache = RotatingKVCache(max_size=4)
    for token in range(6):  # the fifth begins the second round
        cache.update_and_fetch(mx.full((1, 1, 1, 2), token), mx.zeros((1, 1, 1, 2)))
    assert compat.ring_index(cache) == 2
    assert cache.keys[0, 0, :, 0].tolist() == [4, 5, 2, 3]


def test_a_ring_is_given_its_content_in_the_order_of_the_text() -> None:
    """What is set by ``set_ring`` is what mlx-lm's cache goes on with; its names are all there."""
    rows = mx.arange(6.0)[None, None, :, None] + mx.zeros((1, 1, 6, 2))
    cache, other = RotatingKVCache(max_size=4), RotatingKVCache(max_size=4)
    assert set(compat.RING_NAMES) <= set(vars(cache))
    for row in range(6):
        other.update_and_fetch(rows[..., row : row + 1, :], -rows[..., row : row + 1, :])
    compat.set_ring(cache, rows[..., 2:, :], -rows[..., 2:, :])
    cache.offset = 6
    assert compat.ring_index(cache) == 4  # full: the next token takes the oldest one's place
    new = mx.full((1, 1, 1, 2), 6.0)
    for one in (cache, other):
        keys, values = one.update_and_fetch(new, -new)
        assert sorted(keys[0, 0, :, 0].tolist()) == [3, 4, 5, 6]
        assert mx.array_equal(values, -keys).item()
    compat.set_ring(cache, None, None)
    assert cache.keys is cache.values is None
    assert compat.ring_index(cache) == 0


def test_kernels_of_divergences_are_known_by_their_names() -> None:
    assert compat.divergence_kernels() is None  # without Metal
    assert losses._kl_forward_kernel is losses._js_forward_kernel is None
