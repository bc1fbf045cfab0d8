"""Twins: which part of the patched object is which part of the original.

Certain matches come first, each with the level that found it:

``name``     same name and kind; not for the numbered names that GCC makes up itself
``clone``    the only clone of a function on both sides (``foo.part.0`` / ``foo.part.1``)
``counter``  names with a ``__COUNTER__`` in them (``__UNIQUE_ID_…``) and equal contents; lists of type ids
             (``__BTF_ID__…``) as a whole
``use``      numbered static locals that a twin with the same bytes uses at the same place
``only``     the only numbered static local of its name, used by a function of the same name
``order``    several of one name in one function, as many before as after, which the code uses in the
             same order in relation to the order of their declarations
``contents`` read-only text such as ``__func__.12`` that nothing tells apart but what it says
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from kmend.diff.unit import CLONE, NUMBER, Part, PartKind, RefKind, UnitObject, base_name


class Level(Enum):
    NAME = "name"
    CLONE = "clone"
    COUNTER = "counter"
    USE = "use"
    ONLY = "only"
    ORDER = "order"
    CONTENTS = "contents"


@dataclass(frozen=True, slots=True)
class Twins:
    """``original[key of patched]`` is the key in the original; ``level`` says how sure that is.

    ``ambiguous``: numbered static locals of the patched object for which no twin could be
    told although the original has some of that name.
    """

    original: dict[str, str]
    level: dict[str, Level]
    ambiguous: frozenset[str]


_COUNTED = re.compile(r"^(?:__UNIQUE_ID_|__initcall__kmod_|__exitcall_|__setup_)")
_DIGITS = re.compile(r"\d+")
#: A row of a list of type ids (include/linux/btf_ids.h): kind and name of the type, and a ``__COUNTER__``.
_TYPE_ID = re.compile(r"^(__BTF_ID__\w+__)\d+$")
#: What :class:`~kmend.diff.unit.UnitObject` adds to the name of a second symbol of one name.
_NTH = re.compile(r"#\d+$")


def section_class(unit: UnitObject, part: Part) -> str:
    """The part's section without the part of its name that ``-fdata-sections`` adds."""
    name = unit.section_of(part).name
    return name.removesuffix("." + part.name)


def numbered(part: Part) -> bool:
    """Whether GCC numbered the name: a static local variable (``count.3``)."""
    return part.kind is PartKind.DATA and bool(NUMBER.search(part.name))


def _counter_in(part: Part) -> bool:
    """Whether the name was made with a ``__COUNTER__`` (``__setup_root`` of btrfs was not)."""
    if part.kind is PartKind.FUNCTION:
        return part.name.startswith("__UNIQUE_ID_")
    return bool(_COUNTED.match(part.name))


def match(old: UnitObject, new: UnitObject) -> Twins:
    """Find the twins of two objects built from the same unit."""
    original: dict[str, str] = {}
    level: dict[str, Level] = {}
    taken: set[str] = set()

    def pair(new_key: str, old_key: str, how: Level) -> None:
        original[new_key] = old_key
        level[new_key] = how
        taken.add(old_key)

    for key, part in new.parts.items():
        old_key = key if key in old.parts else old.aliases.get(key)
        if old_key is None or numbered(part) or old_key in taken:
            continue
        if _counter_in(part) or _TYPE_ID.match(part.name):
            continue
        if old.parts[old_key].kind is part.kind:
            pair(key, old_key, Level.NAME)
    for new_key, old_key in _sole_clones(old, new, original, taken):
        pair(new_key, old_key, Level.CLONE)
    for new_key, old_key in (*_counted(old, new, taken), *_type_ids(old, new)):
        pair(new_key, old_key, Level.COUNTER)
    locals_ = _Locals(old, new, original)
    for new_key, (old_key, how) in locals_.match().items():
        pair(new_key, old_key, how)
    return Twins(original, level, locals_.ambiguous(original))


def _sole_clones(
    old: UnitObject, new: UnitObject, original: dict[str, str], taken: set[str]
) -> Iterable[tuple[str, str]]:
    def group(parts: Iterable[Part], skip: Iterable[str]) -> dict[tuple[str, bool], list[str]]:
        out: dict[tuple[str, bool], list[str]] = {}
        left_out = set(skip)
        for part in parts:
            if part.key not in left_out and CLONE.search(part.name):
                out.setdefault((base_name(part.name), ".cold" in part.name), []).append(part.key)
        return out

    before = group(old.functions(), taken)
    for name, keys in group(new.functions(), original).items():
        if len(keys) == 1 and len(before.get(name, ())) == 1:
            yield keys[0], before[name][0]


def _counted(old: UnitObject, new: UnitObject, taken: set[str]) -> Iterable[tuple[str, str]]:
    def identity(unit: UnitObject, part: Part) -> tuple[str, str, bytes]:
        return (_DIGITS.sub("#", part.name), _DIGITS.sub("#", unit.section_of(part).name), unit.code(part))

    before: dict[tuple[str, str, bytes], list[str]] = {}
    for part in old.parts.values():
        if _counter_in(part) and part.key not in taken:
            before.setdefault(identity(old, part), []).append(part.key)
    for part in new.parts.values():
        if _counter_in(part):
            keys = before.get(identity(new, part))
            if keys:
                yield part.key, keys.pop(0)


def _type_ids(old: UnitObject, new: UnitObject) -> Iterable[tuple[str, str]]:
    """Rows of lists of type ids, as long as all lists are as they were.

    The same type may stand in several lists, each of which code reads from its start: by name and number
    alone a row could be taken for that of another list.
    """

    def rows(unit: UnitObject) -> list[tuple[str, str]]:
        found = [p for p in unit.variables() if _TYPE_ID.match(p.name)]
        found.sort(key=lambda p: (p.section, p.start))
        return [(_TYPE_ID.sub(r"\1", p.name), p.key) for p in found]

    before, after = rows(old), rows(new)
    if [name for name, _ in before] == [name for name, _ in after]:
        yield from ((b, a) for (_, a), (_, b) in zip(before, after, strict=True))


class _Locals:
    """Numbered static locals."""

    def __init__(self, old: UnitObject, new: UnitObject, original: dict[str, str]) -> None:
        self.old, self.new = old, new
        #: functions and variables whose own twin is certain
        self.users = dict(original)
        self.new_locals = {p.key: p for p in new.variables() if numbered(p)}
        self.old_locals = {p.key: p for p in old.variables() if numbered(p)}
        self.old_uses = self._uses(old, self.old_locals)
        self.new_uses = self._uses(new, self.new_locals)
        self.out: dict[str, tuple[str, Level]] = {}
        self.used: set[str] = set()

    def _uses(self, unit: UnitObject, wanted: dict[str, Part]) -> dict[str, list[tuple[int, str]]]:
        """For each function and variable the numbered locals that it refers to, by place."""
        out: dict[str, list[tuple[int, str]]] = {}
        for user in unit.parts.values():
            section = unit.section_of(user)
            found = []
            for reloc in unit.relocs(user):
                ref = unit.ref(section, reloc)
                if ref.kind is RefKind.PART and ref.name in wanted:
                    found.append((reloc.offset - user.start, ref.name))
            if found:
                out[user.key] = found
        return out

    def _alike(self, new_key: str, old_key: str) -> bool:
        a, b = self.new_locals[new_key], self.old_locals[old_key]
        return (
            base_name(a.name) == base_name(b.name)
            and a.size == b.size
            and section_class(self.new, a) == section_class(self.old, b)
        )

    def match(self) -> dict[str, tuple[str, Level]]:
        while True:
            known = len(self.out)
            self._by_use()
            self._by_name()
            self._by_order()
            if len(self.out) == known:
                break
            # What was found may itself refer to others: compound literals inside of one another.
            self.users.update((new_key, old_key) for new_key, (old_key, _) in self.out.items())
        self._by_contents()
        return self.out

    def _pair(self, new_key: str, old_key: str, how: Level) -> None:
        self.out[new_key] = (old_key, how)
        self.used.add(old_key)

    def _by_use(self) -> None:
        votes: dict[str, set[str]] = {}
        for user, uses in self.new_uses.items():
            twin = self.users.get(user)
            if twin is None or self.new.code(self.new.parts[user]) != self.old.code(self.old.parts[twin]):
                continue
            before = self.old_uses.get(twin, [])
            if [at for at, _ in before] != [at for at, _ in uses]:
                continue
            for (_, new_key), (_, old_key) in zip(uses, before, strict=True):
                votes.setdefault(new_key, set()).add(old_key)
        claimed: dict[str, set[str]] = {}
        for new_key, olds in votes.items():
            for old_key in olds:
                claimed.setdefault(old_key, set()).add(new_key)
        for new_key, olds in votes.items():
            (old_key, *others) = olds
            if new_key in self.out or old_key in self.used:
                continue
            if not others and len(claimed[old_key]) == 1 and self._alike(new_key, old_key):
                self._pair(new_key, old_key, Level.USE)

    def _by_name(self) -> None:
        def users(uses: dict[str, list[tuple[int, str]]]) -> dict[str, set[str]]:
            who: dict[str, set[str]] = {}
            for user, rows in uses.items():
                for _, key in rows:
                    who.setdefault(key, set()).add(base_name(user))
            return who

        def groups(parts: dict[str, Part], skip: Iterable[str]) -> dict[str, list[str]]:
            by_base: dict[str, list[str]] = {}
            for key, part in parts.items():
                if key not in skip:
                    by_base.setdefault(base_name(part.name), []).append(key)
            return by_base

        old_users, new_users = users(self.old_uses), users(self.new_uses)
        before = groups(self.old_locals, self.used)
        for name, keys in groups(self.new_locals, self.out).items():
            olds = before.get(name, [])
            if len(keys) == len(olds) == 1 and self._alike(keys[0], olds[0]):
                shared = new_users.get(keys[0], set()) & old_users.get(olds[0], set())
                neither = keys[0] not in new_users and olds[0] not in old_users
                if shared or neither:
                    self._pair(keys[0], olds[0], Level.ONLY)
            elif new_users.keys().isdisjoint(keys) and old_users.keys().isdisjoint(olds):
                # Nobody could tell one from another that no code and no data leads to.
                for key in keys:
                    if key in olds and self._alike(key, key):
                        self._pair(key, key, Level.ONLY)

    def _by_order(self) -> None:
        for user, uses in self.new_uses.items():
            twin = self.users.get(user)
            if twin is None:
                continue
            left_new = _in_order(key for _, key in uses if key not in self.out)
            left_old = _in_order(key for _, key in self.old_uses.get(twin, ()) if key not in self.used)
            for name in _in_order(base_name(self.new_locals[k].name) for k in left_new):
                news = [k for k in left_new if base_name(self.new_locals[k].name) == name]
                olds = [k for k in left_old if base_name(self.old_locals[k].name) == name]
                if (
                    len(news) == len(olds)
                    and _ranks(news) == _ranks(olds)
                    and all(self._alike(a, b) for a, b in zip(news, olds, strict=True))
                ):
                    for new_key, old_key in zip(news, olds, strict=True):
                        self._pair(new_key, old_key, Level.ORDER)

    def _by_contents(self) -> None:
        for key, part in self.new_locals.items():
            if key in self.out or self.new.section_of(part).writable or self.new.relocs(part):
                continue
            for old_key, old_part in self.old_locals.items():
                if (
                    old_key not in self.used
                    and self._alike(key, old_key)
                    and not self.old.relocs(old_part)
                    and self.new.code(part) == self.old.code(old_part)
                ):
                    self._pair(key, old_key, Level.CONTENTS)
                    break

    def ambiguous(self, original: dict[str, str]) -> frozenset[str]:
        taken = set(original.values())
        left = {base_name(p.name) for k, p in self.old_locals.items() if k not in taken}
        return frozenset(
            key
            for key, part in self.new_locals.items()
            if key not in original and base_name(part.name) in left
        )


def _ranks(keys: list[str]) -> list[int]:
    """For each numbered name its place among them by number: GCC numbers in the order of declaration."""
    numbers = [(len(digits := _digits(key)), digits) for key in keys]
    return [sorted(numbers).index(number) for number in numbers]


def _digits(key: str) -> str:
    """The number behind a name (``3`` of ``count.3`` and of ``count.3#2``) as it is written, for comparing.

    As text, in the order of numbers by its length first: a name may hold more digits than a number may.
    """
    found = NUMBER.search(_NTH.sub("", key))
    return found[0][1:].lstrip("0") if found else ""


def _in_order(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(keys))
