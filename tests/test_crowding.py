"""How crowded a machine is, by threads that work on a simulated one."""

import pytest

from mlx_distill.calibration import crowding as module
from mlx_distill.calibration.crowding import crowding


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_work_takes_longer_by_what_others_take(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that gets a share of its core takes that much longer."""
    monkeypatch.setattr(module.os, "cpu_count", lambda: 1)
    now = [0.0]

    def hashed(data: bytes) -> object:
        now[0] += 0.001
        return type("Hash", (), {"digest": lambda self: b""})()

    monkeypatch.setattr(module.hashlib, "sha256", hashed)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module.time, "thread_time", lambda: share * now[0])
    assert crowding() == pytest.approx(1 / share - 1)


def test_a_passing_program_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = iter([9.0, 5.0, 0.1, 0.0, 7.0, 8.0, 8.0, 0.2])
    monkeypatch.setattr(module, "_look", lambda: next(looks))
    assert crowding(8) == 0.2


def test_a_clock_too_coarse_for_a_look_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "thread_time", lambda: 0.0)
    assert module._look() == 0.0
