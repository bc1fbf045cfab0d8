"""What tests do with a livepatch module in a guest: load it, bring its transition to an end, take it back."""

from __future__ import annotations

from pathlib import Path

from kmend.lab.channel import Done
from kmend.lab.guest import Guest

#: Waits for the end of a transition (or for the patch's folder to go); tasks that sleep in a patched function
#: are woken with two signals which they do not notice.
_SETTLE = """
d=/sys/kernel/livepatch/{name}
n=0
while [ -d $d ] && {{ {going}; }}; do
    [ $((n+=1)) -lt 300 ] || exit 99
    for p in /proc/[0-9]*; do
        read -r s <$p/patch_state || continue
        [ "$s" = "{behind}" ] && kill -STOP ${{p#/proc/}} && kill -CONT ${{p#/proc/}}
    done 2>/dev/null
    usleep 100000
done
"""
_MOVING = 'read -r t <$d/transition && [ "$t" = 1 ]'


def load(guest: Guest, module: Path, parameters: str = "") -> Done:
    """Insert a module and wait for its transition. With kmod: busybox tries a refused module twice."""
    path = f"/root/{module.name}"
    guest.put(path, module.read_bytes())
    settle = _SETTLE.format(name=module.stem, going=_MOVING, behind=0)
    return guest.run(f"/usr/sbin/insmod {path} {parameters} || exit\n{settle}", timeout=60)


def unload(guest: Guest, name: str) -> Done:
    """Take the patch back and remove its module."""
    settle = _SETTLE.format(name=name, going="true", behind=1)
    return guest.run(
        f"echo 0 >/sys/kernel/livepatch/{name}/enabled || exit\n{settle}\nrmmod {name}", timeout=60
    )


def said(guest: Guest, since: int = 0) -> list[str]:
    """The kernel's words after the first ``since`` messages."""
    return [message.text for message in guest.dmesg()[since:]]
