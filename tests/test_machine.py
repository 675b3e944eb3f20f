"""What a result says of the machine and the versions that it was made with."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from mlx_distill import machine


def test_a_checkout_that_is_not_installed_has_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of training are not lost at the very end for that."""

    def found(name: str) -> str:
        if name == "mlx-distill":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("mlx_distill.machine.version", found)
    versions = machine.versions()
    assert versions["mlx-distill"] == "not installed"
    assert versions["mlx"] == version("mlx")
