"""The ends of a guest that are not a command's exit status, each its own error."""

from __future__ import annotations

import contextlib
import subprocess

from kmend.core import kmsg
from kmend.core.errors import Failed
from kmend.core.kmsg import KernelReport, ReportKind
from kmend.lab.channel import Done
from kmend.lab.machine import Machine

#: How many of the console's last lines an error carries.
CONSOLE_TAIL = 12


class LostGuest(Failed):
    """The guest died or fell silent, and its kernel said nothing that explains it (rule ``guest-lost``)."""

    def __init__(self, why: str, console: tuple[str, ...]) -> None:
        tail = "; the console's last lines:\n" + "\n".join(console) if console else "; its console is empty"
        super().__init__(
            "the guest was lost",
            why=why + tail,
            next_step="run it again; if it is lost again, look at the console with --keep",
            rule="guest-lost",
        )
        self.console = console


class KernelOops(Failed):
    """The guest's kernel died: oops, BUG or panic (rule ``kernel-oops``)."""

    def __init__(self, report: KernelReport, console: tuple[str, ...]) -> None:
        super().__init__(
            f"the guest's kernel died: {report.headline}",
            why="\n".join(report.lines),
            next_step="read the trace: it names the function in which it happened",
            rule="kernel-oops",
        )
        self.report = report
        self.console = console


class CommandTimeout(Failed):
    """A command did not end in time and was killed; ``done`` has what it printed (rule ``guest-timeout``)."""

    def __init__(self, seconds: float, done: Done, *, oops: bool) -> None:
        super().__init__(
            f"a command in the guest did not end within {seconds:.0f} s",
            why="the kernel oopsed meanwhile" if oops else (done.errors or done.text)[-500:],
            next_step="give it more time, or mend what it waits for",
            rule="guest-timeout",
        )
        self.done = done
        self.oops = oops


def lost(machine: Machine, why: str) -> LostGuest | KernelOops:
    """The error for a guest that cannot be used any more; its QEMU is killed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        # a dying QEMU closes its channels a little before it can be waited for
        machine.process.wait(1.0)
    status = machine.process.poll()
    machine.close()
    console = machine.console().decode(errors="replace").replace("\r", "")
    lines = [line for line in console.splitlines() if line.strip()]
    tail = tuple(lines[-CONSOLE_TAIL:])
    for report in kmsg.reports(kmsg.parse(console)):
        if report.kind is ReportKind.OOPS:
            return KernelOops(report, tail)
    if status is not None:
        said = f": {machine.errors()}" if machine.errors() else ""
        why = f"QEMU ended with status {status}{said}"
    return LostGuest(why, tail)
