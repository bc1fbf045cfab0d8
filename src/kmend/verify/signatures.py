"""Did the prototype of a function change in a way that a caller which stays as it is would notice?

Callers in a unit that was compiled anew for the patch are right by themselves: their code is either the
same for both prototypes, or they are replaced too. The others hand over what the old function took.
"""

from __future__ import annotations

from kmend.verify.types import Parameter, Prototype

_ANY_POINTER = "pointer"


def changed(old: Prototype, new: Prototype) -> str | None:
    """What a caller of the old function would do wrongly, in words; None: nothing.

    Not changes: another name of a parameter, a number's sign, ``void *`` for another pointer, and a value
    returned where there was none.
    """
    before, after = old.parameters, new.parameters
    names, now = [p.name for p in before], [p.name for p in after]
    if len(after) != len(before):
        if len(after) > len(before):
            at = next((i for i, p in enumerate(after) if p.name not in names), len(before))
            return f"its parameter {_called(after[at], at)} is new: callers do not set it"
        at = next((i for i, p in enumerate(before) if p.name not in now), len(after))
        return f"its parameter {_called(before[at], at)} is gone: callers still hand it over"
    for at, (x, y) in enumerate(zip(before, after, strict=True)):
        if not _alike(x, y):
            return f"its parameter {_called(y, at)} was {x.type} and is {y.type}"
    if names != now and sorted(names) == sorted(now) and len(set(names)) == len(names):
        at = next(i for i, (x, y) in enumerate(zip(names, now, strict=True)) if x != y)
        return f"its parameters have changed places: number {at + 1} was {names[at]} and is {now[at]}"
    if old.returns.type == "void" and not new.returns.type.startswith(("struct", "union")):
        return None
    if not _alike(old.returns, new.returns):
        return f"it returned {old.returns.type} and returns {new.returns.type}"
    return None


def _called(parameter: Parameter, at: int) -> str:
    return parameter.name or f"number {at + 1}"


def _alike(x: Parameter, y: Parameter) -> bool:
    if x.type == y.type:
        return True
    pointers = all(p.type.startswith("pointer") or p.type.endswith(" *") for p in (x, y))
    return pointers and _ANY_POINTER in (x.type, y.type)
