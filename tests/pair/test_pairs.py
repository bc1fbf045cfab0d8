"""Object pairs: for each kind of change what the differ must say."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import Pair, compiled

from kmend.core.errors import UsageError
from kmend.diff.compare import compare
from kmend.diff.select import Linker, LinkKind, Selection
from kmend.diff.twins import Level
from kmend.diff.unit import UnitObject


def changed(selection: Selection) -> set[str]:
    return {row.original for row in selection.changed}


def rules(selection: Selection) -> set[str]:
    return {row.rule for row in selection.refusals}


BASE = """
static int counter;
noinline int helper(int x) { return outside(x) + 1; }
int first(int x) { counter += x; return helper(x) * 3; }
int second(int x) { printk("second %d\\n", x); return helper(x) + counter; }
"""


def test_equal_sources_are_equal(pair: Pair) -> None:
    diff, selection = pair(BASE, BASE)
    assert diff.nothing
    assert not selection.included


def test_only_the_edited_function_changes(pair: Pair) -> None:
    diff, selection = pair(BASE, BASE.replace("* 3", "* 5"))
    assert changed(selection) == {"first"}
    assert selection.included == ("first",)
    assert set(selection.outer) == {"counter", "helper"}
    assert not selection.refusals
    assert not diff.new_functions


def test_moved_lines_change_nothing(pair: Pair) -> None:
    diff, _ = pair(BASE, "\n\n/* a comment */\n" + BASE)
    assert diff.nothing


def test_a_new_function_comes_along(pair: Pair) -> None:
    new = BASE.replace(
        "int first(int x) {",
        "noinline static int fresh(int x) { return outside(x * 7); }\nint first(int x) { x = fresh(x);",
    )
    diff, selection = pair(BASE, new)
    assert changed(selection) == {"first"}
    assert selection.new_functions == ("fresh",)
    assert diff.new_functions == ("fresh",)


def test_a_changed_string_changes_its_user_alone(pair: Pair) -> None:
    _, selection = pair(BASE, BASE.replace("second %d", "Second %d"))
    assert changed(selection) == {"second"}


def test_a_call_of_a_changed_function_goes_to_the_new_one_and_a_pointer_to_the_old(pair: Pair) -> None:
    old = """
    extern void keep(int (*callback)(int));
    noinline static int target(int x) { return outside(x); }
    int user(int x) { keep(target); return target(x); }
    """
    diff, selection = pair(
        old,
        old.replace("return outside(x)", "return outside(x) + 1").replace("target(x); }", "target(x) + 2; }"),
    )
    assert changed(selection) == {"target", "user"}
    linker, new = Linker(diff), diff.new
    part = new.parts["user"]
    section = new.section_of(part)
    kinds = {}
    for reloc in new.relocs(part):
        ref = new.ref(section, reloc)
        if ref.name == "target":
            kinds[reloc.type] = linker.of_code(part, section, reloc).kind
    assert sorted(kinds.values(), key=lambda k: k.value) == [LinkKind.LOCAL, LinkKind.OUTER]


def test_an_inlined_helper_changes_its_callers(pair: Pair) -> None:
    old = """
    static inline int tiny(int x) { return x + 1; }
    int a(int x) { return outside(tiny(x)); }
    int b(int x) { return outside(tiny(x) * 2); }
    int c(int x) { return outside(x); }
    """
    _, selection = pair(old, old.replace("x + 1", "x + 9"))
    assert changed(selection) == {"a", "b"}


STATICS = """
int once_a(int x) { static int seen; if (seen++) return x; return outside(x); }
int once_b(int x) { static int seen; if (seen++) return x; return outside(x + 1); }
"""


def test_static_locals_keep_their_state_when_numbers_shift(pair: Pair) -> None:
    new = "int zero(int x) { static int seen; seen += x; return outside(seen); }\n" + STATICS.replace(
        "outside(x + 1)", "outside(x + 2)"
    )
    diff, selection = pair(STATICS, new)
    assert changed(selection) == {"once_b"}
    twins = diff.twins.original
    by_function = {}
    for name in ("once_a", "once_b"):
        for unit, label in ((diff.old, "old"), (diff.new, "new")):
            part = unit.parts[name]
            refs = {unit.ref(unit.section_of(part), r).name for r in unit.relocs(part)}
            by_function[name, label] = next(n for n in refs if n.startswith("seen."))
    assert twins[by_function["once_a", "new"]] == by_function["once_a", "old"]
    assert twins[by_function["once_b", "new"]] == by_function["once_b", "old"]
    assert diff.twins.level[by_function["once_a", "new"]] is Level.USE
    assert selection.outer == (by_function["once_b", "old"],)


def test_a_new_static_local_is_carried(pair: Pair) -> None:
    old = "int f(int x) { return outside(x); }"
    new = "int f(int x) { static int calls; return outside(x + ++calls); }"
    diff, selection = pair(old, new)
    assert changed(selection) == {"f"}
    assert not selection.refusals
    (variable,) = [k for k in selection.included if k != "f"]
    assert variable.startswith("calls.")
    assert diff.new_data == (variable,)


def test_one_of_two_static_locals_of_one_name_removed_is_refused(pair: Pair) -> None:
    old = """
    int f(int x) { { static int n; x += outside(++n); } { static int n; x += outside(n += 2); } return x; }
    """
    new = "int f(int x) { { static int n; x += outside(n += 3); } return x; }"
    _, selection = pair(old, new)
    assert "static-local-ambiguous" in rules(selection)


def test_changed_data_is_refused_by_name(pair: Pair) -> None:
    old = "int table[] = { 1, 2, 3 };\nint f(int x) { return table[x]; }"
    _, selection = pair(old, old.replace("3 }", "4 }"))
    assert rules(selection) == {"changed-data"}
    assert selection.refusals[0].what == "table"


def test_changed_constant_data_is_refused(pair: Pair) -> None:
    old = "static const int table[] = { 1, 2, 3 };\nint f(int x) { return table[x]; }"
    _, selection = pair(old, old.replace("3 }", "4 }"))
    assert rules(selection) == {"changed-data"}


def test_init_code_is_refused(pair: Pair) -> None:
    old = "int __init start(void) { return outside(1); }\nint f(int x) { return outside(x); }"
    _, selection = pair(old, old.replace("outside(1)", "outside(2)"))
    assert rules(selection) == {"init-code"}


def test_a_function_without_ftrace_entry_is_refused(pair: Pair) -> None:
    old = "notrace int f(int x) { return outside(x); }"
    _, selection = pair(old, old.replace("outside(x)", "outside(x + 1)"))
    assert rules(selection) == {"no-ftrace-entry"}


def test_functions_that_share_a_section_are_refused(pair: Pair) -> None:
    old = """
    #define own __attribute__((section(".sched.text")))
    own noinline int f(int x) { return outside(x); }
    own noinline int g(int x) { return outside(x + 3); }
    """
    _, selection = pair(old, old.replace("x + 3", "x + 4"))
    assert rules(selection) == {"shared-section"}


def test_a_bug_entry_that_moves_changes_the_function(pair: Pair) -> None:
    old = "int f(int x) { if (x) BUG_AT(10); return x + 1; }\nint g(int x) { if (x) BUG_AT(20); return x; }"
    _, selection = pair(old, old.replace("BUG_AT(20)", "BUG_AT(21)"))
    assert changed(selection) == {"g"}
    assert "__bug_table" in selection.changed[0].difference


def test_a_new_variable_in_a_special_section_is_refused(pair: Pair) -> None:
    old = "int f(int x) { return outside(x); }"
    new = (
        'static int (*call)(int) __attribute__((used, section(".initcall6.init"))) = outside;\n'
        + old.replace("outside(x)", "outside(x + 1)")
    )
    _, selection = pair(old, new)
    assert "init-data" in rules(selection)


def test_a_reference_to_init_memory_is_refused(pair: Pair) -> None:
    old = """
    int setting __attribute__((section(".init.data"))) = 5;
    int f(int x) { return outside(x); }
    """
    _, selection = pair(old, old.replace("outside(x)", "outside(x + setting)"))
    assert "init-reference" in rules(selection)


def test_a_cold_part_follows_its_function(pair: Pair) -> None:
    old = """
    extern int complain(const char *, int) __attribute__((cold));
    int f(int x) {
        if (outside(x)) { complain("bad %d", x); return outside(x * 17); }
        return outside(x + 1) * 3;
    }
    """
    diff, selection = pair(old, old.replace("bad %d", "worse %d"))
    assert "f.cold" in diff.new.parts, "the compiler is expected to split the cold part off"
    assert changed(selection) == {"f"}
    assert set(selection.included) == {"f", "f.cold"}


def test_a_renumbered_clone_is_still_the_same(pair: Pair) -> None:
    old = """
    static noinline int clone(int x, int unused) { return outside(x); }
    int f(int x) { return clone(x, 1) + 1; }
    """
    diff, selection = pair(old, old.replace("+ 1; }", "+ 2; }"))
    assert changed(selection) == {"f"}
    assert any(k.startswith("clone") for k in selection.outer), diff.new.parts


def test_pointer_to_new_function_is_warned_of(pair: Pair) -> None:
    old = "extern void keep(int (*callback)(int));\nint f(int x) { return outside(x); }"
    new = """extern void keep(int (*callback)(int));
    static noinline int fresh(int x) { return outside(x * 3); }
    int f(int x) { keep(fresh); return outside(x); }"""
    _, selection = pair(old, new)
    assert {w.rule for w in selection.warnings} == {"pointer-to-new-function"}
    assert not selection.refusals


def test_pc_relative_operands_with_immediates_are_resolved(tmp_path: Path) -> None:
    """``cmpl $imm, x(%rip)``: the addend counts from the end of the instruction, behind the immediate."""
    text = """
    __attribute__((section(".data.both"))) int a = 1; __attribute__((section(".data.both"))) int b = 2;
    int f(void) { int r; asm volatile("cmpl $0x12345678, b(%%rip)\\n\\tsete %b0" : "=q" (r)); return r; }
    """
    unit = compiled(tmp_path, "pcrel", "static " + text.strip().replace("; __attr", "; static __attr", 1))
    part = unit.parts["f"]
    section = unit.section_of(part)
    names = {unit.ref(section, r).name for r in unit.relocs(part)} - {"__fentry__"}
    assert names == {"b"}


RING = """
asm(".pushsection .data.ring,\\"aw\\"\\n.quad .data.ring + 8\\n.quad .data.ring, {value}\\n.popsection");
int f(void) {{ int r; asm volatile("movl .data.ring(%%rip), %0" : "=r" (r)); return r + outside(r); }}
"""


@pytest.mark.parametrize(("value", "same"), [(7, True), (8, False)])
def test_nameless_data_that_refers_to_itself(pair: Pair, value: int, *, same: bool) -> None:
    """A list head without a symbol: the comparison comes to an end, and still sees what lies beside it."""
    diff, _ = pair(RING.format(value=7), RING.format(value=value))
    assert diff.nothing is same


def test_two_unlike_objects_are_compared_without_complaint(tmp_path: Path) -> None:
    diff = compare(compiled(tmp_path, "one", BASE), compiled(tmp_path, "two", STATICS))
    assert set(diff.removed) == {"helper", "first", "second"}
    assert set(diff.new_functions) == {"once_a", "once_b"}


@pytest.mark.parametrize("cut", [0, 3, 63, 64, 200, 500, -1, -65])
def test_truncated_objects_are_refused(tmp_path: Path, cut: int) -> None:
    compiled(tmp_path, "whole", BASE)
    data = (tmp_path / "whole.o").read_bytes()
    with pytest.raises(UsageError) as caught:
        UnitObject.parse(data[:cut], "cut.o")
    assert caught.value.rule == "bad-elf"


def test_descriptors_of_dynamic_debug_are_never_ambiguous(pair: Pair) -> None:
    """The module brings its own, whichever of the kernel's they stand for."""
    head = "extern void look(int *);\n"
    debug = '{ static int ddebug __attribute__((section("__dyndbg"))) = 1; look(&ddebug); }'
    old = f"{head}int f(int x) {{ {debug} {debug} return x; }}"
    new = f"{head}int f(int x) {{ {debug} {debug} {debug} return outside(x); }}"
    diff, selection = pair(old, new)
    assert changed(selection) == {"f"}
    assert diff.twins.ambiguous
    assert not selection.refusals
    assert len([key for key in selection.included if key.startswith("ddebug")]) == 3
