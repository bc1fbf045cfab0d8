"""The taint table; the oracle is what a patched 6.1 kernel reported."""

from __future__ import annotations

from kmend.core.taint import TAINT_FLAGS, decode


def test_a_patched_kernel() -> None:
    flags = decode(45056)
    assert [(flag.bit, flag.letter) for flag in flags] == [(12, "O"), (13, "E"), (15, "K")]
    assert "live patched" in flags[-1].meaning


def test_the_table_is_in_order_without_gaps() -> None:
    assert [flag.bit for flag in TAINT_FLAGS] == list(range(len(TAINT_FLAGS)))
    assert len({flag.letter for flag in TAINT_FLAGS}) == len(TAINT_FLAGS)


def test_bits_of_the_future_are_named_as_such() -> None:
    (flag,) = decode(1 << 40)
    assert (flag.bit, flag.letter) == (40, "?")
    assert decode(0) == ()
