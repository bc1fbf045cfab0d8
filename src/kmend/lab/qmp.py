"""QEMU's machine protocol, as far as the lab needs it: one command, one answer.

Written by hand because ``qemu.qmp`` brings asyncio, whose import alone costs a fifth
of a start from a snapshot. The protocol: ``docs/interop/qmp-spec.txt`` in QEMU's source.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

from kmend.core.errors import Failed


class Qmp:
    """The client's end of a QMP connection over a connected socket."""

    def __init__(self, connection: socket.socket, timeout: float = 20.0) -> None:
        self._socket = connection
        self._socket.settimeout(timeout)
        self._rest = b""

    def send(self, command: str, fd: int | None = None, **arguments: Any) -> None:
        """Send a command without waiting for its answer; ``fd`` goes along (for ``getfd``)."""
        line = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        try:
            if fd is None:
                self._socket.sendall(line)
            else:
                socket.send_fds(self._socket, [line], [fd])
        except OSError as error:
            raise _gone(str(error)) from error

    def receive(self) -> Any:
        """The answer to the oldest command that has none yet; events are passed over.

        Raises:
            Failed: QEMU refused the command (rule ``qemu``) or is gone.
        """
        for message in self._messages():
            if "error" in message:
                raise Failed(
                    "QEMU refused a command",
                    why=str(message["error"].get("desc", message["error"])),
                    next_step="check that the installed QEMU is version 7.2 or later",
                    rule="qemu",
                )
            if "return" in message:
                return message["return"]
        raise _gone("the connection ended")

    def command(self, command: str, fd: int | None = None, **arguments: Any) -> Any:
        """Send a command and return its answer."""
        self.send(command, fd, **arguments)
        return self.receive()

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            line, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                try:
                    message = json.loads(line)
                except ValueError as error:
                    raise _gone(f"it said {line[:200]!r}") from error
                yield message
                continue
            try:
                data = self._socket.recv(65536)
            except OSError as error:
                raise _gone(str(error)) from error
            if not data:
                return
            self._rest += data


def _gone(why: str) -> Failed:
    return Failed("QEMU's monitor does not answer", why=why, next_step="try again", rule="qemu")
