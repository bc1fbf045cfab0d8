"""Standard streams that end nothing: a full disk or a closed descriptor costs the words, not what is done.

An action on the kernel is done when its outcome is to be printed. That this fails is told apart from it, and
changes neither what was done nor the exit status of a verb that acts.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

#: Names in a patch may be any bytes; a print of one must not end in a second error.
_ODD = "backslashreplace"


class _Raw(io.RawIOBase):
    """A descriptor that swallows what cannot be written, and keeps why. A reader that went away is another
    matter (:class:`BrokenPipeError`)."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.trouble = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type] # io's own word for anything with bytes
        try:
            return os.write(self.number, view)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.trouble = error.strerror or str(error)
            return view.nbytes


@contextmanager
def careful() -> Iterator[list[str]]:
    """Have :data:`sys.stdout` and :data:`sys.stderr` never fail but for a reader that went away.

    Yields a list that tells at the end what was wrong with standard output. Streams that somebody has put in
    their place stay, but for what they do about odd names.
    """
    _open_all()
    troubles: list[str] = []
    former = (sys.stdout, sys.stderr)
    mine: list[tuple[_Raw, TextIO]] = []
    if sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__:
        for number, stream in enumerate(former, 1):
            with suppress(OSError, ValueError):
                stream.flush()
            raw = _Raw(number)
            mine.append((raw, _text(raw, stream)))
        sys.stdout, sys.stderr = (row for _, row in mine)
    else:
        for stream in former:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=_ODD)
    try:
        yield troubles
    finally:
        for raw, stream in mine:
            try:
                stream.flush()
            finally:
                sys.stdout, sys.stderr = former
                if raw.trouble and raw.number == 1:
                    troubles.append(raw.trouble)


def _text(raw: _Raw, like: TextIO) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding,
        errors=_ODD,
        line_buffering=raw.number == 2 or raw.isatty(),
    )


def _open_all() -> None:
    """Open what is closed of the three descriptors: else the next file that is opened is one of them."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            stream = os.fdopen(number, mode, encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
