"""Which unit is compiled, and into which object it goes: Kbuild's makefiles evaluated, nothing built.

:func:`build_unit_index` lets kbuild descend through its own makefiles (``obj-y``, ``obj-m``,
``foo-objs``, ``lib-y``; Documentation/kbuild/makefiles.rst) with a makefile that stands in for
``scripts/Makefile.build``: it has that file's own beginning, up to the point where everything is
evaluated, and then writes down the lists instead of building. :class:`UnitMap` searches the result.

Three files are left in the target's folder: ``kbuild-env.json`` (:mod:`kmend.kernel.kbuild_env`),
``units.txt`` (a row per unit: source, object, directory of its makefile, owner, linkage) and
``includers.txt`` (a row per ``.c`` file that other units include).
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

from kmend.core.errors import Failed
from kmend.core.files import write_atomically
from kmend.core.progress import Progress
from kmend.core.run import run
from kmend.core.target import VMLINUX, Linkage, Target, Unit
from kmend.kernel import generated, kbuild_env
from kmend.kernel.kbuild_env import KbuildEnvironment
from kmend.kernel.symvers import module_name

FILE = "units.txt"
INCLUDERS = "includers.txt"

_LINKAGE = {"b": Linkage.BUILTIN, "m": Linkage.MODULE, "l": Linkage.LIBRARY}
_LETTER = {linkage: letter for letter, linkage in _LINKAGE.items()}

_PROLOGUE = """\
kmend-all:
.PHONY: kmend-all FORCE
FORCE:
kmend-changed = $(subst x$1x,,x$2x)$(subst x$2x,,x$1x)
define kmend-newline


endef
kmend-inherited := $(foreach v,$(KMEND_NAMES),$(if $(call kmend-changed,$(KMEND_TOP_$v),$($v)),E $v=$($v)\
$(kmend-newline)))
"""

#: ``real-search`` and the prefixes are Makefile.lib's; a module's parts are what its .mod file lists.
_EPILOGUE = """\
kmend-part = $(call real-search,$(patsubst $(obj)/%,%,$1),.o,-objs -y -m)
define kmend-text
D $(obj) $(if $(need-builtin),builtin)
$(kmend-inherited)O $(real-obj-y)
L $(lib-y)
$(foreach m,$(filter %.o,$(obj-m)),M $m $(addprefix $(obj)/,$(call kmend-part,$m))$(kmend-newline))
endef
$(file >$(KMEND_OUT)/$(subst /,%,$(obj)).units,$(kmend-text))
kmend-all: $(subdir-ym) ; @:
"""

#: What scripts/Makefile.build does for a directory below (its "Descending" part).
_DESCENT = """\
.PHONY: $(subdir-ym)
$(subdir-ym):
	@$(MAKE) -f $(KMEND_MAKEFILE) obj=$@ \\
	need-builtin=$(if $(filter $@/built-in.a,$(real-obj-y)),1) \\
	need-modorder=$(if $(filter $@/modules.order,$(obj-m)),1)
"""


@dataclasses.dataclass(frozen=True, slots=True)
class UnitRow:
    """A unit and the directory whose makefile names it (kbuild's ``obj=``)."""

    unit: Unit
    directory: str


class UnitMap:
    """The units of a target; every question reads only the rows that it needs."""

    def __init__(self, target: Target, rows: str, includers: str) -> None:
        self._target = target
        self._rows = rows
        self._includers = includers

    def _lines(self, needle: str) -> Iterator[str]:
        at = self._rows.find(needle)
        while at >= 0:
            start = self._rows.rfind("\n", 0, at + 1) + 1
            end = self._rows.find("\n", at + 1)
            yield self._rows[start:end]
            at = self._rows.find(needle, end)

    def units(self, source: str) -> tuple[Unit, ...]:
        """The units compiled from that file (relative to the tree); empty when it is not compiled.

        A file may be compiled several times (two modules of one directory tree, each with its flags),
        and one object may be linked into several modules: then there is one value per owner.
        """
        wanted = os.path.normpath(source)
        return tuple(_row(line).unit for line in self._lines(f"\n{wanted}\t"))

    def rows_of(self, obj: str) -> tuple[UnitRow, ...]:
        """The rows of an object, in kbuild's spelling."""
        rows = (_row(line) for line in self._lines(f"\t{obj}\t"))
        return tuple(row for row in rows if row.unit.obj == obj)

    def includers(self, source: str) -> tuple[str, ...]:
        """Compiled ``.c`` files that bring ``source`` in with ``#include``, directly or through others.

        Found in the text, without regard to ``#ifdef``: whether the text is reached in this
        configuration is told by the dependencies that the compiler writes.
        """
        needle = f"\n{os.path.normpath(source)}\t"
        at = self._includers.find(needle)
        if at < 0:
            return ()
        start = at + len(needle)
        return tuple(self._includers[start : self._includers.find("\n", start)].split("\t"))

    def all_units(self) -> tuple[Unit, ...]:
        """Every unit, by source."""
        return tuple(_row(line).unit for line in self._rows.splitlines() if line)

    def explain_absent(self, source: str) -> str:
        """Why no unit is compiled from the file: one sentence for a person."""
        from kmend.kernel.absent import explain  # noqa: PLC0415 - only on the way to a refusal

        return explain(self._target, self, source)


def _row(line: str) -> UnitRow:
    source, obj, directory, owner, letter = line.split("\t")
    return UnitRow(Unit(obj, source, owner, _LINKAGE[letter]), directory)


def unit_map(target: Target) -> UnitMap:
    """Open the index of a prepared target (1 MB, read in a few milliseconds).

    Raises:
        Failed: (rule ``no-unit-index``) the target was not prepared to its end.
    """
    texts = []
    for name in (FILE, INCLUDERS):
        path = target.folder / name
        try:
            status = path.stat()
            texts.append(_text(path, status.st_mtime_ns, status.st_size))
        except (OSError, UnicodeDecodeError) as error:
            raise kbuild_env.no_index(path, str(error)) from error
    return UnitMap(target, texts[0], texts[1])


@lru_cache(maxsize=4)
def _text(path: Path, _mtime: int, _size: int) -> str:
    return "\n" + path.read_text()


def build_unit_index(target: Target, progress: Progress) -> None:
    """Evaluate the tree's makefiles and write the index. One pass of 1,400 directories, 4-8 s.

    Raises:
        Failed: (rule ``kbuild``) make failed; (rule ``unit-map``) the modules found are not the
            image's modules: configuration and image do not belong together.
    """
    progress.step(f"finding the compiled units of {target.release}")
    target.folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".units.", dir=target.folder))
    try:
        kbuild = kbuild_env.capture(target, scratch)
        out = scratch / "out"
        out.mkdir()
        _descend(target, kbuild, scratch / "units.mk", out)
        listing = _Listing(out, kbuild.variables)
    except OSError as error:
        raise Failed(
            f"the unit index cannot be made in {target.folder}",
            why=error.strerror or str(error),
            next_step="free space, or name another cache (KMEND_CACHE)",
            rule="unwritable",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    check_modules(target, listing.modules)
    rows = listing.rows(target.source, kbuild.variables.get("ARCH_LIB", "lib/").split())
    kbuild = dataclasses.replace(
        kbuild,
        directories=listing.inherited,
        visited=frozenset(listing.inherited),
        builtin=frozenset(listing.builtin),
        vmlinux_objtool=_vmlinux_objtool(target, kbuild),
    )
    kbuild_env.save(target, kbuild)
    rows = _ask_sources(target, kbuild, rows)
    progress.step(f"generating headers of {target.release}")
    needing: dict[str, list[str]] = {}
    for row in rows:
        if row.unit.source.endswith(".c") and (target.source / row.unit.source).exists():
            needing.setdefault(row.directory, []).append(row.unit.obj)
    generated.prepare(target, kbuild, needing)
    included = _includers(target, {row.unit.source for row in rows})
    write_atomically(target.folder / INCLUDERS, included.encode())
    text = "".join(
        sorted(
            f"{r.unit.source}\t{r.unit.obj}\t{r.directory}\t{r.unit.owner}\t{_LETTER[r.unit.linkage]}\n"
            for r in rows
        )
    )
    write_atomically(target.folder / FILE, text.encode())


def _descend(target: Target, kbuild: KbuildEnvironment, makefile: Path, out: Path) -> None:
    scripts = target.source / "scripts"
    build = (scripts / "Makefile.build").read_text()
    # Up to 6.12 everything that decides what is compiled is done when Makefile.lib was read; a
    # kernel whose Makefile.build goes on with it is evaluated whole (a third slower).
    head, mark, _ = build.partition("include $(srctree)/scripts/Makefile.lib\n")
    evaluated = bool(mark) and re.search(
        r"^real-obj-y\s*:=", (scripts / "Makefile.lib").read_text(), re.MULTILINE
    )
    middle = head + mark + _DESCENT if evaluated else build
    if _AUTO_CONF in middle:
        conf = makefile.parent / "conf"
        conf.mkdir()
        _split_configuration(target, conf)
        middle = middle.replace(_AUTO_CONF, _SPLIT_CONF.replace("CONF", str(conf)))
    write_atomically(makefile, (_PROLOGUE + middle + "\n" + _EPILOGUE).encode())
    names = kbuild.inherited_names()
    env = kbuild_env.make_environment(kbuild)
    env.update({f"KMEND_TOP_{name}": kbuild.variables[name] for name in names})
    env.update(KMEND_NAMES=" ".join(names), KMEND_OUT=str(out), KMEND_MAKEFILE=str(makefile))
    result = run(
        [
            "make", f"-j{os.cpu_count() or 1}", "-rR", "--no-print-directory", "-f", str(makefile),
            *([] if evaluated else [f"build=-f {makefile} obj"]),
            *kbuild_env.overrides(target),
            "obj=.", "need-builtin=1", "need-modorder=1",
            *([] if evaluated else ["kmend-all"]),
        ],
        cwd=target.source, env=env, clean_env=False, check=False, timeout=600,
    )  # fmt: skip
    if result.status != 0:
        raise kbuild_env.kbuild_failed(target, result)


_AUTO_CONF = "-include include/config/auto.conf\n"
_SPLIT_CONF = "include $(or $(wildcard CONF/$(subst /,%,$(obj)).conf),include/config/auto.conf) CONF/base\n"
#: What a makefile may do with the configuration: name an option, or reach beyond its own text.
_MENTION = r"CONFIG_[A-Za-z0-9_]+|^[ \t]*[-s]?include[ \t]|CONFIG_\$|\.VARIABLES"


def _split_configuration(target: Target, conf: Path) -> None:
    """Write, per directory, the part of include/config/auto.conf that its makefile mentions.

    Reading all 6,400 options takes make 4.5 of the 7 ms that a directory costs. An option can only
    matter where it is named, so a directory whose makefile includes no other file and computes no
    option's name is given the options that it names, and those that kbuild's own makefiles do
    (``base``). Every other directory reads the whole file.
    """
    options = {}
    for line in (target.source / "include/config/auto.conf").read_text().splitlines():
        name, mark, _ = line.partition("=")
        if mark:
            options[name] = line
    result = run(
        ["grep", "-roE", "-e", _MENTION, "--include=Makefile", "--include=Kbuild", "--include=Makefile.*",
         "--include=Kbuild.include", ".", *(f"--exclude-dir={name}" for name in _NO_MAKEFILES)],
        cwd=target.source, check=False,
    )  # fmt: skip
    mentioned: dict[str, dict[str, set[str]]] = {}  # directory -> makefile -> what it mentions
    for line in result.text.splitlines():
        file, _, text = line.partition(":")
        path = PurePosixPath(file)
        mentioned.setdefault(str(path.parent), {}).setdefault(path.name, set()).add(text)
    own = [*mentioned.get("scripts", {}).values(), *mentioned.get(".", {}).values()]
    base = {text for mentions in own for text in mentions}
    write_atomically(conf / "base", _lines_of(options, base).encode())
    for directory, files in mentioned.items():
        # The filename Kbuild has precedence over Makefile (scripts/Makefile.build).
        kbuild_file = (target.source / directory / "Kbuild").exists()
        found = files.get("Kbuild" if kbuild_file else "Makefile", set())
        if all(text.startswith("CONFIG_") and not text.endswith("$") for text in found):
            (conf / f"{directory.replace('/', '%')}.conf").write_text(_lines_of(options, found))


def _lines_of(options: Mapping[str, str], names: Iterable[str]) -> str:
    return "".join(f"{options[name]}\n" for name in sorted(names) if name in options)


#: Folders without a makefile of the descent (other architectures are not visited either).
_NO_MAKEFILES = ("Documentation", "LICENSES", "tools", "samples", ".git")


class _Listing:
    """What the descent wrote, a file per directory."""

    def __init__(self, out: Path, top: Mapping[str, str]) -> None:
        self._top = top
        self.inherited: dict[str, dict[str, str]] = {}
        self.builtin: list[str] = []
        self.modules: dict[str, list[str]] = {}  # module object -> parts
        self._module_directory: dict[str, str] = {}
        self._objects: dict[str, list[str]] = {}  # directory -> real-obj-y, in order
        self._library: dict[str, list[str]] = {}
        for path in sorted(out.iterdir()):
            self._read(path.read_text(errors="surrogateescape"))

    def _read(self, text: str) -> None:
        directory = ""
        for line in text.splitlines():
            # make joins the words of a foreach with a space
            mark, _, rest = line.lstrip().partition(" ")
            words = rest.split()
            if mark == "D":
                directory = words[0]
                self.inherited[directory] = {}
                if len(words) > 1:
                    self.builtin.append(directory)
            elif mark == "E":
                name, _, value = rest.partition("=")
                # Every level appends a space to the flags; only words matter.
                if value.split() != self._top.get(name, "").split():
                    self.inherited[directory][name] = value
            elif mark == "O":
                self._objects[directory] = words
            elif mark == "L":
                self._library[directory] = words
            elif mark == "M":
                self.modules[words[0]] = words[1:]
                self._module_directory[words[0]] = directory

    def rows(self, tree: Path, libraries: Iterable[str]) -> list[UnitRow]:
        """Every unit of vmlinux, of the modules, and of the libraries that vmlinux is linked with."""
        out: dict[tuple[str, str], UnitRow] = {}

        def add(obj: str, directory: str, owner: str, linkage: Linkage) -> None:
            if obj.endswith(".o"):
                unit = Unit(obj, _source(tree, obj), owner, linkage)
                out.setdefault((obj, owner), UnitRow(unit, directory))

        linked = {name.rstrip("/") for name in libraries}
        for directory in self.builtin:
            for obj in self._objects[directory]:
                add(obj.removeprefix("./"), directory, VMLINUX, Linkage.BUILTIN)
        for module, parts in self.modules.items():
            for obj in parts:
                add(obj, self._module_directory[module], module_name(module[:-2]), Linkage.MODULE)
        for directory, objects in self._library.items():
            # Any other lib.a (drivers/firmware/efi/libstub) goes into the boot stub, not into vmlinux.
            if directory in linked:
                for obj in objects:
                    add(obj, directory, VMLINUX, Linkage.LIBRARY)
        return list(out.values())


_PRINT_SOURCE = "if_changed_rule=$(info @kmend-source $@ $<)@:"


def _ask_sources(target: Target, kbuild: KbuildEnvironment, rows: list[UnitRow]) -> list[UnitRow]:
    """Let make name the source of units whose file does not lie where the pattern rules look.

    Most are generated; ``kernel/bpf/relo_core.o`` has a rule of its own that compiles
    ``tools/lib/bpf/relo_core.c``.
    """
    unclear: dict[str, list[str]] = {}
    for row in rows:
        if not (target.source / row.unit.source).exists():
            unclear.setdefault(row.directory, []).append(row.unit.obj)
    sources = {}
    for directory, objects in unclear.items():
        result = kbuild_env.directory_make(
            target, kbuild, directory, ["-k", _PRINT_SOURCE, *objects], check=False
        )
        for line in result.text.splitlines():
            words = line.split()
            if len(words) == 3 and words[0] == "@kmend-source":
                sources[words[1]] = os.path.normpath(words[2])
    return [
        dataclasses.replace(row, unit=dataclasses.replace(row.unit, source=sources[row.unit.obj]))
        if row.unit.obj in sources
        else row
        for row in rows
    ]


def _source(tree: Path, obj: str) -> str:
    """The file that kbuild's pattern rules compile the object from (Makefile.build: .c, then .rs, .S).

    A generated source does not lie in the tree; :func:`_ask_sources` asks for those.
    """
    stem = os.path.normpath(obj[:-2])
    for suffix in (".c", ".rs", ".S"):
        if (tree / (stem + suffix)).exists():
            return stem + suffix
    return stem + ".c"


def check_modules(target: Target, modules: Iterable[str]) -> None:
    """Hold the modules found (objects, ``fs/ext4/ext4.o``) against the image's ``.ko`` files.

    Raises:
        Failed: (rule ``unit-map``) they differ.
    """
    if target.modules is None:
        return
    root = target.modules / "kernel"
    found = {os.path.normpath(module)[:-2] for module in modules}
    image = set()
    for folder, _, names in os.walk(root):
        base = PurePosixPath(Path(folder).relative_to(root))
        image |= {str(base / name.partition(".ko")[0]) for name in names if ".ko" in name}
    if found == image:
        return
    only_image, only_found = sorted(image - found), sorted(found - image)
    parts = []
    if only_image:
        parts.append(f"{len(only_image)} are in the image alone (the first: {only_image[0]}.ko)")
    if only_found:
        parts.append(f"{len(only_found)} in the configuration alone (the first: {only_found[0]}.ko)")
    raise Failed(
        f"the modules of {target.release} are not those that its configuration builds",
        why="; ".join(parts),
        next_step="the source, the configuration and the modules must be of one build",
        rule="unit-map",
    )


def _vmlinux_objtool(target: Target, kbuild: KbuildEnvironment) -> tuple[str, ...]:
    """objtool's command for vmlinux.o, where the kernel runs it there (scripts/Makefile.vmlinux_o)."""
    makefile = target.source / "scripts/Makefile.vmlinux_o"
    if not makefile.exists():
        return ()
    result = run(
        [
            "make", "-n", "-rR", "--no-print-directory", "-f", "scripts/Makefile.vmlinux_o",
            *kbuild_env.overrides(target),
            "--eval=kmend-objtool: ; $(info @kmend $(if $(objtool-enabled),$(objtool) $(objtool-args)))@:",
            "kmend-objtool",
        ],
        cwd=target.source, env=kbuild_env.make_environment(kbuild), clean_env=False, check=False, timeout=60,
    )  # fmt: skip
    for line in result.text.splitlines():
        if line.startswith("@kmend"):
            return tuple(line.split()[1:])
    raise kbuild_env.kbuild_failed(target, result)


_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+[<"]([^">]+)[">]')


def _grep(target: Target, pattern: str, kinds: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(file, included path) of every matching #include line of the kernel proper."""
    top = sorted(
        entry.name
        for entry in os.scandir(target.source)
        if entry.is_dir() and entry.name not in _NOT_KERNEL and not entry.name.startswith(".")
    )
    result = run(
        ["grep", "-rHE", *(f"--include=*.{kind}" for kind in kinds), "-e", pattern, *top, "arch/x86"],
        cwd=target.source,
        check=False,
    )
    if result.status > 1:
        raise Failed(
            f"the sources in {target.source} could not be searched", why=result.errors.strip(), rule="kbuild"
        )
    for line in result.text.splitlines():
        file, _, text = line.partition(":")
        if match := _INCLUDE.match(text):
            yield file, match[1]


#: Top folders without code of the kernel itself; of ``arch`` only x86 is searched.
_NOT_KERNEL = {"Documentation", "LICENSES", "arch", "tools", "scripts", "samples"}


def _includers(target: Target, compiled: set[str]) -> str:
    """Rows ``included.c <TAB> unit.c …``: transitively, by text, only compiled units on the right."""
    by: dict[str, set[str]] = {}  # file -> files that include it
    through_headers = set()
    for file, path in _grep(target, r'^[ \t]*#[ \t]*include[ \t]+[<"][^">]+\.c[">]', ("c", "h")):
        included = _resolve(target.source, file, path)
        if included:
            by.setdefault(included, set()).add(file)
            if file.endswith(".h"):
                through_headers.add(file)
    if through_headers:
        names = "|".join(re.escape(PurePosixPath(h).name) for h in sorted(through_headers))
        pattern = rf'^[ \t]*#[ \t]*include[ \t]+[<"]([^">]*/)?({names})[">]'
        for file, path in _grep(target, pattern, ("c", "h")):
            included = _resolve(target.source, file, path)
            if included in through_headers:
                by.setdefault(included, set()).add(file)
    rows = []
    for included in by:
        if included.endswith(".c"):
            reached: set[str] = set()
            waiting = [included]
            while waiting:
                for file in by.get(waiting.pop(), ()):
                    if file not in reached:
                        reached.add(file)
                        waiting.append(file)
            if units := sorted(reached & compiled):
                rows.append("\t".join((included, *units)) + "\n")
    return "".join(sorted(rows))


def _resolve(tree: Path, file: str, path: str) -> str | None:
    """The included file relative to the tree: beside the including one, else below an include folder."""
    for base in (PurePosixPath(file).parent, "", "include", "arch/x86/include"):
        candidate = os.path.normpath(f"{base}/{path}" if str(base) else path)
        if not candidate.startswith("..") and (tree / candidate).is_file():
            return candidate
    return None
