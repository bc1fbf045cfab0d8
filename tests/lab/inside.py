"""kmend itself inside a guest, as its user there runs it: root, the guest's own /run and /var."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from pathlib import Path
from typing import Any

import kmend
from kmend.lab.channel import Done
from kmend.lab.guest import Guest

PLACE = "/opt/kmend"
#: The host's own interpreter: that of the checkout need not lie below /usr.
_COMMAND = f"""#!/bin/sh
PYTHONPATH={PLACE} exec /usr/bin/python3 -m kmend "$@"
"""


def settle(guest: Guest) -> None:
    """Bring kmend's code into the guest."""
    root = Path(kmend.__file__).parent
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".txt", ".h", ".c"):
                archive.add(path, f"kmend/{path.relative_to(root)}", recursive=False)
    guest.run(f"mkdir -p {PLACE} && tar -C {PLACE} -xf -", stdin=out.getvalue(), check=True)
    guest.put("/usr/local/bin/kmend", _COMMAND.encode(), 0o755)


def ask(guest: Guest, *words: str, timeout: float = 120.0) -> Done:
    """Run kmend there."""
    return guest.run(f"kmend {shlex.join(words)}", timeout=timeout)


def answer(guest: Guest, *words: str, timeout: float = 120.0) -> dict[str, Any]:
    """Run kmend there with ``--json`` and read what it says, whatever its exit status."""
    done = ask(guest, *words, "--json", timeout=timeout)
    try:
        document = json.loads(done.stdout)
    except ValueError as error:
        raise AssertionError(f"kmend {words}: status {done.status}\n{done.text}\n{done.errors}") from error
    assert isinstance(document, dict)
    return {**document, "status": done.status}
