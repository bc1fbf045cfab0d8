"""Object pairs that look alike but are not, and references that are easily followed to the wrong place."""

from __future__ import annotations

from pathlib import Path

from pairs import FLAGS, Pair, compiled

from kmend.diff.compare import ObjectDiff, compare
from kmend.diff.select import Linker, LinkKind, Selection, select
from kmend.diff.unit import RefKind


def changed(selection: Selection) -> set[str]:
    return {row.original for row in selection.changed}


def rules(selection: Selection) -> set[str]:
    return {row.rule for row in selection.refusals}


def wide(folder: Path, old: str, new: str) -> tuple[ObjectDiff, Selection]:
    flags = [*FLAGS, "-fshort-wchar"]
    diff = compare(compiled(folder, "old", old, flags=flags), compiled(folder, "new", new, flags=flags))
    return diff, select(diff)


def test_a_table_that_the_compiler_made_of_a_switch_changes_its_function(pair: Pair) -> None:
    """``CSWTCH.0``: the code stays the same to the byte, the values are in a table of GCC's own."""
    old = """
    int f(int x) {
        switch (x) { case 0: return 17; case 1: return 4; case 2: return 99; case 3: return 12;
        case 4: return 8; default: return -1; }
    }
    int g(int x) { return outside(x); }
    """
    diff, selection = pair(old, old.replace("99", "98"))
    assert any(k.startswith("CSWTCH") for k in diff.new.parts), "GCC is expected to make a table"
    assert changed(selection) == {"f"}
    assert not selection.refusals
    assert any(k.startswith("CSWTCH") for k in selection.included)


def test_a_wide_string_is_more_than_its_first_character(tmp_path: Path) -> None:
    """``L"SecureBoot"`` of the EFI code: two bytes each, every second one 0."""
    old = 'extern int var(const __WCHAR_TYPE__ *);\nint f(void) { return var(L"SecureBoot") + 1; }'
    diff, selection = wide(tmp_path, old, old.replace("Boot", "Root"))
    assert changed(selection) == {"f"}
    part = diff.new.parts["f"]
    section = diff.new.section_of(part)
    refs = [diff.new.ref(section, r) for r in diff.new.relocs(part)]
    (text,) = [r for r in refs if r.kind is RefKind.STRING]
    assert text.content == "SecureRoot\0".encode("utf-16-le")


def test_a_fresh_flag_may_silence_a_message_but_not_seed_a_hash_anew(pair: Pair) -> None:
    """``get_random_once()``: with a fresh ``___done`` the secret of a table in use would change."""
    old = """
    #define once(n) ({ static unsigned char ___done; if (!___done) { ___done = 1; outside(n); } })
    int f(int x) { once(1); x = outside(x); once(2); return x; }
    """
    _, selection = pair(old, old.replace("once(1); x", "x"))
    assert "static-local-ambiguous" in rules(selection)
    quiet = old.replace("___done", "__already_done")
    _, selection = pair(quiet, quiet.replace("once(1); x", "x"))
    assert not selection.refusals


def test_two_of_one_name_that_change_places_are_not_swapped(pair: Pair) -> None:
    """The compiler may lay the blocks out anew: then the order of use says nothing."""
    old = """
    int f(int x) {
        if (x > 5) { static int n; n += x; return outside(n); }
        { static int n; n -= x; return outside(n + 1); }
    }
    """
    likely, unlikely = (old.replace("x > 5", f"__builtin_expect(x > 5, {n})") for n in (1, 0))
    diff, selection = pair(likely, unlikely)
    assert changed(selection) == {"f"}
    assert not any(key.startswith("n.") for key in diff.twins.original)
    assert "static-local-ambiguous" in rules(selection)
    _, selection = pair(old, old.replace("n + 1", "n + 2"))
    assert changed(selection) == {"f"}
    assert not selection.refusals


def test_a_variable_that_was_renamed_is_not_begun_anew(pair: Pair) -> None:
    """Its state is under the old name: an empty list in its place would lose every element."""
    old = "static int pending = 3;\nint f(int x) { pending += x; return outside(pending); }"
    _, selection = pair(old, old.replace("pending", "waiting"))
    assert "renamed-variable" in rules(selection)


def test_a_cold_part_belongs_to_its_function_by_any_name(pair: Pair) -> None:
    """``__se_sys_x`` and ``__x64_sys_x`` are one function; the cold part has the other one's name."""
    old = """
    extern int complain(const char *, int) __attribute__((cold));
    static int inner(int x) {
        if (outside(x)) { complain("bad %d", x); return outside(x * 17); }
        return outside(x + 1) * 3;
    }
    int aaa(int x) __attribute__((alias("inner")));
    """
    diff, selection = pair(old, old.replace("* 3", "* 5"))
    assert [k for k in diff.new.parts if ".cold" in k]
    assert len(changed(selection)) == 1
    assert not selection.refusals
    linker, new = Linker(diff), diff.new
    for key in selection.included:
        part = new.parts[key]
        for reloc in new.relocs(part):
            link = linker.of_code(part, new.section_of(part), reloc)
            assert link.kind is not LinkKind.OUTER, (key, link)


def test_the_end_of_an_array_is_not_the_next_variable(pair: Pair) -> None:
    """In a section of several variables ``cmp $table+N`` may mean the end of one or the start of the next."""
    here = '__attribute__((section(".data..read_mostly")))'
    old = f"""
    static int table[4] {here} = {{1, 2, 3, 4}};
    int g(void) {{ int *p, s = 0; for (p = table; p < table + 4; p++) s += outside((*p)++); return s; }}
    """
    more = f"static int fresh {here} = 5;\nint h(int x) {{ return fresh += x; }}\n"
    new = old.replace("return s", "return s + 1")
    diff, selection = pair(old, more + new)
    part = diff.new.parts["g"]
    assert "fresh" in {diff.new.ref(diff.new.section_of(part), r).name for r in diff.new.relocs(part)}
    assert rules(selection) == {"ambiguous-place"}
    _, selection = pair(more + old, more + new)  # as in the original: both readings are one place
    assert not selection.refusals
    _, selection = pair(old, new + more)  # placed before it: the end is nothing else
    assert not selection.refusals


def test_data_for_the_kernels_start_that_is_taken_away_is_refused(pair: Pair) -> None:
    call = 'static int (*call)(int) __attribute__((used, section(".initcall6.init"))) = outside;\n'
    old = "int f(int x) { return outside(x); }"
    _, selection = pair(call + old, old.replace("outside(x)", "outside(x + 1)"))
    assert "init-data" in rules(selection)


def test_code_between_functions_is_compared(pair: Pair) -> None:
    old = """
    asm(".text\\n.globl raw\\nraw: mov $5, %eax\\nret\\n");
    asm(".text\\n.type sized,@function\\nsized: ret\\n.size sized,.-sized\\n");
    int f(int x) { return outside(x); }
    """
    diff, selection = pair(old, old.replace("$5", "$6"))
    assert not diff.nothing
    assert "changed-section" in rules(selection)


def test_an_entry_that_leads_to_another_function_is_refused(pair: Pair) -> None:
    """It would bring a second copy of that function along, unlike the one that everybody else calls."""
    old = """
    noinline int rescue(int x) { return outside(x + 9); }
    int f(int x) {
        asm volatile("1: nop\\n.pushsection __ex_table,\\"a\\"\\n.long 1b - .\\n.long rescue - .\\n.long 1\\n"
            ".popsection");
        return outside(x);
    }
    """
    _, selection = pair(old, old.replace("outside(x);", "outside(x + 1);"))
    assert rules(selection) == {"special-section"}


def test_code_that_an_unknown_table_changes_is_refused(pair: Pair) -> None:
    """``runtime_const_shift_right_32()``: three bytes, too few for anything that reads the variable."""
    old = """
    long f(int x) {
        long r = x;
        asm("shrl $12, %k0\\n1:\\n.pushsection runtime_shift_bits,\\"a\\"\\n.long 1b - 1 - .\\n"
            ".popsection" : "+r" (r));
        return r + outside(x);
    }
    int g(int x) { return outside(x); }
    """
    _, selection = pair(old, old.replace("r + outside(x)", "r - outside(x)"))
    assert {(r.rule, r.what) for r in selection.refusals} == {("special-section", "f")}
    _, selection = pair(old, old.replace("return outside(x)", "return outside(x + 1)"))
    assert changed(selection) == {"g"}
    assert not selection.refusals


#: runtime_const_ptr() of arch/x86/include/asm/runtime-const.h, in any register and in r12.
RUNTIME = r"""
#define runtime(sym, r) asm("mov %1, %0\n1:\n.pushsection runtime_ptr_" #sym ",\"a\"\n" \
    ".long 1b - %c2 - .\n.popsection" : "=r" (r) : "i" (0x0123456789abcdefUL), "i" (8))
long f(int x) { long r; runtime(limit, r); return r + outside(x); }
long g(int x) { register long r asm("r12"); runtime(OTHER, r); return r + outside(x); }
int h(int x) { return outside(x); }
"""


def runtime_text(own: str = "", other: str = "limit") -> str:
    return own + RUNTIME.replace("OTHER", other)


def test_a_runtime_constant_is_read_from_its_variable(pair: Pair) -> None:
    """What the kernel completes when it starts, it does not complete in a module: that reads the variable."""
    old = runtime_text()
    diff, selection = pair(old, old.replace("+ outside(x)", "- outside(x)"))
    assert changed(selection) == {"f", "g"}
    assert not selection.refusals
    assert "limit" in selection.externs
    for name, start, register in (("f", 0x48, None), ("g", 0x4C, 4)):
        part, text = diff.new.parts[name], diff.new.code(diff.new.parts[name])
        (reloc,) = [
            r for r in diff.new.relocs(part) if diff.new.ref(diff.new.section_of(part), r).name == "limit"
        ]
        at = reloc.offset - part.start
        insn = text[at - 3 : at + 7]
        assert (insn[0], insn[1], insn[2] & 0xC7) == (start, 0x8B, 0x05)
        assert register is None or insn[2] >> 3 == register
        assert insn[3:] == bytes(4) + bytes.fromhex("0f1f00")
        assert reloc.addend == -4
        # the proof is made with what the compiler made of the original source
        assert bytes.fromhex("efcdab8967452301") in diff.old.code(diff.old.parts[name])


def test_another_runtime_constant_is_a_change(pair: Pair) -> None:
    """The bytes are the same whichever variable is meant."""
    _, selection = pair(runtime_text(), runtime_text(other="border"))
    assert changed(selection) == {"g"}
    assert "border" in selection.externs
    _, selection = pair(runtime_text(), runtime_text().replace("h(int x) { return", "h(int x) { return 1 +"))
    assert changed(selection) == {"h"}


def test_a_runtime_constant_of_the_units_own_is_the_kernels_variable(pair: Pair) -> None:
    old = runtime_text("static unsigned long border;\nunsigned long *b(void) { return &border; }", "border")
    diff, selection = pair(old, old.replace("+ outside(x)", "- outside(x)"))
    assert not selection.refusals
    assert "border" in selection.outer
    assert "border" not in selection.included
    assert diff.twins.original["border"] == "border"


def test_a_runtime_constant_of_another_form_is_refused(pair: Pair) -> None:
    old = """
    long f(int x) {
        long r;
        asm("1: .quad 0x0123456789abcdef\\n"
            ".pushsection runtime_ptr_limit,\\"a\\"\\n.long 1b - .\\n.popsection" : "=r" (r));
        return outside(x) ? r : 0;
    }
    """
    _, selection = pair(old, old.replace("outside(x) ?", "outside(x + 1) ?"))
    assert "special-section" in rules(selection)


def test_a_new_once_flag_is_carried_by_either_name(pair: Pair) -> None:
    old = "int f(int x) { return outside(x); }"
    for name in (".data.once", ".data..once"):
        flag = f'static _Bool __already_done __attribute__((section("{name}")));'
        _, selection = pair(
            old, f"int f(int x) {{ {flag} if (!__already_done) __already_done = 1; return x; }}"
        )
        assert changed(selection) == {"f"}
        assert not selection.refusals


def test_what_the_linker_throws_away_may_change(pair: Pair) -> None:
    """``cond_resched()``, used for the first time in a file, leaves a word in ``.discard.addressable``."""
    old = "int f(int x) { return outside(x); }"
    word = 'asm(".pushsection .discard.addressable,\\"aw\\"\\n.quad outside\\n.popsection");\n'
    _, selection = pair(old, word + old.replace("outside(x)", "outside(x + 1)"))
    assert changed(selection) == {"f"}
    assert not selection.refusals


def test_a_function_of_ref_text_stays_for_good(pair: Pair) -> None:
    """``__ref``: it may refer to init code, but is none (include/linux/init.h)."""
    old = '__attribute__((section(".ref.text"))) noinline int f(int x) { return outside(x); }'
    _, selection = pair(old, old.replace("outside(x)", "outside(x + 1)"))
    assert changed(selection) == {"f"}
    assert not selection.refusals


def test_an_offset_behind_a_lone_variable_is_not_taken_for_it(pair: Pair) -> None:
    """Bytes that no symbol names, in a section with one variable: nobody can say what lies there."""
    old = """
    asm(".pushsection .data.mixed,\\"aw\\"\\n.type v,@object\\nv: .long 1\\n.size v,4\\n"
        ".Lx: .long 7\\n.popsection");
    int f(int x) { int r; asm("movl .Lx(%%rip), %0" : "=r" (r)); return outside(x + r); }
    """
    _, selection = pair(old, old.replace("x + r", "x - r"))
    assert "opaque-reference" in rules(selection)


def test_literals_inside_of_one_another_keep_their_state(pair: Pair) -> None:
    """``__compound_literal.N``: the outer one is known by its user, the inner one by the outer."""
    old = """
    struct inner { const int *row; int n; };
    static const struct inner *const table[] = {
        &(struct inner){ (int []){ 1, 2 }, 1 }, &(struct inner){ (int []){ 3, 4 }, 1 } };
    int f(int i) { return table[i]->row[0]; }
    int g(int i) { return outside(table[i]->row[1]); }
    """
    diff, selection = pair(old, old.replace("outside(", "outside(1 + "))
    literals = [k for k in diff.new.parts if k.startswith("__compound_literal")]
    assert len(literals) == 4, "GCC is expected to make a variable of each"
    assert {diff.twins.original[k] for k in literals} == set(literals)
    assert changed(selection) == {"g"}
    assert not selection.refusals
