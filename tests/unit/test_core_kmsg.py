"""Reports in the kernel log, on text as real kernels print it."""

from __future__ import annotations

import pytest

from kmend.core import kmsg
from kmend.core.kmsg import KernelMessage, ReportKind

OOPS = """\
<6>[   13.100000] loop0: detected capacity change from 0 to 131072
<1>[   13.783431] BUG: kernel NULL pointer dereference, address: 0000000000000000
<1>[   13.783431] #PF: supervisor read access in kernel mode
<6>[   13.783431] PGD 0 P4D 0
<4>[   13.783431] Oops: 0000 [#1] PREEMPT SMP NOPTI
<4>[   13.783431] CPU: 0 PID: 221 Comm: rm Tainted: G           OE K   6.1.0-55-amd64 #1  Debian 6.1.192-1
<4>[   13.783431] RIP: 0010:ext4_mb_load_buddy_gfp+0xbc/0x380 [ext4]
<4>[   13.783431] Call Trace:
<4>[   13.783431]  <TASK>
<4>[   13.783431]  ext4_free_blocks+0x410/0xbb0 [ext4]
<4>[   13.783431] RIP: 0033:0x7f49b01c3b47
<4>[   13.783431] ---[ end trace 0000000000000000 ]---
<6>[   13.783431] note: rm[221] exited with irqs disabled
<4>[   14.000000] ------------[ cut here ]------------
<4>[   14.000000] WARNING: CPU: 0 PID: 1 at kernel/foo.c:7 foo+0x5/0x10
<4>[   14.000000] RIP: 0010:foo+0x5/0x10
<4>[   14.000000] ---[ end trace 0000000000000000 ]---
"""


def test_an_oops_and_a_warning_are_told_apart() -> None:
    oops, warning = kmsg.reports(kmsg.parse(OOPS))
    assert oops.kind is ReportKind.OOPS
    assert oops.headline == "BUG: kernel NULL pointer dereference, address: 0000000000000000"
    assert oops.where == "ext4_mb_load_buddy_gfp+0xbc/0x380 [ext4]"
    assert len(oops.lines) == 11
    assert oops.lines[-1].startswith("---[ end trace")
    assert warning.kind is ReportKind.WARNING
    assert warning.where == "foo+0x5/0x10"


@pytest.mark.parametrize(
    "line",
    [
        "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [cat:163]",
        "kernel BUG at fs/ext4/inode.c:100!",
        "Kernel panic - not syncing: sysrq triggered crash",
        "general protection fault, probably for non-canonical address 0x1: 0000 [#1] PREEMPT SMP",
        "invalid opcode: 0000 [#1] PREEMPT SMP NOPTI",
        "int3: 0000 [#2] PREEMPT SMP",
        "Oops: general protection fault, kernel NULL pointer dereference 0x0: 0000 [#1] SMP",
        "BUG: unable to handle page fault for address: ffffffffc0427fdb",
    ],
)
def test_what_kills(line: str) -> None:
    assert kmsg.is_death(line)
    assert kmsg.reports([KernelMessage(1.0, 1, line)])[0].kind is ReportKind.OOPS


@pytest.mark.parametrize(
    "line",
    [
        "livepatch: 'p': patching complete",
        "p: loading out-of-tree module taints kernel.",
        "ACPI BIOS Warning (bug): none",
        "Spectre V2 : Mitigation: Oops-free",
        "DEBUG: something",
    ],
)
def test_what_does_not(line: str) -> None:
    assert not kmsg.is_death(line)
    assert kmsg.reports([KernelMessage(1.0, 4, line)]) == ()


def test_what_user_space_writes_is_no_oops() -> None:
    (message,) = kmsg.parse("<12>[    1.000000] BUG: I only say so")
    assert message.user
    assert kmsg.reports([message]) == ()


def test_a_console_shows_no_level() -> None:
    (message,) = kmsg.parse("[    1.500000] livepatch: enabling patch 'x'\r\nno stamp, no message\n")
    assert (message.seconds, message.text) == (1.5, "livepatch: enabling patch 'x'")
    assert message.livepatch


def test_a_headline_without_an_end_takes_its_trace_only() -> None:
    lines = ["BUG: sleeping function called", "Call Trace:", " dump_stack+0x1/0x2", "usb 1-1: new device"]
    (report,) = kmsg.reports(KernelMessage(1.0, 3, line) for line in lines)
    assert report.lines == tuple(lines[:3])
