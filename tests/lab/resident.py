"""kmend in a guest, imported once: each action is a fork of one process that stays.

Under TCG Python's start and kmend's imports take seconds, and most of what a test would wait for. What a fork
does is what the command does: ``main()`` with the words of the command line, its own standard output, its
exit status; a process of its own, which can be killed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import inside

from kmend.lab.guest import Guest

#: What runs in the guest. Requests come as JSON lines through a fifo, one process is forked for each; its
#: answer goes through a fifo of its own, so that several may be under way.
SERVER = """
import contextlib, json, os, signal, sys, traceback
sys.path.insert(0, "/opt/kmend")
import kmend.cli, kmend.cli.acting, kmend.cli.install, kmend.cli.load_, kmend.cli.log, kmend.cli.list_
import kmend.cli.blockers, kmend.cli.status, kmend.cli.unload, kmend.elf.reader, kmend.installer
import kmend.kernel.prepared, kmend.manager, kmend.module.describe, kmend.plan, kmend.report.action
import kmend.report.live, kmend.running, kmend.verify.provenance, kmend.view

def serve(request):
    number = request["id"]
    os.close(1), os.close(2)
    os.open(f"/run/ask/{number}.out", os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_APPEND)
    os.open(f"/run/ask/{number}.err", os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_APPEND)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    status = 99
    try:
        if "code" in request:
            exec(request["code"], {"__name__": "asked"})
            status = 0
        else:
            sys.argv = ["kmend", *request["words"]]
            status = kmend.cli.main(request["words"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    return status

signal.signal(signal.SIGINT, signal.default_int_handler)
# opened for writing too: without that a fifo ends whenever nobody writes
for line in os.fdopen(os.open("/run/ask/in", os.O_RDWR)):
    request = json.loads(line)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    if os.fork():
        continue
    # a second one, which is waited for and may be killed
    pid = os.fork()
    if pid == 0:
        os._exit(serve(request))
    with open(f"/run/ask/{request['id']}.pid", "w") as out:
        out.write(str(pid))
    _, how = os.waitpid(pid, 0)
    with open(f"/run/ask/{request['id']}", "w") as out:
        out.write(str(os.waitstatus_to_exitcode(how)))
    os._exit(0)
"""
_START = """
mkdir -p /run/ask && mkfifo /run/ask/in
LANGUAGE=C setsid /usr/bin/python3 /root/resident.py </dev/null >/root/resident.log 2>&1 &
"""


@dataclass(frozen=True)
class Answer:
    """How one ended: exit status (negative: the signal), what it wrote."""

    status: int
    text: str
    errors: str

    def document(self, what: object) -> dict[str, Any]:
        """Its one JSON document, with the exit status in it."""
        try:
            found = json.loads(self.text)
        except ValueError as error:
            raise AssertionError(f"{what}: status {self.status}\n{self.text}\n{self.errors}") from error
        assert isinstance(found, dict)
        return {**found, "status": self.status}


class Resident:
    """kmend, resident in a guest."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._number = 0
        inside.settle(guest)
        guest.put("/root/resident.py", SERVER.encode())
        guest.run(_START, check=True)

    def begin(self, *words: str, code: str | None = None) -> int:
        """Start an action (or ``code`` in its place) and return its number."""
        self._number += 1
        request = {"id": self._number, "words": words} if code is None else {"id": self._number, "code": code}
        self.guest.run(
            f"mkfifo /run/ask/{self._number} && cat >/run/ask/in",
            stdin=json.dumps(request).encode() + b"\n",
            check=True,
            timeout=120,
        )
        return self._number

    def end(self, number: int, timeout: float = 300.0) -> Answer:
        """Wait for an action's end."""
        name = f"/run/ask/{number}"
        done = self.guest.run(
            f"cat {name}; echo; cat {name}.out; printf '\\0'; cat {name}.err; rm {name} {name}.*",
            check=True,
            timeout=timeout,
        )
        status, _, rest = done.stdout.decode(errors="replace").partition("\n")
        text, _, errors = rest.partition("\0")
        return Answer(int(status), text, errors)

    def ask(self, *words: str, timeout: float = 300.0) -> Answer:
        """An action from its beginning to its end."""
        return self.end(self.begin(*words), timeout)

    def answer(self, *words: str, timeout: float = 300.0) -> dict[str, Any]:
        """The same with ``--json``."""
        return self.ask(*words, "--json", timeout=timeout).document(words)

    def act(self, *words: str) -> dict[str, Any]:
        """An acting verb; the first of its actions, with the exit status."""
        return first(self.answer(*words))

    def run(self, code: str, timeout: float = 300.0) -> Answer:
        """Python code in a fork, with kmend imported."""
        found = self.end(self.begin(code=code), timeout)
        assert found.status == 0, found
        return found


def first(found: dict[str, Any]) -> dict[str, Any]:
    """The first action of a report; the report itself when it did not come as far as that."""
    if "actions" not in found:
        return found
    return {**found["actions"][0], "status": found["status"], "all": found["actions"]}
