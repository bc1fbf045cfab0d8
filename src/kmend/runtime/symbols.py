"""``/proc/kallsyms``: where the running kernel's symbols lie.

The file has an address, nm's letter, the name and, for a module's symbol, ``[module]``. To users without
CAP_SYSLOG (``kptr_restrict``) all addresses are 0; then nothing can be told from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kmend.core.errors import Unable
from kmend.core.target import VMLINUX
from kmend.runtime.place import Place, not_permitted


@dataclass(frozen=True, slots=True)
class RunningSymbol:
    """A row: run-time address (KASLR included), nm letter, name, ``vmlinux`` or the module."""

    address: int
    type: str
    name: str
    object: str


def named(place: Place, names: Iterable[str]) -> dict[str, tuple[RunningSymbol, ...]]:
    """The symbols of these names, in the kernel's order (``sympos`` 1 is an object's first); one pass.

    Raises:
        Unable: the file cannot be read, or shows no addresses to this user (rule ``not-permitted``).
    """
    wanted = {name.encode() for name in names}
    found: dict[str, list[RunningSymbol]] = {}
    path = place.proc / "kallsyms"
    try:
        with path.open("rb") as file:
            for line in file:
                # the common case first: 160,000 lines are looked at for a few names
                words = line.split(None, 3)
                if len(words) < 3 or words[2] not in wanted:
                    continue
                name = words[2].decode(errors="replace")
                owner = words[3].strip(b"[] \n").decode(errors="replace") if len(words) > 3 else VMLINUX
                found.setdefault(name, []).append(
                    RunningSymbol(int(words[0], 16), words[1].decode(), name, owner)
                )
    except PermissionError as error:
        raise not_permitted(path) from error
    except (OSError, ValueError) as error:
        raise Unable(f"{path} cannot be read", why=str(error), rule="unreadable") from error
    if found and all(row.address == 0 for rows in found.values() for row in rows):
        raise not_permitted(path)
    return {name: tuple(rows) for name, rows in found.items()}
