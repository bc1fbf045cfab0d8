"""Run the target's compiler and objtool on one unit; keep the objects of the unchanged source.

The original is compiled in the prepared tree, the patched one in an overlay of it: both run with
the tree as the working directory and the same relative paths, so that ``__FILE__``, ``-I`` and the
line numbers agree and only the patch makes a difference. Nothing is written inside of either tree.

**Why -g is dropped.** GCC generates the same code with and without it (``-fcompare-debug`` is how
GCC holds itself to that), and provenance compares the bytes afterwards anyway; without it
fs/ext4/mballoc.c takes a tenth to a fifth less time, and its object an eighth of the space.

**The cache of originals** works in two steps. The *command key* (compiler, objtool, arguments,
source path) leads to a manifest: the files that such a compilation once read. The *object key* adds
the contents of all of them, hashed anew at every look-up, so a changed tree cannot be given a stale
object; and two targets whose unit and headers are equal share one object.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter

from kmend.core.config import Config
from kmend.core.errors import Failed
from kmend.core.files import scratch_folder, sweep, write_atomically
from kmend.core.progress import Progress
from kmend.core.run import Children, run
from kmend.core.target import Linkage, Target, Unit
from kmend.kernel.kbuild import CompileCommand, module_command
from kmend.kernel.work import FULL, disk_full

#: What kmend adds to kbuild's flags: a section per function and per variable, to tell them apart.
SPLIT_SECTIONS = ("-ffunction-sections", "-fdata-sections")
#: The same with the types of the unit in a .BTF section, for the comparison of layouts. It changes no code.
SPLIT_WITH_TYPES = (*SPLIT_SECTIONS, "-gbtf")
#: Seconds; the slowest unit of 6.1 takes 16 on a shared machine.
TIMEOUT = 600.0

_DEBUG_FLAG = re.compile(r"-g(?:\d|dwarf.*|gdb\d?|z(?:=.*)?|split-dwarf|btf|stabs.*)?").fullmatch
_FORMAT = "kmend-object-1"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled unit. ``path`` is the object after objtool; ``deps`` the files that the compiler
    read (relative to the tree, the source first); ``seconds`` wall time of compiler and objtool (of
    the first compilation when ``cached``), ``objtool_seconds`` the latter's part; ``warnings`` what
    both had to say, a line each."""

    path: Path
    deps: tuple[str, ...]
    seconds: float
    objtool_seconds: float
    cached: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """The two objects of a unit."""

    original: Compiled
    patched: Compiled


def compile_unit(
    target: Target,
    unit: Unit,
    command: CompileCommand,
    *,
    tree: Path,
    out: Path,
    extra_flags: Sequence[str] = SPLIT_SECTIONS,
    debug_info: bool = False,
    timeout: float = TIMEOUT,
    children: Children | None = None,
) -> Compiled:
    """Compile ``unit`` as it lies in ``tree`` (the target's source, or an overlay of it) to below ``out``.

    The object is complete or absent: compiler and objtool work on a file beside it, which gets
    its name when both have succeeded. objtool runs as the kernel runs it; where the kernel runs
    it on the linked image (``late_objtool``), it runs here per unit with those arguments. Then what
    objtool concludes from the whole link does not hold for the unit: ``.ibt_endbr_seal`` lists
    functions of which this unit alone takes no address, and must not be used.

    Raises:
        Failed: (rule ``compile-error``) the compiler's first errors are the reason; (rule
            ``objtool``) objtool ended with an error; (rule ``timeout``); (rule ``unwritable``).
    """
    argv = compiler_arguments(command, extra_flags, debug_info=debug_info)
    path = out / object_name(unit)
    with _scratch(path) as folder:
        # gcc's own temporary files too: a compiler that is killed leaves them where they are
        env = {"TMPDIR": str(folder)}
        made = folder / path.name
        listing = folder / "deps"
        start = perf_counter()
        result = run(
            [*argv, "-MD", "-MF", str(listing), "-MT", "o", "-c", "-o", str(made), command.source],
            cwd=tree,
            env=env,
            timeout=timeout,
            check=False,
            children=children,
        )
        if result.status != 0 or not made.exists():
            raise _compile_error(unit, result.status, result.errors)
        warnings = _warnings(result.errors)
        deps = read_dependencies(listing.read_text(errors="surrogateescape"))
        objtool_start = perf_counter()
        if command.objtool is not None:
            warnings += _objtool(target, unit, command.objtool, made, children)
        end = perf_counter()
        made.replace(path)
    return Compiled(path, deps, end - start, end - objtool_start, False, warnings)


@dataclass(frozen=True, slots=True)
class Preprocessed:
    """What the compiler proper would see of a unit, and the files that were read."""

    text: bytes
    deps: tuple[str, ...]


def preprocessed(
    unit: Unit,
    command: CompileCommand,
    *,
    tree: Path,
    scratch: Path,
    children: Children | None = None,
    extra_flags: Sequence[str] = (),
) -> Preprocessed:
    """Preprocess ``unit`` as it lies in ``tree``; line markers are left out, ``__LINE__`` is expanded.

    Two equal texts compile to equal code: the compiler gets the same words in the same order, and what
    else it knows of the lines goes into debug information only.

    Raises:
        Failed: (rule ``compile-error``) the preprocessor's first errors are the reason; (rule ``timeout``).
    """
    listing = scratch / f"{object_name(unit).replace('/', '%')}.d"
    result = run(
        [
            *compiler_arguments(command, (*SPLIT_SECTIONS, *extra_flags)),
            "-w",
            "-E",
            "-P",
            "-MD",
            "-MF",
            str(listing),
            "-MT",
            "o",
            command.source,
        ],
        cwd=tree,
        timeout=TIMEOUT,
        check=False,
        children=children,
    )
    if result.status != 0:
        raise _compile_error(unit, result.status, result.errors)
    deps = read_dependencies(listing.read_text(errors="surrogateescape"))
    listing.unlink()
    return Preprocessed(result.stdout, deps)


def compiler_arguments(
    command: CompileCommand, extra_flags: Sequence[str] = SPLIT_SECTIONS, *, debug_info: bool = False
) -> tuple[str, ...]:
    """The compiler's arguments up to the output: kbuild's, without ``-g…`` unless wanted, then ours."""
    kept = command.compiler if debug_info else tuple(a for a in command.compiler if not _DEBUG_FLAG(a))
    # A colour or a locale of the caller's must not reach the messages that we read.
    return (*kept, *extra_flags, "-fdiagnostics-color=never")


def object_name(unit: Unit) -> str:
    """Where below the output folder the unit's object goes; ``..`` of kbuild's spelling becomes ``__``."""
    return "/".join("__" if part == ".." else part for part in unit.obj.split("/"))


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside ``path``, removed afterwards."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".compile.", dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield folder
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> Failed:
    if FULL.search(str(error)):
        return disk_full(str(error))
    return Failed(
        f"{path} cannot be written",
        why=error.strerror or str(error),
        next_step="free space, or name another folder",
        rule="unwritable",
    )


def _compile_error(unit: Unit, status: int, text: str) -> Failed:
    if full := next((line.strip() for line in text.splitlines() if FULL.search(line)), ""):
        return disk_full(full)
    lines = [line for line in text.splitlines() if re.search(r"\b(?:error|fatal error|undefined)\b", line)]
    if status < 0:
        lines = [f"the compiler was ended by signal {-status}", *lines]
    tail = text.strip().splitlines()[-5:]
    return Failed(
        f"{unit.source} does not compile",
        why="\n".join(lines[:5] or tail) or f"the compiler ended with status {status} and no object",
        next_step="mend the patch; the messages are the compiler's own",
        rule="compile-error",
    )


def _warnings(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.splitlines() if "warning:" in line)


def _objtool(
    target: Target, unit: Unit, argv: Sequence[str], made: Path, children: Children | None
) -> tuple[str, ...]:
    # The target's own binary, also when the tree is an overlay: the patch does not reach objtool.
    tool = os.path.normpath(target.source / argv[0])
    result = run(
        [tool, *argv[1:], str(made)], cwd=target.source, timeout=TIMEOUT, check=False, children=children
    )
    said = tuple(
        line.replace(f"{made.parent}/", "")
        for line in (result.text + result.errors).splitlines()
        if line.strip()
    )
    if result.status != 0:
        if full := next((line for line in said if FULL.search(line)), ""):
            raise disk_full(full)
        raise Failed(
            f"objtool failed on {unit.obj}",
            why="\n".join(said[:5]) or f"status {result.status}",
            next_step="the source may use inline assembly that objtool does not understand",
            rule="objtool",
        )
    return said


def read_dependencies(text: str) -> tuple[str, ...]:
    """The file names of a dependency listing of the compiler's (make syntax: ``o: a.c b.h \\``)."""
    _, _, files = text.replace("\\\n", " ").partition(":")
    names = (word.replace("\\ ", " ").replace("\\#", "#").replace("$$", "$") for word in _words(files))
    return tuple(dict.fromkeys(os.path.normpath(name) for name in names))


def _words(text: str) -> list[str]:
    return re.findall(r"(?:\\ |\S)+", text)


# The cache of originals ------------------------------------------------------------------------

#: Prefix of the folders in which originals are compiled.
_UNIT = "unit"


def original(
    config: Config,
    target: Target,
    unit: Unit,
    command: CompileCommand,
    *,
    extra_flags: Sequence[str] = SPLIT_SECTIONS,
    debug_info: bool = False,
    children: Children | None = None,
) -> Compiled:
    """The object of the unit as it lies in the prepared tree: from the cache, or compiled into it.

    Raises:
        Failed: as :func:`compile_unit`.
    """
    key = _command_key(target, unit, command, extra_flags, debug_info)
    store = config.objects
    manifest = store / key[:2] / f"{key}.deps"
    try:
        deps = tuple(json.loads(manifest.read_bytes()))
        found = _stored(store, _object_key(key, target.source, deps), deps)
        if found is not None:
            return found
    except (OSError, ValueError, TypeError):
        pass  # no manifest, a damaged one, or a file of it is gone: compile
    with scratch_folder(_work(config), _UNIT) as folder:
        made = compile_unit(
            target,
            unit,
            command,
            tree=target.source,
            out=folder,
            extra_flags=extra_flags,
            debug_info=debug_info,
            children=children,
        )
        try:
            result_key = _object_key(key, target.source, made.deps)
            place = _place(store, result_key)
            place.parent.mkdir(parents=True, exist_ok=True)
            row = {
                "sha256": hashlib.sha256(made.path.read_bytes()).hexdigest(),
                "seconds": made.seconds,
                "objtool": made.objtool_seconds,
                "warnings": made.warnings,
            }
            write_atomically(place.with_suffix(".json"), json.dumps(row).encode())
            made.path.replace(place)
            write_atomically(manifest, json.dumps(made.deps).encode())
        except OSError as error:
            raise _unwritable(store, error) from error
    return dataclasses.replace(made, path=place)


def sweep_killed(config: Config) -> None:
    """Remove what killed runs left of originals that they compiled, also when this run compiles none."""
    sweep(_work(config), _UNIT)


def _work(config: Config) -> Path:
    """Where originals are compiled, beside where they are kept: a rename puts them there."""
    return config.objects / "work"


def _place(store: Path, key: str) -> Path:
    return store / key[:2] / f"{key}.o"


def _stored(store: Path, key: str, deps: tuple[str, ...]) -> Compiled | None:
    place = _place(store, key)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        row = json.loads(place.with_suffix(".json").read_bytes())
        # A power cut may have left the name without the bytes.
        if hashlib.sha256(place.read_bytes()).hexdigest() == row["sha256"]:
            warnings = tuple(str(line) for line in row["warnings"])
            return Compiled(place, deps, float(row["seconds"]), float(row["objtool"]), True, warnings)
    return None


def _command_key(
    target: Target, unit: Unit, command: CompileCommand, extra_flags: Sequence[str], debug_info: bool
) -> str:
    argv = compiler_arguments(command, extra_flags, debug_info=debug_info)
    parts = [_FORMAT, compiler_identity(argv[0]), *argv, "", unit.obj, command.source, ""]
    if command.objtool is not None:
        tool = target.source / command.objtool[0]
        parts += [*command.objtool, _file_hash(tool)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _object_key(command_key: str, tree: Path, deps: Sequence[str]) -> str:
    """Hash of the command and of the contents of every file that the compiler read (some 900, 20 ms)."""
    digest = hashlib.sha256(command_key.encode())
    base = os.fspath(tree)
    for name in deps:
        fd = os.open(name if name[0] == "/" else f"{base}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            data = os.read(fd, size + 1)
            while len(data) < size:  # a short read is legal
                more = os.read(fd, size - len(data) + 1)
                if not more:
                    break
                data += more
        finally:
            os.close(fd)
        digest.update(f"\0{name}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


@lru_cache(maxsize=8)
def compiler_identity(program: str) -> str:
    """What tells this compiler from another: the path, size and time of its programs and its banner.

    Raises:
        Unable: (rule ``missing-tool``) there is no such compiler.
    """
    banner = run([program, "--version"], timeout=30).text.partition("\n")[0]
    parts = [banner]
    for name in (shutil.which(program), _subprogram(program, "cc1"), _subprogram(program, "as")):
        if name and Path(name).exists():
            real = Path(name).resolve()
            status = real.stat()
            parts.append(f"{real}:{status.st_size}:{status.st_mtime_ns}")
    return "\n".join(parts)


def _subprogram(program: str, name: str) -> str | None:
    found = run([program, f"-print-prog-name={name}"], timeout=30).text.strip()
    return found if "/" in found else shutil.which(found)


@lru_cache(maxsize=8)
def _hash_of(path: str, _size: int, _mtime: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _file_hash(path: Path) -> str:
    try:
        status = path.stat()
        return _hash_of(os.fspath(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise Failed(
            f"{path} cannot be read",
            why=error.strerror or str(error),
            next_step="prepare the target again: `kmend kernel fetch RELEASE`",
            rule="objtool",
        ) from error


# Several units ---------------------------------------------------------------------------------


def compile_pairs(
    config: Config,
    target: Target,
    commands: Mapping[Unit, CompileCommand],
    *,
    patched_tree: Path,
    out: Path,
    progress: Progress,
    extra_flags: Sequence[str] = SPLIT_SECTIONS,
    patched_flags: Sequence[str] = (),
    meanwhile: Callable[[], None] | None = None,
) -> dict[Unit, Pair]:
    """Original and patched object of every unit, at most ``config.jobs`` compilers at once.

    ``patched_flags`` are for the patched objects alone.

    The patched objects come first in the queue: they are never cached, and an error of the author's
    shows soonest there. When one fails the others are ended. ``meanwhile`` is called once they run,
    for work that need not wait for them.

    Raises:
        Failed: the first failure, as :func:`compile_unit`; what ``meanwhile`` raises.
    """
    if not commands:
        return {}
    progress.step(f"compiling {len(commands)} unit{'s' if len(commands) > 1 else ''}, before and after")
    children = Children()
    done: dict[tuple[Unit, bool], Compiled] = {}
    lock = threading.Lock()

    def work(unit: Unit, patched: bool) -> None:
        command = commands[unit]
        if patched:
            made = compile_unit(
                target,
                unit,
                command,
                tree=patched_tree,
                out=out,
                extra_flags=(*extra_flags, *patched_flags),
                children=children,
            )
        else:
            made = original(config, target, unit, command, extra_flags=extra_flags, children=children)
        with lock:
            done[unit, patched] = made
            progress.amount(len(done), 2 * len(commands))

    with ThreadPoolExecutor(max_workers=config.jobs, thread_name_prefix="compile") as pool:
        tasks = [pool.submit(work, unit, patched) for unit in commands for patched in (True, False)]
        try:
            if meanwhile is not None:
                meanwhile()
            for task in as_completed(tasks):
                task.result()
        except BaseException:
            for task in tasks:
                task.cancel()
            children.stop()
            raise
    return {unit: Pair(done[unit, False], done[unit, True]) for unit in commands}


def differing_units(
    config: Config,
    target: Target,
    commands: Mapping[Unit, CompileCommand],
    *,
    patched_tree: Path,
    scratch: Path,
    progress: Progress,
    check: Callable[[Unit, Sequence[str]], None],
    same: Callable[[bytes, bytes], bool],
    patched_flags: Sequence[str] = (),
) -> tuple[Unit, ...]:
    """Which units the preprocessor turns into another text in ``patched_tree``, in the order given.

    ``check`` is called with what each patched unit read; ``same`` says whether two texts that differ mean the
    same to a compiler; ``patched_flags`` are for the patched units alone.

    Raises:
        Failed: the first failure, as :func:`preprocessed`.
    """
    progress.step(f"preprocessing {len(commands)} units that may include a changed header")
    children = Children()
    folders = (scratch / "before", scratch / "after")
    for folder in folders:
        folder.mkdir()

    def differs(unit: Unit) -> bool:
        after = preprocessed(
            unit,
            commands[unit],
            tree=patched_tree,
            scratch=folders[1],
            children=children,
            extra_flags=patched_flags,
        )
        check(unit, after.deps)
        before = preprocessed(unit, commands[unit], tree=target.source, scratch=folders[0], children=children)
        return before.text != after.text and not same(before.text, after.text)

    found: set[Unit] = set()
    with ThreadPoolExecutor(max_workers=config.jobs, thread_name_prefix="preprocess") as pool:
        tasks = {pool.submit(differs, unit): unit for unit in commands}
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                if task.result():
                    found.add(tasks[task])
                progress.amount(done, len(tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            children.stop()
            raise
    return tuple(unit for unit in commands if unit in found)


def compile_snippet(target: Target, c_source: str, *, out: Path, module_name: str) -> Path:
    """Compile a small C text as the only source of a loadable module of this kernel; returns the object.

    With the flags of any module (``-DMODULE``, ``KBUILD_MODNAME`` …), not of a directory, and with
    objtool. Serves for structure layouts and for the module's own glue.

    Raises:
        Failed: (rule ``compile-error``) with the compiler's words, or as :func:`compile_unit`.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", module_name)
    folder = (out / f"{name}.src").absolute()
    write_atomically(folder / "Kbuild", f"obj-m := {name}.o\n".encode())
    write_atomically(folder / f"{name}.c", c_source.encode())
    command = module_command(target, folder, name)
    unit = Unit(f"{name}.o", f"{name}.c", name.replace("-", "_"), Linkage.MODULE)
    return compile_unit(target, unit, command, tree=target.source, out=out.absolute(), extra_flags=()).path
