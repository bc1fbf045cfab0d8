"""kmend itself inside a guest, as its user there runs it: root, the guest's own /run and /var."""

from __future__ import annotations

import importlib.metadata
import io
import json
import shlex
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import kmend
from kmend.core.target import Target
from kmend.lab.channel import Done
from kmend.lab.guest import Guest

PLACE = "/opt/kmend"
#: The host's own interpreter: that of the checkout need not lie below /usr.
_COMMAND = f"""#!/bin/sh
PYTHONPATH={PLACE} exec /usr/bin/python3 -m kmend "$@"
"""


#: What the views import beside kmend: the guest's own Python has none of it.
VIEWS = ("rich", "markdown-it-py", "mdurl", "jinja2", "markupsafe")


def settle(guest: Guest, libraries: Iterable[str] = ()) -> None:
    """Bring kmend's code into the guest, and these distributions of the host's environment."""
    root = Path(kmend.__file__).parent
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".txt", ".h", ".c", ".html"):
                archive.add(path, f"kmend/{path.relative_to(root)}", recursive=False)
        for name in libraries:
            for file in importlib.metadata.distribution(name).files or ():
                place = Path(str(file.locate()))
                if ".." not in file.parts and "__pycache__" not in file.parts and place.is_file():
                    archive.add(place, str(file))
    guest.run(f"mkdir -p {PLACE} && tar -C {PLACE} -xf -", stdin=out.getvalue(), check=True)
    guest.put("/usr/local/bin/kmend", _COMMAND.encode(), 0o755)


def boot_image(guest: Guest, target: Target) -> None:
    """The kernel's image in the guest's ``/boot``, where a machine that boots by itself has it."""
    assert target.vmlinuz is not None
    guest.put(f"/boot/vmlinuz-{target.release}", target.vmlinuz.read_bytes())


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
