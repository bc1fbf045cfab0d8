"""The running kernel's log, ``/dev/kmsg`` (Documentation/ABI/testing/dev-kmsg), and what is kept of others'.

What the kernel of a former boot said is gone with it, but for what systemd's journal has put on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kmend.core.errors import Unable
from kmend.core.kmsg import KernelMessage, is_death
from kmend.core.run import run
from kmend.runtime.place import Place, not_permitted

#: A record is at most this long (kernel/printk/printk.c, PRINTKRB_RECORD_MAX and CONSOLE_EXT_LOG_MAX: 8192).
RECORD = 8192

#: Seconds that a :class:`Bell` sleeps before it reads, and so many records it reads at a time, at most.
_BLINK = 0.02
_MOST = 1000

#: How the livepatch core and the module loader begin what concerns a livepatch. The loader has no prefix.
CONCERNS = (
    "livepatch:",
    "module: x86/modules:",
    "Loading of unsigned module is rejected",
    "Loading of module with unavailable key is rejected",
    "Loading of module with unsupported crypto is rejected",
    "Lockdown:",
)


@dataclass(frozen=True, slots=True)
class Record:
    """A message and its sequence number, which grows by one with each message of a boot."""

    number: int
    message: KernelMessage


class KernelLog:
    """An open kernel log; reads what came since the last time. Use as a context manager."""

    def __init__(self, place: Place, *, new_only: bool = False) -> None:
        """``new_only``: begin behind the last message, not with the oldest that the kernel still has.

        Raises:
            Unable: (rule ``not-permitted``) this user may not read it, or (``unreadable``) it is not there.
        """
        path = place.dev / "kmsg"
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if new_only:
                os.lseek(self._fd, 0, os.SEEK_END)
        except PermissionError as error:
            raise not_permitted(path) from error
        except OSError as error:
            raise Unable(
                f"{path} cannot be read", why=error.strerror or str(error), rule="unreadable"
            ) from error
        #: whether messages were lost because the kernel overwrote them before they were read
        self.lost = False

    def __enter__(self) -> KernelLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the log."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, with_text: bytes = b"", most: int | None = None) -> tuple[Record, ...]:
        """What came since the last call (at first: everything that the kernel still has).

        Only records that have ``with_text`` in them: a long log need not be taken apart for a few lines.
        ``most``: when there are more records, the rest is skipped, and is :attr:`lost`.
        """
        found, looked = [], 0
        while self._fd >= 0:
            if looked == most:
                self.lost = True
                os.lseek(self._fd, 0, os.SEEK_END)
                break
            looked += 1
            try:
                data = os.read(self._fd, RECORD)
            except OSError as error:
                if error.errno == errno.EPIPE:  # overwritten meanwhile: reading goes on with the oldest
                    self.lost = True
                    continue
                break  # EAGAIN: no more; a log that cannot be read has nothing to tell
            if not data:
                break
            if with_text not in data:
                continue
            record = parse_record(data.decode(errors="replace"))
            if record is not None:
                found.append(record)
        return tuple(found)

    def wait(self, seconds: float) -> None:
        """Wait until there is something to read, so many seconds at most."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.poll(seconds * 1000)


class Bell:
    """Rings when the livepatch core says something; what it says is left to others. A context manager.

    One of its own for each who waits: reading moves on in the log, and much may be said that is skipped here.
    """

    def __init__(self, place: Place) -> None:
        """Without a log it never rings."""
        self._log: KernelLog | None = None
        with contextlib.suppress(Unable):
            self._log = KernelLog(place, new_only=True)

    def __enter__(self) -> Bell:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()

    def wait(self, seconds: float) -> bool:
        """Wait for so many seconds, less if it rings; whether it has. Without a log only for a blink."""
        deadline = time.monotonic() + seconds
        while True:
            # before each reading: others may talk without end
            time.sleep(min(_BLINK, max(0.0, deadline - time.monotonic())))
            if self._log is None:
                return False
            if _spoken(self._log):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._log.wait(left)


def _spoken(log: KernelLog) -> bool:
    """Whether the livepatch core has said something since the last look; True also when that is not known."""
    said = log.read(b"livepatch:", _MOST)
    lost, log.lost = log.lost, False
    return lost or any(row.message.livepatch and not row.message.user for row in said)


def read_all(place: Place, with_text: bytes = b"") -> tuple[Record, ...]:
    """The whole log, or those of its records that have ``with_text`` in them.

    Raises:
        Unable: as :class:`KernelLog`.
    """
    with KernelLog(place) as log:
        return log.read(with_text)


def parse_record(text: str) -> Record | None:
    """``6,339,5140900,-;text``, then lines with a dictionary, each after a blank; None: another form."""
    head, mark, rest = text.partition(";")
    fields = head.split(",")
    if not mark or len(fields) < 3 or not all(word.isdigit() for word in fields[:3]):
        return None
    body = rest.partition("\n")[0]
    number = int(fields[0])
    message = KernelMessage(int(fields[2]) / 1e6, number & 7, _unescaped(body), user=number >> 3 != 0)
    return Record(int(fields[1]), message)


def _unescaped(body: str) -> str:
    """The kernel writes what is not printable as ``\\x0a``."""
    if "\\x" not in body:
        return body
    parts = body.split("\\x")
    out = parts[0]
    for part in parts[1:]:
        try:
            out += chr(int(part[:2], 16)) + part[2:]
        except ValueError:
            out += "\\x" + part
    return out


def concerning(records: Iterable[Record], names: Iterable[str] = ()) -> tuple[Record, ...]:
    """Those that speak of livepatching or of loading modules, and headlines of an oops, a BUG or a panic.

    ``names`` of modules count as well.
    """
    begin = (*CONCERNS, *(f"{name}: " for name in names))
    return tuple(row for row in records if not row.message.user and _concerns(row.message.text, begin))


def _concerns(text: str, begin: tuple[str, ...]) -> bool:
    return text.startswith(begin) or is_death(text)


def epoch_of_boot() -> float:
    """Seconds since the epoch when the kernel's log clock was 0, but for its :func:`drift`.

    The log counts like CLOCK_MONOTONIC, without the time that the machine was suspended: times before a
    suspend come out too late.
    """
    return time.time() - time.monotonic()


def drift(first: float, last: float, began: float, ended: float) -> float:
    """What to add to the log's times so that messages from ``first`` to ``last`` lie between two other times.

    The log's clock is the processor's own (``local_clock()``, kernel/printk/printk.c), which nobody corrects;
    CLOCK_MONOTONIC is slowed and hastened to keep step with the world. Some 20 millionths of difference are
    usual, which is a minute and more in a month. What was heard during an action tells it. 0 when that
    lies there as it is.
    """
    low, high = began - first, ended - last
    if low > high:  # the clock was set meanwhile
        return (low + high) / 2
    return min(max(low, 0.0), high)


# -- former boots ------------------------------------------------------------------------------------

#: So many lines of a boot are asked for, the newest ones: a kernel that warns without end fills the disk.
KEPT_LINES = 500
#: Seconds for the answer about one boot.
_KEPT_LIMIT = 20.0
#: What headlines of a death have in them (:func:`kmend.core.kmsg.is_death` decides).
_DEATHS = r"BUG: |BUG at |Oops: |Kernel panic|general protection fault|\[#[0-9]"
_FIELDS = "MESSAGE,PRIORITY,SYSLOG_FACILITY,_SOURCE_MONOTONIC_TIMESTAMP"
#: What journalctl (systemd 252) says of a boot that its journal does not have.
_UNKNOWN = "is not available"
_BOOT = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True)
class Kept:
    """A kernel message of a former boot. ``time`` is seconds since the epoch, by the clock as it was then."""

    time: float
    message: KernelMessage


def kept(boot: str, names: Iterable[str] = ()) -> tuple[Kept, ...]:
    """What systemd's journal has of a former boot's kernel log, as far as :func:`concerning` would show it.

    ``boot`` is the ``boot_id`` of that kernel. At most :data:`KEPT_LINES`.

    Raises:
        Unable: (rule ``missing-tool``) there is no journalctl. Failed: it does not answer in time.
        Unable: (rule ``unreadable``) it cannot answer.
    """
    number = boot.replace("-", "")
    if not _BOOT.match(number):
        return ()
    begin = (*CONCERNS, *(f"{name}: " for name in sorted(names)))
    pattern = f"^({'|'.join(map(re.escape, begin))})|{_DEATHS}"
    words = ["journalctl", "--quiet", "--no-pager", "--dmesg", f"--boot={number}", "--output=json"]
    words += [f"--output-fields={_FIELDS}", f"--lines={KEPT_LINES}", "--case-sensitive=yes"]
    done = run([*words, f"--grep={pattern}"], check=False, timeout=_KEPT_LIMIT)
    errors = done.errors.strip()
    if done.status and errors and _UNKNOWN not in errors:
        raise Unable(f"systemd's journal does not tell of boot {boot}", why=errors, rule="unreadable")
    return tuple(row for row in _kept(done.text.splitlines()) if _concerns(row.message.text, begin))


def _kept(lines: Iterable[str]) -> Iterator[Kept]:
    """The rows of ``journalctl --output=json`` (systemd.journal-fields(7)); odd ones are left out.

    When a message was kept says little of when it was said: at boot the kernel is far ahead of the journal.
    """
    for line in lines:
        try:
            row = json.loads(line)
            if int(row.get("SYSLOG_FACILITY", 0)) != 0:
                continue  # user space wrote it into the kernel's log
            text = row["MESSAGE"]
            if isinstance(text, list):  # bytes that are no UTF-8
                text = bytes(text).decode(errors="replace")
            elif not isinstance(text, str):  # too long to be shown
                continue
            then, clock = int(row["__REALTIME_TIMESTAMP"]), int(row["__MONOTONIC_TIMESTAMP"])
            said = int(row.get("_SOURCE_MONOTONIC_TIMESTAMP", clock))
            message = KernelMessage(said / 1e6, int(row.get("PRIORITY", 6)), text)
            yield Kept((then - clock + said) / 1e6, message)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
