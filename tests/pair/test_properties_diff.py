"""Twins and comparison: what means the same is never called changed, however the object is laid out."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import compiled

from kmend.diff.compare import ObjectDiff, compare
from kmend.diff.select import Selection, select
from kmend.diff.unit import UnitObject
from kmend.elf.writer import taken_apart, write

UNIT = """
struct row { int key; const char *text; const struct row *next; };
static int limit = 4;
static int first[3] __attribute__((section(".data..read_mostly"))) = { 1, 2, 3 };
static int second __attribute__((section(".data..read_mostly")));
static const struct row rows[] = { { 1, "one", &rows[1] }, { 2, "two", &rows[0] } };
static noinline int inner(int x) { static int count; count += x; return outside(count); }
static noinline const char *named(int x)
{
    switch (x) {
    case 0: return "zero"; case 1: return "one"; case 2: return "two"; case 3: return "three";
    case 4: return "four";
    }
    return __func__;
}
int outer(int x)
{
    static int count;
    static const char *const names[] = { "a", "b" };
    static const char *const *const list[] = { names, names + 1 };
    if (x > limit + first[x & 1]) {
        printk("large %d", x);
        BUG_AT(__LINE__);
    }
    return inner(x) + ++count + **list[x & 1] + second + *named(x);
}
int other(int x)
{
    static const char *const names[] = { "c", "d" };
    static const char *const *const list[] = { names, names + 1 };
    static int count;
    return **list[x & 1] + ++count + rows[x & 1].next->key;
}
static int __init begin(int x) { return outside(x); }
int (*start)(int) = begin;
"""


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> UnitObject:
    return compiled(tmp_path_factory.mktemp("same"), "same", UNIT)


def shuffled(unit: UnitObject, seed: int) -> UnitObject:
    """The same object with its sections and symbols in another order."""
    sections, symbols = taken_apart(unit.elf)
    rng = Random(seed)
    rng.shuffle(sections)
    rng.shuffle(symbols)
    return UnitObject.parse(write(sections, symbols, flags=unit.elf.flags), unit.name)


def assert_same(diff: ObjectDiff, selection: Selection) -> None:
    assert diff.nothing
    assert (diff.changed, diff.changed_data, diff.changed_sections) == ({}, {}, ())
    assert (diff.new_functions, diff.removed, diff.new_data) == ((), (), ())
    assert set(diff.twins.original) == set(diff.new.parts)
    assert sorted(diff.twins.original.values()) == sorted(diff.old.parts)
    assert (selection.included, selection.refusals) == ((), ())


def test_an_object_equals_itself(unit: UnitObject) -> None:
    assert len(unit.parts) > 15, "the object has what the test is about"
    diff = compare(unit, unit)
    assert_same(diff, select(diff))
    assert all(new == old for new, old in diff.twins.original.items())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_order_means_nothing(unit: UnitObject, seed: int) -> None:
    other = shuffled(unit, seed)
    diff = compare(unit, other)
    assert_same(diff, select(diff))
    assert all(new == old for new, old in diff.twins.original.items())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_order_hides_no_change(unit: UnitObject, changed: UnitObject, seed: int, other: int) -> None:
    diff = compare(shuffled(unit, seed), shuffled(changed, other))
    assert set(diff.changed) == {"inner"}
    assert (diff.new_functions, diff.removed, diff.new_data, diff.changed_data) == ((), (), (), {})


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> UnitObject:
    return compiled(tmp_path_factory.mktemp("changed"), "changed", UNIT.replace("count += x;", "count -= x;"))


def test_a_function_that_is_only_called_as_if_it_were_counted_is_found(tmp_path: Path) -> None:
    # btrfs has a __setup_root(), the kernel's __setup() makes variables of such names
    text = """
        noinline static int __setup_root(int x) {{ return outside(x {op} 1); }}
        int f(int x) {{ return __setup_root(x); }}
    """
    old = compiled(tmp_path, "old", text.format(op="+"))
    new = compiled(tmp_path, "new", text.format(op="-"))
    diff = compare(old, new)
    assert set(diff.changed) == {"__setup_root"}
    assert diff.new_functions == ()


NOPS = """
noinline int __UNIQUE_ID_nop{a}(int x) {{ return outside(x + 1); }}
noinline int __UNIQUE_ID_nop{b}(int x) {{ return outside(x + 2); }}
int (*table[])(int) = {{ __UNIQUE_ID_nop{a}, __UNIQUE_ID_nop{b} }};
"""


def test_functions_with_a_counter_in_their_names_are_told_by_their_code(tmp_path: Path) -> None:
    old = compiled(tmp_path, "old", NOPS.format(a=377, b=378))
    new = compiled(tmp_path, "new", NOPS.format(a=378, b=379))
    diff = compare(old, new)
    assert diff.twins.original["__UNIQUE_ID_nop378"] == "__UNIQUE_ID_nop377"
    assert diff.twins.original["__UNIQUE_ID_nop379"] == "__UNIQUE_ID_nop378"
    assert diff.nothing


def test_variables_that_nothing_uses_are_told_by_their_numbers(tmp_path: Path) -> None:
    text = """
        void f(void) {{ static int kept __attribute__((used)) = {a}; outside(1); }}
        void g(void) {{ static int kept __attribute__((used)) = {b}; outside(2); }}
    """
    old = compiled(tmp_path, "old", text.format(a=1, b=2))
    again = compiled(tmp_path, "again", text.format(a=1, b=2))
    other = compiled(tmp_path, "other", text.format(a=1, b=3))
    assert_same(diff := compare(old, again), select(diff))
    assert len(compare(old, other).changed_data) == 1
