"""A static key of a module in replaced code: refused by name, with the words that make it work."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.progress import Silent
from kmend.core.report import BuildReport, Outcome
from kmend.core.target import Target
from kmend.elf.reader import read
from kmend.pipeline import BuildRequest, build

pytestmark = pytest.mark.target

FILE = "net/netfilter/nf_tables_core.c"
BRANCH = "\tif (static_branch_unlikely(&nft_counters_enabled))"


def made(target: Target, config: Config, out: Path, test: str) -> BuildReport:
    """nft_do_chain() with another test in place of the one of its own static key; the others go."""
    old = (target.source / FILE).read_text()
    assert old.count(BRANCH) == 1
    new = old.replace(BRANCH, f"\tif ({test})")
    if test.startswith("static_key_enabled"):
        new = new.replace(
            "static_branch_unlikely(&nft_trace_enabled)", "static_key_enabled(&nft_trace_enabled)"
        )
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{FILE}", f"b/{FILE}")
    patch = "".join(lines).encode()
    return build(BuildRequest((("key.patch", patch),), target.release, out), config, Silent())


def test_a_key_of_a_module_is_refused_and_what_is_said_helps(
    target_55: Target, config: Config, tmp_path: Path
) -> None:
    branch = "static_branch_unlikely(&nft_counters_enabled) && pkt->skb->len"
    report = made(target_55, config, tmp_path, branch)
    assert report.result is Outcome.REFUSED
    assert {(r.rule, r.what) for r in report.refused} == {("late-module-key", "nft_do_chain")}
    steps = [r.next_step for r in report.refused]
    assert any("static_key_enabled(&nft_counters_enabled)" in step for step in steps)
    assert list(tmp_path.glob("*.ko")) == []
    report = made(target_55, config, tmp_path, "static_key_enabled(&nft_counters_enabled) && pkt->skb->len")
    assert report.result is Outcome.BUILT, report.refused
    elf = read(Path(report.module or "").read_bytes(), "key")
    names = {s.name for s in elf.symbols if s.name.startswith(".klp.sym.nf_tables.")}
    assert {".klp.sym.nf_tables.nft_counters_enabled,0", ".klp.sym.nf_tables.nft_trace_enabled,0"} <= names
    assert elf.section("__jump_table") is None
