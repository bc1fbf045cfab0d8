"""Changed exports: said, and left as they are."""

from __future__ import annotations

import pytest
from pairs import Pair

from kmend.diff.exports import Export, exports_of

#: include/linux/export-internal.h and include/asm-generic/export.h of 6.1, without the checksums.
EARLIER = """
#define EXPORT(sym, sec, ns) \\
    asm(".section \\"__ksymtab_strings\\",\\"aMS\\",%progbits,1\\n" \\
        "__kstrtab_" #sym ": .asciz \\"" #sym "\\"\\n__kstrtabns_" #sym ": .asciz \\"" ns "\\"\\n" \\
        ".previous\\n" \\
        ".section \\"___ksymtab" sec "+" #sym "\\",\\"a\\"\\n.balign 4\\n__ksymtab_" #sym ":\\n" \\
        ".long " #sym " - .\\n.long __kstrtab_" #sym " - .\\n.long __kstrtabns_" #sym " - .\\n.previous");
"""
#: include/linux/export.h since 6.5.
LATER = """
#define EXPORT(sym, sec, ns) \\
    asm(".section \\".export_symbol\\",\\"a\\"\\n__export_symbol_" #sym ":\\n" \\
        ".asciz \\"" sec "\\"\\n.ascii \\"" ns "\\" \\"\\\\0\\"\\n.balign 8\\n.quad " #sym "\\n.previous");
"""
CODE = "int f(int x) { return outside(x); }\nint g(int x) { return outside(x + 1); }\n"


@pytest.mark.parametrize(("form", "gpl"), [(EARLIER, "_gpl"), (LATER, "GPL")])
def test_what_the_patch_exports_is_warned_of(pair: Pair, form: str, gpl: str) -> None:
    old = form + CODE + 'EXPORT(f, "", "")\n'
    new = form + CODE + f'EXPORT(f, "{gpl}", "INNER")\nEXPORT(g, "", "")\n'
    diff, selection = pair(old, new)
    assert exports_of(diff.old) == {"f": Export("", "")}
    assert exports_of(diff.new) == {"f": Export("GPL", "INNER"), "g": Export("", "")}
    assert not selection.refusals
    assert not selection.changed
    rows = {row.what: row.why for row in selection.warnings if row.rule == "export-changed"}
    assert set(rows) == {"f", "g"}
    assert "otherwise exports it" in rows["f"]
    assert "the patch exports it" in rows["g"]
    _, selection = pair(new, old)
    assert "stops exporting" in next(row.why for row in selection.warnings if row.what == "g")


@pytest.mark.parametrize("form", [EARLIER, LATER])
def test_an_export_that_stays_is_none_of_the_patchs(pair: Pair, form: str) -> None:
    text = form + CODE + 'EXPORT(g, "", "NS")\n'
    _, selection = pair(text, text.replace("x + 1", "x + 2"))
    assert [row.original for row in selection.changed] == ["g"]
    assert not selection.refusals
    assert not selection.warnings
