"""The target's modules: name to file, what each defines, what each needs.

:func:`build_index` reads every ``.ko`` once, when the target is prepared, and leaves two text
files in the target's folder: ``modules.txt`` (a row per module) and ``module-symbols.txt`` (a
row per defined function or variable, sorted by name, searched in place). Dependencies come
from each module's own ``depends=`` (modpost wrote it from the same symbol references that
depmod follows), so that no ``modules.dep`` is needed.

Names: the kernel knows a module by ``KBUILD_MODNAME``, dashes as underscores; files keep the
dashes. Every function here takes either spelling.
"""

from __future__ import annotations

import lzma
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kmend.core.errors import Failed
from kmend.core.files import write_atomically
from kmend.core.progress import Progress
from kmend.core.target import ModuleFile, Target
from kmend.kernel import zstd
from kmend.kernel.symvers import module_name

INDEX = "modules.txt"
SYMBOLS = "module-symbols.txt"
_UNPACKED = "modules"

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_SHT_SYMTAB = 2
_STT_OBJECT, _STT_FUNC = 1, 2
_SHN_LORESERVE = 0xFF00
_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """A row of the index. ``file`` is relative to the modules folder; ``depends`` and ``softdep_pre``
    are names with underscores, of modules that must (should) be loaded before."""

    name: str
    file: str
    depends: tuple[str, ...]
    softdep_pre: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleSymbol:
    """A function or variable that a module defines; ``is_local``: it has local binding (``static``)."""

    name: str
    module: str
    is_function: bool
    is_local: bool


@dataclass(frozen=True, slots=True)
class _Parsed:
    modinfo: tuple[tuple[str, str], ...]
    symbols: tuple[tuple[str, str], ...]  # name, one of F f O o (lower case: local)


def _bad(name: str, why: str) -> Failed:
    return Failed(
        f"{name} is no usable kernel module",
        why=why,
        next_step="unpack the image package again: `kmend kernel fetch RELEASE`",
        rule="bad-module",
    )


def unpack(path: Path) -> bytes:
    """A module's ELF bytes; ``.xz``, ``.zst`` and ``.gz`` files (kmod's formats) are decompressed.

    Raises:
        Failed: (rule ``bad-module``) it cannot be read or is damaged.
        Unable: no decompressor for its format is installed.
    """
    try:
        data = path.read_bytes()
        match path.suffix:
            case ".xz":
                return lzma.decompress(data)
            case ".gz":
                import gzip  # noqa: PLC0415 - rare

                return gzip.decompress(data)
            case ".zst":
                return zstd.decompress(data)
            case _:
                return data
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise _bad(str(path), str(error)) from error


def _parse(data: bytes, name: str) -> _Parsed:
    """Section headers, ``.modinfo`` and the symbol table; only what the index holds."""
    if len(data) < _EHDR.size or data[:5] != b"\x7fELF\x02":
        raise _bad(name, "it does not begin with a 64-bit ELF header")
    head = _EHDR.unpack_from(data)
    shoff, entsize, count, names_at = head[6], head[11], head[12], head[13]
    if entsize != _SHDR.size or shoff + count * _SHDR.size > len(data) or names_at >= count:
        raise _bad(name, "its section headers lie outside of it: truncated?")
    rows = list(_SHDR.iter_unpack(data[shoff : shoff + count * _SHDR.size]))
    if any(row[1] not in (0, 8) and row[4] + row[5] > len(data) for row in rows):
        raise _bad(name, "a section's contents lie outside of it: truncated?")
    titles = data[rows[names_at][4] : rows[names_at][4] + rows[names_at][5]]
    modinfo: list[tuple[str, str]] = []
    symbols: list[tuple[str, str]] = []
    for row in rows:
        if row[1] == _SHT_SYMTAB and row[6] < count and row[5] % _SYM.size == 0:
            strings = rows[row[6]]
            text = data[strings[4] : strings[4] + strings[5]]
            for st_name, info, _, shndx, _, _ in _SYM.iter_unpack(data[row[4] : row[4] + row[5]]):
                kind = info & 15
                if 0 < shndx < _SHN_LORESERVE and kind in (_STT_FUNC, _STT_OBJECT):
                    letter = "F" if kind == _STT_FUNC else "O"
                    end = text.find(b"\0", st_name)
                    symbols.append(
                        (
                            text[st_name:end].decode("utf-8", "replace"),
                            letter if info >> 4 else letter.lower(),
                        )
                    )
        elif titles[row[0] : titles.find(b"\0", row[0])] == b".modinfo":
            for item in data[row[4] : row[4] + row[5]].split(b"\0"):
                key, mark, value = item.decode("utf-8", "replace").partition("=")
                if mark:
                    modinfo.append((key, value))
    return _Parsed(tuple(modinfo), tuple(symbols))


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            if name.endswith(_SUFFIXES):
                yield Path(folder) / name


def build_index(target: Target, progress: Progress) -> None:
    """Read every module of the target and write the index. Some 4,000 modules take a few seconds.

    A target without modules (``modules=None``) gets an empty index.

    Raises:
        Failed: a module is damaged, or two files have the same module name.
    """
    progress.step(f"indexing the modules of {target.release}")
    rows: list[str] = []
    symbols: list[str] = []
    seen: dict[str, Path] = {}
    files = list(_files(target.modules / "kernel")) if target.modules else []
    for i, path in enumerate(files):
        if i % 64 == 0:
            progress.amount(i, len(files))
        name = module_name(path.name)
        if name in seen:
            raise _bad(str(path), f"{seen[name]} has the same module name {name}")
        seen[name] = path
        parsed = _parse(unpack(path), str(path))
        depends, pre = "", ""
        for key, value in parsed.modinfo:
            if key == "depends":
                depends = ",".join(module_name(d) for d in value.split(",") if d)
            elif key == "softdep":
                pre = ",".join(filter(None, (pre, _softdep_pre(value))))
        assert target.modules is not None
        rows.append(f"{name}\t{path.relative_to(target.modules)}\t{depends}\t{pre}\n")
        symbols.extend(f"{symbol}\t{letter}\t{name}\n" for symbol, letter in parsed.symbols if symbol)
    symbols.sort()
    write_atomically(target.folder / SYMBOLS, "".join(symbols).encode())
    write_atomically(target.folder / INDEX, "".join(sorted(rows)).encode())
    progress.amount(len(files), len(files))


def _softdep_pre(value: str) -> str:
    """The ``pre:`` part of a ``MODULE_SOFTDEP`` (``pre: a b post: c``), joined by commas."""
    out, taking = [], False
    for word in value.split():
        if word in ("pre:", "post:"):
            taking = word == "pre:"
        elif taking:
            out.append(module_name(word))
    return ",".join(out)


def _index(target: Target) -> dict[str, ModuleInfo]:
    path = target.folder / INDEX
    try:
        status = path.stat()
        return _parse_index(path, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError) as error:
        raise Failed(
            f"{path} (the index of modules) cannot be read",
            why=str(error),
            next_step="prepare the target again: `kmend kernel fetch RELEASE`",
            rule="no-module-index",
        ) from error


@lru_cache(maxsize=4)
def _parse_index(path: Path, _mtime: int, _size: int) -> dict[str, ModuleInfo]:
    out = {}
    for row in path.read_text().splitlines():
        name, file, depends, pre = row.split("\t")
        out[name] = ModuleInfo(name, file, _names(depends), _names(pre))
    return out


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def all_modules(target: Target) -> tuple[ModuleInfo, ...]:
    """Every module of the target, by name.

    Raises:
        Failed: (rule ``no-module-index``) the target was not prepared to its end.
    """
    return tuple(_index(target).values())


def find(target: Target, name: str) -> ModuleInfo | None:
    """The index row of a module (either spelling), or None when the target has no such module."""
    return _index(target).get(module_name(name))


def module_file(target: Target, name: str) -> ModuleFile:
    """The module's uncompressed ``.ko``; a compressed one is unpacked into the target's folder first.

    Raises:
        Failed: (rule ``unknown-module``) the target has no such module; or it cannot be unpacked.
    """
    info = find(target, name)
    if info is None or target.modules is None:
        raise Failed(
            f"{target.release} has no module {module_name(name)}",
            why="it is not in the image package" if target.modules else "this target has no modules folder",
            next_step="see `kmend kernel show` for the modules folder",
            rule="unknown-module",
        )
    packed = target.modules / info.file
    if packed.suffix == ".ko":
        return ModuleFile(info.name, packed)
    plain = target.folder / _UNPACKED / f"{packed.name.partition('.ko')[0]}.ko"
    if not plain.exists():
        write_atomically(plain, unpack(packed))
    return ModuleFile(info.name, plain)


def module_dependencies(target: Target, name: str, *, soft: bool = False) -> tuple[str, ...]:
    """Names of all modules that must be loaded before this one, in an order that works; without itself.

    ``soft`` adds the ``pre`` modules of ``MODULE_SOFTDEP`` that exist (ext4: ``crypto-crc32c`` is an
    alias and no module, so it is passed over).

    Raises:
        Failed: (rule ``unknown-module``) the module, or one that it depends on, is not there.
    """
    index = _index(target)
    order: list[str] = []
    state: dict[str, bool] = {}  # False: being visited

    def visit(module: str, wanted_by: str) -> None:
        if module in state:
            return
        info = index.get(module)
        if info is None:
            raise Failed(
                f"{target.release} has no module {module}",
                why=f"{wanted_by} depends on it" if wanted_by else "it is not in the image package",
                next_step="check the modules folder of the target",
                rule="unknown-module",
            )
        state[module] = False
        before = info.depends
        if soft:
            before += tuple(m for m in info.softdep_pre if m in index)
        for dependency in before:
            visit(dependency, module)
        state[module] = True
        order.append(module)

    first = module_name(name)
    visit(first, "")
    return tuple(module for module in order if module != first)


def defined_in(target: Target, symbol: str) -> tuple[ModuleSymbol, ...]:
    """Every module symbol of that exact name: which modules define a function or variable called so.

    One module may have several (local) symbols of one name; each is a row. Searched by bisection in
    the mapped index, so one look-up costs microseconds and no start-up time.

    Raises:
        Failed: (rule ``no-module-index``) the target was not prepared to its end.
    """
    path = target.folder / SYMBOLS
    wanted = symbol.encode() + b"\t"
    out: list[ModuleSymbol] = []
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return ()
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                at = _first_row(data, wanted)
                while data[at : at + len(wanted)] == wanted:
                    end = data.find(b"\n", at)
                    _, letter, module = data[at:end].decode().split("\t")
                    out.append(ModuleSymbol(symbol, module, letter in "Ff", letter.islower()))
                    at = end + 1
    except OSError as error:
        raise Failed(
            f"{path} (the index of module symbols) cannot be read",
            why=error.strerror or str(error),
            next_step="prepare the target again: `kmend kernel fetch RELEASE`",
            rule="no-module-index",
        ) from error
    return tuple(out)


def _first_row(data: mmap.mmap, wanted: bytes) -> int:
    """Offset of the first row that is not below ``wanted``; rows are sorted as bytes."""
    low, high = 0, len(data)  # both at the start of a row (or the end)
    while low < high:
        middle = data.rfind(b"\n", low, (low + high) // 2) + 1 or low
        end = data.find(b"\n", middle)
        if data[middle : middle + len(wanted)] < wanted:
            low = end + 1
        else:
            high = middle
    return low
