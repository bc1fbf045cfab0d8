"""``/proc/kcore``: the running kernel's own memory, as an ELF core file (fs/proc/kcore.c)."""

from __future__ import annotations

import os
import struct
from types import TracebackType
from typing import Self

from kmend.core.errors import Unable
from kmend.runtime.place import Place, not_permitted

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1


class RunningMemory:
    """Reads by run-time address. Use as a context manager."""

    def __init__(self, place: Place) -> None:
        """
        Raises:
            Unable: the kernel has no such file, or does not let it be read (needs CAP_SYS_RAWIO; lockdown
                in its mode ``confidentiality`` forbids it).
        """
        path = place.proc / "kcore"
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            head = os.pread(self._fd, _EHDR.size, 0)
            fields = _EHDR.unpack(head)
            rows = os.pread(self._fd, fields[10] * _PHDR.size, fields[5])
        except PermissionError as error:
            self.close()
            raise not_permitted(path) from error
        except (OSError, struct.error) as error:
            self.close()
            raise Unable(
                f"the running kernel's memory cannot be read: {path}", why=str(error), rule="no-kcore"
            ) from error
        self._segments = tuple(
            (row[3], row[6], row[2]) for row in _PHDR.iter_unpack(rows) if row[0] == _PT_LOAD
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes from a run-time address.

        Raises:
            Unable: (rule ``no-kcore``) they are not in the kernel's memory, or cannot be read.
        """
        for start, length, offset in self._segments:
            if start <= address and address + size <= start + length:
                try:
                    data = os.pread(self._fd, size, offset + address - start)
                except OSError as error:
                    raise self._unreadable(address, str(error)) from error
                if len(data) == size:
                    return data
        raise self._unreadable(address, "no part of the file has that address")

    def _unreadable(self, address: int, why: str) -> Unable:
        return Unable(
            f"the running kernel's memory at {address:#x} cannot be read",
            why=why,
            next_step="the kernel's configuration decides what /proc/kcore shows",
            rule="no-kcore",
        )
