"""The host's side of the agent's protocol (``agent.sh`` has the frames) over one virtio-serial port."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple


class Done(NamedTuple):
    """A command that ended in the guest: exit status (128 + signal when one ended it) and its output."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, without the last line's end."""
        return self.stdout.decode(errors="replace").rstrip("\n")

    @property
    def errors(self) -> str:
        """Standard error as text, without the last line's end."""
        return self.stderr.decode(errors="replace").rstrip("\n")


class Hangup(Exception):
    """The other end is gone, or speaks no sense. The guest's owner turns it into an error of the tree."""


class Expired(Exception):
    """No answer yet. The command still runs, and :meth:`Channel.wait` may go on waiting."""


class Channel:
    """One port. One command at a time."""

    #: Longest time between two looks at ``watch``, in seconds.
    TICK = 0.25

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._rest = b""
        self._number = 0

    def send(self, script: str, stdin: bytes, deadline: float) -> None:
        """Have the guest's shell run ``script``. ``deadline`` is of :func:`time.monotonic`.

        Raises:
            Hangup: the guest is gone, or did not take the command in time.
        """
        text = script.encode("utf-8", "surrogateescape") or b":"
        self._number += 1
        data = memoryview(b"run %d %d %d\n%s%s" % (self._number, len(text), len(stdin), text, stdin))
        while data:
            if not self._ready(select.POLLOUT, deadline):
                raise Hangup("it takes no more commands")
            try:
                data = data[self._socket.send(data[:65536]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Hangup("its connection ended") from error

    def wait(self, deadline: float, watch: Callable[[], None] | None = None) -> Done:
        """The answer to what was sent last. ``watch`` is called about every :attr:`TICK` and may raise.

        Raises:
            Expired: no complete answer before ``deadline``. Hangup: there will be none.
        """
        while True:
            if (done := self._answer()) is not None:
                return done
            soon = min(deadline, monotonic() + self.TICK)
            if self._ready(select.POLLIN, soon):
                try:
                    data = self._socket.recv(1 << 20)
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise Hangup("its connection ended") from error
                if not data:
                    raise Hangup("its connection ended")
                self._rest += data
            elif monotonic() >= deadline:
                raise Expired
            if watch is not None:
                watch()

    def _answer(self) -> Done | None:
        """The answer to the latest command, once all of it is here; older ones are dropped."""
        while True:
            head, newline, body = self._rest.partition(b"\n")
            if not newline:
                return None
            words = head.split()
            if len(words) != 5 or words[0] != b"done" or not all(word.isdigit() for word in words[1:]):
                raise Hangup(f"it answered {head[:80]!r}")
            number, status, out, err = (int(word) for word in words[1:])
            if len(body) < out + err:
                return None
            self._rest = body[out + err :]
            if number == self._number:
                return Done(status, body[:out], body[out : out + err])

    def _ready(self, event: int, deadline: float) -> bool:
        try:
            poll = select.poll()
            poll.register(self._socket, event)
            return bool(poll.poll(max(0.0, deadline - monotonic()) * 1000))
        except (OSError, ValueError) as error:  # closed by another thread: fileno() is -1
            raise Hangup("its connection ended") from error
