"""Man pages and shell completion, made from the parsers: they say what --help says.

python packaging/generate.py OUT     OUT/man1/kmend*.1, OUT/bash/kmend, OUT/zsh/_kmend
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kmend import __version__
from kmend.cli import VERBS, load, parser

#: Metavariables that stand for something which a shell can complete.
FILES = {"KO", "PATCH", "FILE", "SCRIPT", "TOML", "ORIG.o", "PATCHED.o", "KO-OR-NAME"}
FOLDERS = {"DIR"}
#: The names of what is loaded, and of kernels, are folders.
LOADED, KERNELS = "/sys/kernel/livepatch", "/lib/modules"
#: Verbs whose NAME is a loaded patch.
ON_LOADED = {"unload", "disable", "enable", "signal", "force", "status", "info"}


@dataclass(frozen=True, slots=True)
class Page:
    """A command: its words after ``kmend``, its parser, the commands below it."""

    words: tuple[str, ...]
    parser: argparse.ArgumentParser
    below: tuple[Page, ...]

    @property
    def name(self) -> str:
        return "-".join(("kmend", *self.words))

    def walk(self) -> Iterator[Page]:
        yield self
        for page in self.below:
            yield from page.walk()

    @property
    def options(self) -> list[argparse.Action]:
        """What may be given, without the choice of a verb, hidden ones left out."""
        return [
            row
            for row in self.parser._actions
            if not isinstance(row, argparse._SubParsersAction) and row.help is not argparse.SUPPRESS
        ]


def pages() -> Page:
    """The whole command line."""
    top = parser()
    modules = {row.name: row.module for row in VERBS}
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                verb.module = None  # configured here, not when its arguments are read
                load(modules[name]).configure(verb)
    return _page((), top)


def _page(words: tuple[str, ...], one: argparse.ArgumentParser) -> Page:
    below = [
        _page((*words, name), child)
        for action in one._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, child in action.choices.items()
    ]
    return Page(words, one, tuple(below))


# -- man pages -------------------------------------------------------------------------------------


def roff(text: str) -> str:
    """Text as troff prints it unchanged."""
    out = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in out.splitlines())


def expanded(action: argparse.Action, one: argparse.ArgumentParser) -> str:
    """The help of an option, its %-fields filled in."""
    return one._get_formatter()._expand_help(action) if action.help else ""


def man(page: Page, top: Page) -> str:
    """One page (section 1)."""
    one = page.parser
    usage = " ".join(one.format_usage().removeprefix("usage: ").split())
    lines = [
        f'.TH {page.name.upper()} 1 "" "kmend {__version__}" "kmend"',
        ".SH NAME",
        f"{roff(page.name)} \\- {roff(one.description or '')}",
        ".SH SYNOPSIS",
        roff(usage),
    ]
    positionals = [row for row in page.options if not row.option_strings]
    optional = [row for row in page.options if row.option_strings]
    for title, rows in (("ARGUMENTS", positionals), ("OPTIONS", optional)):
        if rows:
            lines.append(f".SH {title}")
        for row in rows:
            metavar = row.metavar if isinstance(row.metavar, str) else row.dest.upper()
            if row.choices is not None:
                metavar = "|".join(map(str, row.choices))
            words = ", ".join(row.option_strings) or metavar
            if row.option_strings and row.nargs != 0:
                words += f" {metavar}"
            lines += [".TP", f".B {roff(words)}", roff(expanded(row, one))]
    if page.below:
        lines.append(".SH COMMANDS")
        for child in page.below:
            lines += [".TP", f".B {roff(child.words[-1])}", roff(child.parser.description or "")]
            lines[-1] += f" See \\fB{roff(child.name)}\\fR(1)."
    if one.epilog:
        lines.append(".SH NOTES")
        if page.words:
            lines += [".nf", roff(one.epilog.rstrip()), ".fi"]
        else:
            lines.append(roff(one.epilog))
    if page.words:
        lines += [".SH EXIT STATUS", roff(top.parser.epilog or "").removeprefix("Exit status: ")]
        lines += [".SH SEE ALSO", "\\fBkmend\\fR(1)"]
    else:
        lines += [
            ".SH FILES",
            *(".TP", "/etc/kmend/kmend.toml", "settings"),
            *(".TP", "/etc/kmend/off", "while it is there, nothing is loaded at boot"),
            *(".TP", "/var/lib/kmend", "installed patches, by kernel release, and the journal"),
            *(".TP", "/var/cache/kmend", "downloaded and prepared kernels; can be deleted"),
        ]
    return "\n".join(line for line in lines if line) + "\n"


# -- completion ------------------------------------------------------------------------------------


def _values(action: argparse.Action, verb: str) -> str:
    """What an argument may be, as a word for the completion's ``case``: see the functions in BASH."""
    if action.choices is not None:
        return "words:" + " ".join(map(str, action.choices))
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest
    if metavar in FOLDERS:
        return "folders"
    if metavar == "RELEASE" or action.dest in ("kernel", "release"):
        return f"names:{KERNELS}"
    if metavar == "NAME" and verb in ON_LOADED:
        return f"names:{LOADED}"
    if metavar == "VERB":
        return "words:" + " ".join(row.name for row in VERBS)
    return "files" if metavar in FILES or not action.option_strings else ""


BASH = """\
# Completion of kmend for bash, made from its parsers.
_kmend_values() {
    case $1 in
        words:*) COMPREPLY=($(compgen -W "${1#words:}" -- "$2")) ;;
        names:*) COMPREPLY=($(compgen -W "$(ls "${1#names:}" 2>/dev/null)" -- "$2")) ;;
        folders) compopt -o filenames; COMPREPLY=($(compgen -d -- "$2")) ;;
        files) compopt -o filenames; COMPREPLY=($(compgen -f -- "$2")) ;;
    esac
}
_kmend() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} path= at
    for ((at = 1; at < COMP_CWORD; at++)); do
        case "$path ${COMP_WORDS[at]}" in
@PATHS@
        esac
    done
    case "$path:$before" in
@VALUES@
    esac
    case "$path" in
@WORDS@
    esac
}
complete -F _kmend kmend
"""


def bash(top: Page) -> str:
    """The script for bash."""
    paths, values, words = [], [], []
    for page in top.walk():
        path = "".join(f" {word}" for word in page.words)
        if page.words:
            paths.append(f'            "{path}") path="{path}" ;;')
        flags = sorted({flag for row in page.options for flag in row.option_strings})
        for row in page.options:
            kind = _values(row, page.words[-1] if page.words else "")
            if row.option_strings and row.nargs != 0:
                cases = " | ".join(f'"{path}:{flag}"' for flag in row.option_strings)
                values.append(f'        {cases}) _kmend_values "{kind}" "$word"; return ;;')
        rest = [row for row in page.options if not row.option_strings]
        kind = _values(rest[-1], page.words[-1]) if rest else ""
        if page.below:
            kind = "words:" + " ".join(child.words[-1] for child in page.below)
        words.append(
            f'        "{path}")\n'
            f'            if [[ $word == -* ]]; then _kmend_values "words:{" ".join(flags)}" "$word"\n'
            f'            else _kmend_values "{kind}" "$word"; fi ;;'
        )
    return (
        BASH.replace("@PATHS@", "\n".join(paths))
        .replace("@VALUES@", "\n".join(values))
        .replace("@WORDS@", "\n".join(words))
    )


def _quoted(text: str) -> str:
    """Text inside a zsh specification in single quotes."""
    text = re.sub(r"([\[\]:\\])", r"\\\1", " ".join(text.split()))
    return text.replace("'", "'\\''")


def _zsh_values(kind: str) -> str:
    match kind.partition(":"):
        case ("words", _, words):
            return f"({words})"
        case ("names", _, folder):
            return f"($(ls {folder} 2>/dev/null))"
        case ("folders", _, _):
            return "_files -/"
        case ("files", _, _):
            return "_files"
        case _:
            return " "


def zsh(top: Page) -> str:
    """The script for zsh."""
    out = ["#compdef kmend", "# Completion of kmend for zsh, made from its parsers."]
    for page in top.walk():
        function = "_" + page.name.replace("-", "_")
        verb = page.words[-1] if page.words else ""
        specs = []
        for row in page.options:
            kind = _zsh_values(_values(row, verb))
            text = _quoted(expanded(row, page.parser))
            metavar = row.metavar if isinstance(row.metavar, str) else row.dest
            for flag in row.option_strings:
                value = f":{_quoted(metavar)}:{kind}" if row.nargs != 0 else ""
                specs.append(f"'{flag}[{text}]{value}'")
            if not row.option_strings:
                many = "*" if row.nargs in ("*", "+") else ""
                specs.append(f"'{many}:{_quoted(metavar)}:{kind}'")
        if page.below:
            specs += ["'1:command:->command'", "'*::argument:->argument'"]
        out.append(f"{function}() {{\n  local context state state_descr line\n  typeset -A opt_args")
        out.append("  _arguments -C \\\n    " + " \\\n    ".join(specs))
        if page.below:
            rows = " ".join(f"'{c.words[-1]}:{_quoted(c.parser.description or '')}'" for c in page.below)
            out.append(f"  case $state in\n    command) local -a names; names=({rows})")
            out.append("      _describe command names ;;\n    argument) case $line[1] in")
            out += [f"      {c.words[-1]}) _{c.name.replace('-', '_')} ;;" for c in page.below]
            out.append("    esac ;;\n  esac")
        out.append("}")
    return "\n".join(out) + '\n_kmend "$@"\n'


def main() -> int:
    """Write everything below the folder that is named."""
    os.environ["COLUMNS"] = "100000"  # usage lines are not to be folded by argparse
    out, top = Path(sys.argv[1]), pages()
    for name in ("man1", "bash", "zsh"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for page in top.walk():
        (out / "man1" / f"{page.name}.1").write_text(man(page, top))
    (out / "bash/kmend").write_text(bash(top))
    (out / "zsh/_kmend").write_text(zsh(top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
