"""Sections that mean something to the kernel: what a patch may add to each, take away, or change.

docs/special-sections.md has them all in one table; tests/lab/test_kinds.py runs what is carried.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import Pair

from kmend.diff import select as selecting
from kmend.diff.select import Selection
from kmend.diff.special import DISPENSABLE, NO_PROBES, SATELLITES, TABLE

OLD = "int f(int x) { return outside(x); }\nint g(int x) { return outside(x + 1); }\n"


def changed(selection: Selection) -> set[str]:
    return {row.original for row in selection.changed}


def rules(selection: Selection) -> set[str]:
    return {row.rule for row in selection.refusals}


def in_section(name: str, value: str = "") -> str:
    """A new static variable in a section of its own choice, and f() using it."""
    return f'static int fresh __attribute__((section("{name}"))){value};\n' + OLD.replace(
        "outside(x);", "outside(x + ++fresh);"
    )


@pytest.mark.parametrize(
    "name",
    [
        *(".data..read_mostly", ".data..ro_after_init", ".data..cacheline_aligned", ".data..once"),
        *(".data..do_once", ".data..percpu", ".data..percpu..shared_aligned", ".data..percpu..read_mostly"),
        *(".data..percpu..page_aligned", "__trace_printk_fmt"),
    ],
)
def test_a_new_variable_where_the_module_loader_knows_the_section(pair: Pair, name: str) -> None:
    _, selection = pair(OLD, in_section(name, " = 3"))
    assert changed(selection) == {"f"}
    assert not selection.refusals
    assert "fresh" in selection.included


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("__param", "special-data"),
        ("__tracepoints", "special-data"),
        ("__tracepoints_ptrs", "special-data"),
        ("__bpf_raw_tp_map", "special-data"),
        ("_ftrace_events", "special-data"),
        ("_ftrace_eval_map", "special-data"),
        ("__tracepoint_str", "special-data"),
        ("___srcu_struct_ptrs", "special-data"),
        ("__dyndbg_classes", "special-data"),
        (".BTF_ids", "special-data"),
        ("alloc_tags", "special-data"),
        (".data..percpu..first", "special-data"),
        (".data..nosave", "special-data"),
        ("__kcrctab", "special-data"),
        (".con_initcall.init", "special-data"),
        (".init_array", "init-data"),
        (".init.setup", "init-data"),
    ],
)
def test_a_new_variable_where_only_a_start_looks_is_refused_by_name(pair: Pair, name: str, rule: str) -> None:
    row = f'static void *row __attribute__((used, section("{name}"))) = f;\n'
    _, selection = pair(OLD, OLD.replace("outside(x)", "outside(x * 2)") + row)
    assert rules(selection) == {rule}
    _, selection = pair(OLD + row, OLD)
    # what is plain data in vmlinux may go with the code that used it
    assert rules(selection) == (set() if name.startswith(".data") else {rule})


def test_a_per_cpu_variable_that_begins_with_an_address_is_refused(pair: Pair) -> None:
    """The module loader relocates nothing there: it would begin with NULL."""
    new = OLD.replace("outside(x);", "outside(*fresh);")
    _, selection = pair(
        OLD, 'static int at;\nstatic int *fresh __attribute__((section(".data..percpu"))) = &at;\n' + new
    )
    assert ("special-data", "fresh") in {(r.rule, r.what) for r in selection.refusals}


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        (".data", ".data..percpu", True),
        (".data..percpu", ".bss", True),
        (".data..ro_after_init", ".data", True),  # the running kernel's copy is read-only
        (".data", ".data..ro_after_init", False),
        (".data", ".data..read_mostly", False),
        (".data..read_mostly", ".bss", False),
        (".data..percpu", ".data..percpu..read_mostly", True),
        (".init.data", ".data", True),
    ],
)
def test_a_variable_that_moves(pair: Pair, before: str, after: str, *, refused: bool) -> None:
    """The running kernel has it where it was: it is reached, and may be used, as it could be there."""

    def text(section: str, more: str) -> str:
        variable = f'static int counter __attribute__((section("{section}")));\n'
        return variable + OLD.replace("outside(x);", f"outside(x + counter++{more});")

    _, selection = pair(text(before, ""), text(after, " * 2"))
    rule = "init-reference" if before.startswith(".init") else "reshaped-data"
    assert rules(selection) == ({rule} if refused else set())


def test_a_new_srcu_domain_is_refused(pair: Pair) -> None:
    """DEFINE_SRCU() of vmlinux: a per-CPU part, and a structure that points to it."""
    text = """
    static long things_srcu_data[4] __attribute__((section(".data..percpu")));
    static struct { long *sda; } things = { things_srcu_data };
    extern int lock(void *);
    """
    _, selection = pair(OLD, text + OLD.replace("outside(x);", "outside(lock(&things));"))
    assert [(r.rule, r.what) for r in selection.refusals] == [("special-data", "things")]
    assert "init_srcu_struct" in selection.refusals[0].next_step


#: NOKPROBE_SYMBOL() and ALLOW_ERROR_INJECTION()
ROWS = {
    "_kprobe_blacklist": "static unsigned long kbl_{0} ROW(_kprobe_blacklist) = (unsigned long){0};\n",
    "_error_injection_whitelist": "static struct {{ unsigned long addr; int etype; }} eil_{0} "
    "ROW(_error_injection_whitelist) = {{ (unsigned long){0}, 3 }};\n",
}
ROW = "#define ROW(name) __attribute__((used, section(#name)))\n"


@pytest.mark.parametrize("table", ROWS)
def test_a_replaced_function_keeps_its_row(pair: Pair, table: str) -> None:
    """What must not be probed must not be probed in the module either."""
    old = ROW + OLD + ROWS[table].format("f") + ROWS[table].format("g")
    diff, selection = pair(old, old.replace("outside(x);", "outside(x * 2);"))
    assert changed(selection) == {"f"}
    assert not selection.refusals
    assert len(diff.new_special.entries("f", table)) == 1
    assert selection.included == ("f",)


@pytest.mark.parametrize("table", ROWS)
def test_a_new_row_replaces_its_function(pair: Pair, table: str) -> None:
    diff, selection = pair(ROW + OLD, ROW + OLD + ROWS[table].format("g"))
    assert changed(selection) == {"g"}
    assert not selection.refusals
    assert table in selection.changed[0].difference
    assert len(diff.new_special.entries("g", table)) == 1


def test_the_printk_index_is_information(pair: Pair) -> None:
    """CONFIG_PRINTK_INDEX: a description of each message, which no code reads (include/linux/printk.h)."""

    def message(text: str, line: int) -> str:
        entry = f'struct message {{ const char *fmt; int line; }} _entry KEEP = {{ "{text}", {line} }};'
        pointer = 'const void *_entry_ptr KEEP __attribute__((section(".printk_index"))) = &_entry;'
        return f'{{ static const {entry} static {pointer} printk("{text}"); }}'

    head = "#define KEEP __attribute__((used))\nextern void look(const void *);\n"
    one, two, other = message("one", 1), message("two", 2), message("other", 5)
    body = head + "int f(int x) {{ {0} return outside(x); }}\nint g(int x) {{ {1} return x; }}\n"
    _, selection = pair(body.format(one, two), body.format(other, two))
    assert changed(selection) == {"f"}
    assert not selection.refusals
    # the same variables, read by code, are data like any other
    uses = body.format(one, two).replace("printk(", "look(&_entry); printk(")
    _, selection = pair(uses, uses.replace('"one", 1', '"one", 7'))
    assert "changed-data" in rules(selection)


def ids(*lists: str, start: int = 5) -> str:
    """Lists of type ids as BTF_ID_LIST() makes them; the numbers are of __COUNTER__."""
    out, number = "", start
    for label, name in enumerate(lists):
        rows = ""
        for word in name.split():
            row = f"__BTF_ID__struct__{word}__{number}"
            rows += f".local {row}\\n.type {row}, @object\\n.size {row}, 4\\n{row}:\\n.zero 4\\n"
            number += 1
        out += (
            f'asm(".pushsection .BTF_ids,\\"a\\"\\n.local list{label}\\nlist{label}:\\n{rows}.popsection");\n'
            f"extern unsigned int list{label}[];\n"
        )
    return out


USE = (
    "int f(int x) {{ return outside(x + list0[1]{0}); }}\nint g(int x) {{ return outside(list1[1] + x); }}\n"
)


def test_lists_of_type_ids_are_told_apart(pair: Pair) -> None:
    """``__BTF_ID__struct__sock__12``: the same type stands in several lists, and the numbers move."""
    before = ids("sock inode", "sock file", start=5)
    _, selection = pair(before + USE.format(""), ids("sock inode", "sock file", start=6) + USE.format(" + 1"))
    assert changed(selection) == {"f"}
    assert not selection.refusals
    _, selection = pair(before + USE.format(""), ids("sock file", "sock inode") + USE.format(""))
    assert rules(selection) >= {"special-data"}
    _, selection = pair(before + USE.format(""), ids("sock inode pid", "sock file") + USE.format(""))
    assert rules(selection) >= {"special-data"}


@pytest.mark.parametrize("table", [".kcfi_traps", ".static_call_tramp_key", ".unheard_of"])
def test_a_table_that_nobody_knows_is_refused_where_it_matters(pair: Pair, table: str) -> None:
    """It names a place in the function: what the kernel does there is not known."""
    place = f'asm volatile("1: nop\\n.pushsection {table},\\"a\\"\\n.long 1b - .\\n.popsection");'
    old = f"int f(int x) {{ x = outside(x); {place} return x; }}\nint g(int x) {{ return outside(x); }}\n"
    _, selection = pair(old, old.replace("x = outside(x)", "x = outside(x + 1)"))
    assert "special-section" in rules(selection)
    _, selection = pair(old, old.replace("return outside(x)", "return outside(x + 1)"))
    assert changed(selection) == {"g"}
    assert not selection.refusals


def test_data_of_a_sanitizer_is_refused(pair: Pair) -> None:
    """UBSAN: a description of the place without a symbol (``.Lubsan_data0``), which the kernel writes to."""
    data = 'asm(".pushsection .data,\\"aw\\"\\n.Lubsan_data0: .quad 0, 5\\n.popsection");\n'
    old = f"{data}extern void report(void);\nint f(int x) {{ long at; asm("
    old += '"lea .Lubsan_data0(%%rip), %0" : "=r" (at)); return outside(x + at); }\n'
    _, selection = pair(old, old.replace("x + at", "x - at"))
    assert "opaque-reference" in rules(selection)


def test_every_section_that_is_known_stands_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs/special-sections.md").read_text()
    known = {*TABLE, *SATELLITES, *DISPENSABLE, NO_PROBES, "__dyndbg", ".printk_index"}
    assert sorted(name for name in known if f"`{name}`" not in text) == []
    data = [name for name in selecting._PLAIN_DATA if not name.startswith(".data..percpu")]
    assert sorted(n for n in data if f"`{n}`" not in text and n != ".rodata") == []
