"""What the kernel answers, in sentences: an error number alone has a dozen causes, the log tells which.

The rows follow ``kernel/livepatch/core.c``, ``kernel/livepatch/patch.c``, ``kernel/module/main.c``,
``kernel/module/signing.c``, ``arch/x86/kernel/module.c`` and ``security/lockdown/lockdown.c``; each but
``ftrace-race``, ``relocation-field`` and ``incompatible-states`` was provoked on stock kernels.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from kmend.core.errors import Refusal
from kmend.core.kmsg import KernelMessage

_ANEW = "build the patch anew for this kernel"
_DIFFERENT = "the module was made for another build of the kernel"


@dataclass(frozen=True, slots=True)
class Answer:
    """A row. ``pattern`` is searched in the kernel's messages; its groups fill ``{0}``, ``{1}``, …

    ``{name}`` in it is the module: others are loaded at the same time, and have troubles of their own.
    ``number`` limits the row to one error number (0: any).
    """

    rule: str
    pattern: str
    what: str
    why: str
    next_step: str
    number: int = 0


#: The first row that matches any message counts: causes stand before their consequences.
_BY_LOG = (
    Answer(
        rule="unsigned",
        pattern=r"Loading of (unsigned module|module with \w+ \w+) is rejected",
        what="the kernel loads signed modules only, and does not accept this one's signature",
        why="it says: loading of {0} is rejected",
        next_step="sign the module with a key that the kernel trusts (kmend build --sign-key)",
    ),
    Answer(
        rule="lockdown",
        pattern=r"Lockdown: .*: (.*module.*) is restricted",
        what="the kernel is locked down and loads signed modules only",
        why="it says: {0} is restricted",
        next_step="sign the module with a key that the kernel trusts (kmend build --sign-key)",
    ),
    Answer(
        rule="vermagic",
        pattern=r"^{name}: version magic '(.*?)\s*' should be '(.*?)\s*'",
        what="the module was built for another kernel",
        why="it was built for {0}; this is {1}",
        next_step=_ANEW,
    ),
    Answer(
        rule="symbol-version",
        pattern=r"^{name}: disagrees about version of symbol (\S+)",
        what="the module was built against another {0}()",
        why="the checksum of the symbol is not this kernel's",
        next_step=_ANEW,
    ),
    Answer(
        rule="not-exported",
        pattern=r"^{name}: Unknown symbol (\S+) \(err (-?\d+)\)",
        what="the module needs {0}, which the kernel does not export",
        why="it answers {1} for the symbol",
        next_step="load the module that exports it first, or build the patch anew",
    ),
    Answer(
        rule="relocation-field",
        pattern=r"[Ii]nvalid relocation target, existing value is nonzero for type (\d+)",
        what="the module has a value where the kernel wants to write an address",
        why="relocation type {0} onto a field that is not zero",
        next_step="report the module",
    ),
    Answer(
        rule="not-a-livepatch",
        pattern=r"livepatch: module (\S+) is not marked as a livepatch module",
        what="{0} is no livepatch module",
        why="its modinfo has no livepatch=Y",
        next_step='add MODULE_INFO(livepatch, "Y")',
    ),
    Answer(
        rule="incompatible-states",
        pattern=r"is not compatible with the already installed livepatches",
        what="the patch's states do not fit those of the patches that are there",
        why="it lacks a state that they have, or has an older version of it (klp_is_patch_compatible)",
        next_step="unload the other patch first, or build this one with the state",
    ),
    Answer(
        rule="old-function",
        pattern=r"livepatch: symbol '(.+?)' not found in symbol table",
        what="the kernel has no function {0}()",
        why=_DIFFERENT,
        next_step=_ANEW,
    ),
    Answer(
        rule="ambiguous-symbol",
        pattern=r"livepatch: unresolvable ambiguity for symbol '(.+?)' in object '(.+?)'",
        what="the kernel has several functions {0}()",
        why="the module does not say which is meant (sympos is 0)",
        next_step="build it with kmend, or give the sympos",
    ),
    Answer(
        rule="old-function",
        pattern=r"livepatch: symbol position (\d+) for symbol '(.+?)' in object '(.+?)' not found",
        what="{2} has no {1}() at position {0}",
        why=_DIFFERENT,
        next_step=_ANEW,
    ),
    Answer(
        rule="no-ftrace-entry",
        pattern=r"livepatch: failed to find location for function '(.+?)'",
        what="{0}() cannot be patched",
        why="it has no ftrace entry: it is notrace, or no function",
        next_step="patch a caller that can be traced",
    ),
    Answer(
        # bpf_tramp_ftrace_ops_func(), kernel/bpf/trampoline.c: it cannot wait for the trampoline's lock
        rule="ftrace-race",
        pattern=r"livepatch: failed to register ftrace handler for function '(.+?)'",
        what="a BPF program was being attached to or detached from {0}() at that moment",
        why="its trampoline was locked; nothing was patched",
        next_step="load it again",
        number=errno.EAGAIN,
    ),
    Answer(
        rule="ftrace-conflict",
        pattern=r"livepatch: failed to register ftrace handler for function '(.+?)' \((-?\d+)\)",
        what="{0}() cannot be redirected: the kernel answers {1}",
        why="a kprobe with a post handler or another user of ftrace that changes where a function goes is "
        "on it, or ftrace is off (kernel.ftrace_enabled=0)",
        next_step="remove the probe (/sys/kernel/debug/kprobes/list, /sys/kernel/tracing/enabled_functions), "
        "or set kernel.ftrace_enabled=1",
    ),
    Answer(
        rule="pre-patch-callback",
        pattern=r"livepatch: pre-patch callback failed for object '(.+?)'",
        what="the patch's own pre-patch callback for {0} said no",
        why="it returned an error; nothing was patched",
        next_step="see what the patch's author asks for",
    ),
    Answer(
        rule="function-twice",
        pattern=r"sysfs: cannot create duplicate filename '/kernel/livepatch/[^/]+/(\S+)'",
        what="the patch lists {0} twice",
        why="the kernel makes a folder of each function",
        next_step="report the module",
        number=errno.EEXIST,
    ),
)

#: By the number alone, where the log does not tell.
_BY_NUMBER = (
    Answer(
        rule="already-loaded",
        pattern="",
        what="a module of that name is loaded",
        why="the kernel loads one module of a name",
        next_step="unload it first (kmend unload), or build the patch with another name (-n)",
        number=errno.EEXIST,
    ),
    Answer(
        rule="transition-running",
        pattern="",
        what="another transition is under way, or a module of that name comes or goes",
        why="the kernel makes one transition at a time, and has one module of a name",
        next_step="wait for its end (kmend status --watch), then load it again",
        number=errno.EBUSY,
    ),
    Answer(
        rule="out-of-memory",
        pattern="",
        what="the kernel has no memory for the module",
        why="it answers ENOMEM",
        next_step="free memory and load it again",
        number=errno.ENOMEM,
    ),
    Answer(
        rule="not-root",
        pattern="",
        what="the kernel does not allow it",
        why="CAP_SYS_MODULE is needed, or loading modules has been forbidden (kernel.modules_disabled, "
        "lockdown, LoadPin)",
        next_step="run kmend as root; look at the kernel log",
        number=errno.EPERM,
    ),
    *(
        Answer(
            rule="unsigned",
            pattern="",
            what="the kernel does not accept the module's signature",
            why="it loads modules with a signature of a key that it trusts",
            next_step="sign the module with such a key (kmend build --sign-key)",
            number=number,
        )
        for number in (errno.EKEYREJECTED, errno.ENOKEY, errno.EBADMSG, errno.ENOPKG)
    ),
)


def explain(what: str, number: int, messages: Iterable[KernelMessage], name: str = "") -> Refusal:
    """The refusal for error ``number``; ``messages`` is what the kernel said meanwhile.

    ``name`` is that of the module which was being loaded.
    """
    texts = [message.text for message in messages if not message.user]
    for row in _BY_LOG:
        if row.number not in (0, number):
            continue
        for text in texts:
            match = re.search(row.pattern.replace("{name}", re.escape(name)), text)
            if match:
                groups = tuple(word or "" for word in match.groups())
                return Refusal(
                    row.rule,
                    f"{what}: {row.what.format(*groups)}",
                    f"{row.why.format(*groups)} ({_name(number)})",
                    row.next_step,
                )
    for row in _BY_NUMBER:
        if row.number == number:
            return Refusal(row.rule, f"{what}: {row.what}", f"{row.why} ({_name(number)})", row.next_step)
    return unexplained(what, number, texts)


def unexplained(what: str, number: int, texts: Iterable[str]) -> Refusal:
    """For an error of which nothing more is known than its number and the kernel's last words."""
    words = [text for text in texts if text.strip()][-3:]
    return Refusal(
        "kernel-refused",
        f"{what}: the kernel answers {_name(number)}",
        "; ".join(words) or "it says nothing more about it in its log",
        "look at `kmend log` and dmesg",
    )


def _name(number: int) -> str:
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
