"""The running kernel's log, ``/dev/kmsg`` (Documentation/ABI/testing/dev-kmsg)."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

from kmend.core.errors import Unable
from kmend.core.kmsg import KernelMessage
from kmend.runtime.place import Place, not_permitted

#: A record is at most this long (kernel/printk/printk.c, PRINTKRB_RECORD_MAX and CONSOLE_EXT_LOG_MAX: 8192).
RECORD = 8192

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

    def read(self, with_text: bytes = b"") -> tuple[Record, ...]:
        """What came since the last call (at first: everything that the kernel still has).

        Only records that have ``with_text`` in them: a long log need not be taken apart for a few lines.
        """
        found = []
        while self._fd >= 0:
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
    """Those that speak of livepatching or of loading modules; ``names`` of modules count as well."""
    begin = (*CONCERNS, *(f"{name}: " for name in names))
    return tuple(row for row in records if not row.message.user and row.message.text.startswith(begin))


def epoch_of_boot() -> float:
    """Seconds since the epoch when the kernel's log clock was 0.

    The log counts like CLOCK_MONOTONIC, without the time that the machine was suspended: times before a
    suspend come out too late.
    """
    return time.time() - time.monotonic()
