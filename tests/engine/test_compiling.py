from typing import Any

import numba
import pytest

from scarcade.engine import compiling


def test_compiling_is_told_once_if_it_takes_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_AFTER", 0.0)
    told: list[str] = []
    with compiling.told_of_compiling(told.append):

        @numba.njit
        def one(x: Any) -> Any:
            return x + 1

        assert one(1.0) == 2
        assert len(told) == 1
        assert "compiling for this processor" in told[0]
        assert one(1) == 2  # of another type: compiled anew
        assert len(told) == 1

    @numba.njit
    def two(x: Any) -> Any:
        return x + 2

    assert two(1.0) == 3
    assert len(told) == 1


def test_what_is_short_or_needs_no_compiling_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @numba.njit
    def one(x: Any) -> Any:
        return x * 2

    with compiling.told_of_compiling(told.append):
        assert one(2.0) == 4
    monkeypatch.setattr(compiling, "_AFTER", 0.0)
    with compiling.told_of_compiling(told.append):
        assert one(3.0) == 6
    assert told == []
