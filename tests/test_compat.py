"""The private names of mlx-lm that the package leans on do what it expects of them.

They are there, and this file, ``test_half_models`` and ``test_generation_api`` pass, with mlx-lm
0.32.0 on mlx 0.32.0 and with mlx-lm 0.32.2 on mlx 0.32.4: the ends of what was tried within the
bounds of ``pyproject.toml``.
"""

from importlib.metadata import requires, version

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache
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
