"""What a patch declares beside its code: read, carried, and kept out of the comparison."""

from __future__ import annotations

from pairs import Pair

from kmend.diff.declared import CallbackKind
from kmend.diff.unit import UnitObject

BASE = """
static int counter;
int first(int x) { counter += x; return outside(x) * 3; }
int second(int x) { return outside(x) + counter; }
"""
#: The macros of kmend.h and of kpatch's own header, without the kernel's headers.
CALLBACK = """
#define used __attribute__((__used__))
static int before(void *obj) { counter++; return outside(1); }
static int (* const made_%s)(void *) used __attribute__((section(".kmend.callbacks.%s"))) = before;
"""
KPATCH = """
#define used __attribute__((__used__))
static int before(void *obj) { return outside(counter); }
static struct { int (*fn)(void *); char *name; } data used
    __attribute__((section(".kpatch.callbacks.pre_patch"))) = { before, 0 };
static char *ignored used __attribute__((section(".kpatch.ignore.sections"))) = ".table";
"""


def rules(rows: tuple[object, ...]) -> list[str]:
    return [str(getattr(row, "rule", "")) for row in rows]


def test_a_callback_is_carried_and_its_pointer_is_not(pair: Pair) -> None:
    diff, selection = pair(BASE, BASE + CALLBACK % ("it", "post_unpatch"))
    assert not diff.nothing
    assert selection.callbacks == ((CallbackKind.POST_UNPATCH, "before"),)
    assert selection.included == ("before",)
    assert selection.outer == ("counter",)
    assert not selection.changed
    assert not selection.refusals
    assert not diff.new_data


def test_kpatchs_own_form_is_read_as_well(pair: Pair) -> None:
    diff, selection = pair(BASE, BASE + KPATCH)
    assert selection.callbacks == ((CallbackKind.PRE_PATCH, "before"),)
    assert diff.declared.ignored_sections == (".table",)
    assert not selection.refusals


def test_a_callback_of_another_file_is_refused(pair: Pair) -> None:
    new = (
        BASE
        + "extern int elsewhere(void *);"
        + (CALLBACK % ("it", "pre_patch")).replace("= before;", "= elsewhere;")
    )
    _, selection = pair(BASE, new)
    assert [(r.rule, r.what) for r in selection.refusals] == [("callback-elsewhere", "elsewhere")]


def test_states_are_rows_of_two_numbers(pair: Pair) -> None:
    state = """
static const struct { unsigned long long id, version; } one
    __attribute__((__used__, section(".kmend.states"))) = { 0x1234, 7 };
"""
    diff, selection = pair(BASE, BASE + state)
    assert diff.declared.states == selection.states == ((0x1234, 7),)
    assert not diff.nothing


def test_an_ignored_function_stays_as_it_is_with_a_warning(pair: Pair) -> None:
    ignore = """
static const void * const skip __attribute__((__used__, section(".kmend.ignore.functions"))) = second;
"""
    both = BASE.replace("* 3", "* 5").replace("+ counter", "- counter")
    diff, selection = pair(BASE, both + ignore)
    assert set(diff.changed) == {"first"}
    assert [(w.rule, w.what) for w in selection.warnings] == [("ignored-by-patch", "second")]
    _, without = pair(BASE, both)
    assert len(without.changed) == 2
    # a function that comes out the same needs no warning
    _, same = pair(BASE, BASE.replace("* 3", "* 5") + ignore)
    assert not same.warnings


def test_an_ignored_sections_data_is_left_alone_with_a_warning(pair: Pair) -> None:
    table = '\nint table[2] __attribute__((section(".table"))) = {{ 1, {} }};\n'
    ignore = '\nasm(".pushsection .kmend.ignore.sections, \\"a\\"\\n.asciz \\".table\\"\\n.popsection");\n'
    _, selection = pair(BASE + table.format(2), BASE + table.format(3) + ignore)
    assert not selection.refusals
    assert [(w.rule, w.what) for w in selection.warnings] == [("ignored-by-patch", "section .table")]
    _, without = pair(BASE + table.format(2), BASE + table.format(3))
    assert rules(without.refusals) == ["changed-data"]


def test_an_unknown_declaration_is_refused(pair: Pair) -> None:
    odd = '\nstatic int odd __attribute__((__used__, section(".kmend.callbacks.halfway"))) = 1;\n'
    _, selection = pair(BASE, BASE.replace("* 3", "* 5") + odd)
    assert [(r.rule, r.what) for r in selection.refusals] == [
        ("unknown-declaration", "section .kmend.callbacks.halfway")
    ]


def test_declarations_are_no_parts_of_an_object(pair: Pair) -> None:
    diff, _ = pair(BASE, BASE + CALLBACK % ("it", "pre_patch"))
    unit: UnitObject = diff.new
    assert not [p for p in unit.parts.values() if unit.section_of(p).name.startswith(".kmend.")]
