"""``kmend.toml``: what a folder of hand-written replacement functions is to become.

    name = "my_fix"                    # the module; without it the folder's name
    replace = true                     # take the place of older livepatches (the default)

    [[object]]
    name = "vmlinux"                   # or a module's name; vmlinux is the default
    file = "zfs.ko"                    # of a module that is not one of the kernel's own: the module itself
    callbacks = { pre_patch = "fn" }   # and post_patch, pre_unpatch, post_unpatch

    [[object.func]]
    old_name = "vfs_read"
    new_func = "livepatch_vfs_read"    # the default: livepatch_ and the old name
    sympos = 0                         # which of several symbols of that name, from 1

    [[state]]
    id = 1
    version = 1

    [symbols]                          # where names that the kernel does not export lead
    helper = { object = "ext4", sympos = 2 }

The words are those of ``struct klp_patch`` (include/linux/livepatch.h).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from kmend.core.errors import UsageError
from kmend.core.target import MAX_MODULE_NAME, VMLINUX
from kmend.diff.declared import CallbackKind

FILE = "kmend.toml"
#: What a replacement is called when the descriptor does not say it, as in samples/livepatch.
PREFIX = "livepatch_"

T = TypeVar("T")

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SYMBOL = re.compile(r"[A-Za-z_.$][A-Za-z0-9_.$]*")


@dataclass(frozen=True, slots=True)
class FuncSpec:
    """A function to be replaced: ``sympos`` 0 says that the object has one symbol of the name."""

    old_name: str
    new_func: str
    sympos: int = 0


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """``vmlinux`` or a module (underscores), with what is replaced and called.

    ``file`` is the path of the module's own ``.ko``, seen from the descriptor's folder; empty: the target
    has the module.
    """

    name: str
    funcs: tuple[FuncSpec, ...] = ()
    callbacks: tuple[tuple[CallbackKind, str], ...] = ()
    file: str = ""


@dataclass(frozen=True, slots=True)
class SymbolSpec:
    """Where a name leads: ``object`` empty: wherever it is found."""

    object: str = ""
    sympos: int = 0


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The whole file. ``name`` and ``sources`` are empty where the file leaves them out."""

    name: str = ""
    replace: bool = True
    description: str = ""
    sources: tuple[str, ...] = ()
    cflags: tuple[str, ...] = ()
    objects: tuple[ObjectSpec, ...] = ()
    states: tuple[tuple[int, int], ...] = ()
    symbols: Mapping[str, SymbolSpec] = field(default_factory=dict)


def parse(text: str, place: str) -> Descriptor:
    """Read a descriptor; ``place`` names it in messages.

    Raises:
        UsageError: (rule ``bad-descriptor``) no TOML, an unknown key, a wrong type, a name that is none.
    """
    try:
        top = _Table(tomllib.loads(text), place, place)
    except ValueError as error:  # no TOML; also a number of more digits than Python takes
        raise bad_descriptor(place, str(error), "mend the line") from error
    except RecursionError:
        raise bad_descriptor(place, "its values are nested too deeply", "mend the line") from None
    descriptor = Descriptor(
        name=top.get("name", str, ""),
        replace=top.get("replace", bool, True),
        description=top.get("description", str, ""),
        sources=top.texts("sources"),
        cflags=top.texts("cflags"),
        objects=tuple(_object(row) for row in top.tables("object")),
        states=tuple((row.need("id", int), row.get("version", int, 0)) for row in top.closed("state")),
        symbols={
            name: SymbolSpec(_module(row, "object", ""), row.position())
            for name, row in top.named("symbols").items()
        },
    )
    top.done()
    names = [row.name for row in descriptor.objects]
    for name in names:
        if names.count(name) > 1:
            raise bad_descriptor(place, f"the object {name} is there twice", "join the two")
    return descriptor


def bad_descriptor(place: str, why: str, next_step: str) -> UsageError:
    """The error of a descriptor that cannot be used."""
    return UsageError(f"{place} is no usable descriptor", why=why, next_step=next_step, rule="bad-descriptor")


def _object(row: _Table) -> ObjectSpec:
    callbacks = row.table("callbacks")
    called = []
    for kind in CallbackKind:
        if function := callbacks.get(kind.value, str, ""):
            called.append((kind, callbacks.identifier(kind.value, function)))
    callbacks.done()
    spec = ObjectSpec(
        _module(row, "name", VMLINUX),
        tuple(_func(f) for f in row.tables("func")),
        tuple(called),
        row.get("file", str, ""),
    )
    row.done()
    if spec.file and spec.name == VMLINUX:
        raise row.bad("file is for a module; vmlinux is the kernel itself")
    return spec


def _func(row: _Table) -> FuncSpec:
    old = row.need("old_name", str)
    if not _SYMBOL.fullmatch(old):
        raise row.bad(f"{old!r} is no name of a function")
    # GCC's clones have dots in their names, which no C function can have
    new = row.get("new_func", str, PREFIX + old.replace(".", "_"))
    spec = FuncSpec(old, row.identifier("new_func", new), row.position())
    row.done()
    return spec


def _module(row: _Table, key: str, default: str) -> str:
    name = row.get(key, str, default).replace("-", "_")
    if name and (not re.fullmatch(r"\w+", name, re.ASCII) or len(name) > MAX_MODULE_NAME):
        raise row.bad(f"{key} = {name!r} is neither vmlinux nor a module's name")
    return name


class _Table:
    """A table of the file, whose keys are taken out one by one; what is left at the end is unknown."""

    def __init__(self, values: Mapping[str, object], where: str, place: str) -> None:
        self._values = dict(values)
        self._known: list[str] = []
        self._where, self._place = where, place

    def bad(self, why: str) -> UsageError:
        where = "" if self._where == self._place else f"{self._where}: "
        return bad_descriptor(self._place, where + why, "see `kmend module --help` and docs/by-hand.md")

    def get(self, key: str, kind: type[T], default: T) -> T:
        self._known.append(key)
        value = self._values.pop(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.bad(f"{key} is not of type {kind.__name__}")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        if key not in self._values:
            raise self.bad(f"{key} is missing")
        return self.get(key, kind, kind())

    def identifier(self, key: str, name: str) -> str:
        if not _IDENTIFIER.fullmatch(name):
            raise self.bad(f"{key} = {name!r} is no name of a C function")
        return name

    def position(self) -> int:
        number = self.get("sympos", int, 0)
        if number < 0:
            raise self.bad(f"sympos = {number}: positions count from 1, 0 is for a name that is there once")
        return number

    def texts(self, key: str) -> tuple[str, ...]:
        rows = self.get(key, list, [])
        if not all(isinstance(row, str) for row in rows):
            raise self.bad(f"{key} is not a list of strings")
        return tuple(str(row) for row in rows)

    def table(self, key: str) -> _Table:
        return _Table(self.get(key, dict, {}), key, self._place)

    def named(self, key: str) -> dict[str, _Table]:
        """A table of tables; each is complete once its fields were read."""
        out = {}
        for name, value in self.get(key, dict, {}).items():
            # `name = 2` is short for a position in the one object that has it
            row = {"sympos": value} if isinstance(value, int) and not isinstance(value, bool) else value
            if not isinstance(row, dict) or not set(row) <= {"object", "sympos"}:
                raise self.bad(f"{key}.{name} is neither a position nor a table of object and sympos")
            out[str(name)] = _Table(row, f"{key}.{name}", self._place)
        return out

    def tables(self, key: str) -> list[_Table]:
        rows = self.get(key, list, [])
        if not all(isinstance(row, dict) for row in rows):
            raise self.bad(f"{key} is not a list of tables: write [[{key}]]")
        return [_Table(row, f"{key} {number}", self._place) for number, row in enumerate(rows, 1)]

    def closed(self, key: str) -> list[_Table]:
        """Tables of ``id`` and ``version`` alone."""
        rows = self.tables(key)
        for row in rows:
            if unknown := set(row._values) - {"id", "version"}:
                raise row.bad(f"unknown key {sorted(unknown)[0]!r}; known: id, version")
        return rows

    def done(self) -> None:
        """Raise when a key is left that nobody asked for."""
        if self._values:
            raise self.bad(f"unknown key {min(self._values)!r}; known: {', '.join(self._known)}")
