"""The command line: parses, calls the library, renders. Only here does an error become text.

:data:`VERBS` is the table of verbs. Each verb's module defines
``configure(parser) -> None`` (its own arguments) and ``run(args, context) -> int``
(the exit status), and is imported only when that verb is used.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from kmend import __version__
from kmend.cli.context import Context, display
from kmend.cli.streams import careful
from kmend.core import config
from kmend.core.errors import Failed, KmendError, Refused, UsageError

#: Status of a run that a signal ended, as shells count it.
INTERRUPTED = 128 + signal.SIGINT
#: What asks kmend to end: SIGHUP comes when the terminal or the connection goes.
ENDING = (signal.SIGTERM, signal.SIGHUP)
BROKEN_PIPE = 128 + signal.SIGPIPE
#: Seconds after which a thread that computes lets another one go on. Ours mostly start and await compilers;
#: Python's 5 ms would hold each of their steps up for as long as the main thread loads code.
SWITCH = 0.0005
#: Verbs whose exit status tells what was done, whatever has become of the words about it.
ACTING = frozenset(
    ("load", "unload", "disable", "enable", "signal", "force", "install", "uninstall", "healthy")
)
#: Takes kmend's own settings out of an environment.
NO_SETTINGS = {f"KMEND_{row.key.upper()}": "" for row in config.SETTINGS}


@dataclass(frozen=True, slots=True)
class Verb:
    """A row: the word on the command line, the module that holds it, one line of help."""

    name: str
    module: str
    help: str


VERBS = (
    Verb("build", "kmend.cli.build", "turn patch files into a livepatch module for an exact kernel"),
    Verb("module", "kmend.cli.module", "turn hand-written replacement functions into a livepatch module"),
    Verb("diff", "kmend.cli.diff", "compare two object files: changed, new and removed functions, data"),
    Verb("check", "kmend.cli.check", "hold a livepatch module against every rule; changes nothing"),
    Verb("plan", "kmend.cli.plan", "say what loading a module would do on this machine; changes nothing"),
    Verb("try", "kmend.cli.try_", "boot the kernel in a virtual machine and load the module there"),
    Verb("kernel", "kmend.cli.kernel", "fetch, list and show target kernels"),
    Verb("load", "kmend.cli.load_", "check a module, load it, bring its transition to its end"),
    Verb("unload", "kmend.cli.unload", "take patches back and unload their modules"),
    Verb("disable", "kmend.cli.unload", "take patches back; their modules stay loaded"),
    Verb("enable", "kmend.cli.unload", "bring a patch that is being taken back into force again"),
    Verb("signal", "kmend.cli.force", "interrupt, once, the tasks that hold a transition up"),
    Verb("force", "kmend.cli.force", "end a transition whatever tasks are doing"),
    Verb("install", "kmend.cli.install", "have patches loaded whenever their kernel boots"),
    Verb("uninstall", "kmend.cli.install", "have them no longer loaded at boot"),
    Verb("healthy", "kmend.cli.install", "say that this boot is well, so that the next one loads again"),
    Verb("status", "kmend.cli.status", "show the running kernel's patches, transition and blockers"),
    Verb("list", "kmend.cli.list_", "list the livepatches of the running kernel"),
    Verb("blockers", "kmend.cli.blockers", "show what a transition waits for, with stacks"),
    Verb("log", "kmend.cli.log", "show what was done, and the kernel's words about it, by time"),
    Verb("info", "kmend.cli.info", "show what a built module holds"),
    Verb("klp", "kmend.cli.klp", "walk through how the kernel patches itself, on kmend's model of it"),
    Verb("doctor", "kmend.cli.doctor", "say what this machine lacks, and the command that mends it"),
)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints join the error tree instead of ending the process."""

    def __init__(self, **options: Any) -> None:
        # no abbreviations: a script must not change its meaning when a flag is added
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, next_step=f"see `{self.prog} --help`", rule="usage")


class VerbParser(Parser):
    """The parser of one verb; imports the verb's module when its arguments are about to be read."""

    module: str | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.module is not None:
            module, self.module = load(self.module), None
            module.configure(self)
            self.set_defaults(run=module.run)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here, so that the hint names this verb's help
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def load(name: str) -> ModuleType:
    """Import a verb's module by its name in the table."""
    return importlib.import_module(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status.

    0 done; 1 refused or failed; 2 wrong usage; 3 this machine or kernel cannot do it;
    130 is an interrupted run, 143 a terminated one. Never raises and never shows a traceback
    unless ``--debug`` asks for it.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    sys.setswitchinterval(SWITCH)
    try:
        with careful() as troubles:
            status = guarded(args)
            sys.stdout.flush()
    except BrokenPipeError:
        # the reader went away (`kmend … | head`); nothing is wrong, and Python's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if not troubles:
        return status
    acts = next((word for word in args if word in {row.name for row in VERBS}), "") in ACTING
    with suppress(OSError):
        sys.stderr.write(
            f"kmend: standard output cannot be written: {troubles[0]}\n"
            + ("  the exit status says what was done\n" if acts else "")
        )
    return status if acts else status or 1


def guarded(args: list[str]) -> int:
    """:func:`main` without the care for a closed pipe."""
    # until the arguments are parsed, what they seem to ask for decides how an error looks
    context = Context(
        config=config.load(env={**os.environ, **NO_SETTINGS}, file=Path(os.devnull)),
        progress=display(sys.stderr, quiet=True, debug=False),
        json="--json" in args,
        debug="--debug" in args,
    )
    verb = ""
    try:
        arguments = parser().parse_args(args)
        verb = arguments.verb
        context = context_of(arguments)
        if context.debug:
            show_log()
        # whom nohup has made deaf to the end of the session stays so
        asked = [row for row in ENDING if signal.getsignal(row) is not signal.SIG_IGN]
        previous = {row: signal.signal(row, terminate) for row in asked}
        try:
            status: int = arguments.run(arguments, context)
        finally:
            context.progress.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
    except SystemExit as end:  # --help and --version
        return end.code if isinstance(end.code, int) else 2
    except Terminated as end:
        sys.stderr.write("kmend: terminated\n")
        return 128 + end.number
    except KeyboardInterrupt:
        sys.stderr.write("\nkmend: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except KmendError as error:
        return refuse(error, verb, context)
    except Exception as error:  # the last door before the user: whatever else happened becomes one sentence
        return refuse(unexpected(error, context), verb, context, cause=error)
    return status


class Terminated(BaseException):
    """SIGTERM or SIGHUP came. An exception, so that children are killed and scratch files removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def terminate(number: int, _frame: FrameType | None) -> None:
    """Their signal handler."""
    raise Terminated(number)


def parser() -> Parser:
    """The whole command line. Verbs bring their own arguments when they are chosen."""
    common = common_flags()
    top = Parser(
        prog="kmend",
        description="Live patching for running Linux kernels: turns a source fix into a livepatch module "
        "for one exact kernel, proves that it fits, and tries it in a virtual machine.",
        epilog="Exit status: 0 done; 1 refused or failed, with the reasons; 2 wrong usage; "
        "3 this machine or kernel cannot do it.",
        parents=[common],
    )
    top.add_argument("--version", action="version", version=f"kmend {__version__}")
    # with `prog` given, argparse need not format a usage line for it (which imports much)
    verbs: Any = top.add_subparsers(
        dest="verb", metavar="VERB", required=True, parser_class=VerbParser, prog="kmend"
    )
    for row in VERBS:
        verb = verbs.add_parser(row.name, help=row.help, description=row.help, parents=[common])
        verb.module = row.module
    return top


def common_flags() -> argparse.ArgumentParser:
    """Flags of every verb, which may stand before or after it."""
    flags = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = flags.add_argument_group("common flags")
    group.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout; text goes to stderr"
    )
    group.add_argument("--debug", action="store_true", help="show every command that is run, and tracebacks")
    group.add_argument("--quiet", action="store_true", help="show no progress")
    group.add_argument("--cache", metavar="DIR", help="folder of downloaded and prepared kernels")
    group.add_argument("--jobs", metavar="N", help="how many compilers run at once (default: one per CPU)")
    return flags


def context_of(arguments: argparse.Namespace) -> Context:
    """Settings and streams as the parsed flags want them."""
    quiet = getattr(arguments, "quiet", False)
    debug = getattr(arguments, "debug", False)
    return Context(
        config=config.load(
            {"cache": getattr(arguments, "cache", None), "jobs": getattr(arguments, "jobs", None)}
        ),
        progress=display(sys.stderr, quiet=quiet, debug=debug),
        json=getattr(arguments, "json", False),
        quiet=quiet,
        debug=debug,
    )


def show_log() -> None:
    """``--debug``: every command line and note of the library on stderr."""
    import logging

    logger = logging.getLogger("kmend")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("kmend: %(relativeCreated)7.0f ms  %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG)


def refuse(error: KmendError, verb: str, context: Context, cause: BaseException | None = None) -> int:
    """Show an error to people on stderr and, with ``--json``, to programs on stdout.

    Returns the exit status that belongs to it.
    """
    if context.debug:
        import traceback

        traceback.print_exception(cause or error, file=sys.stderr)
    sys.stderr.write(text_of(error))
    sys.stderr.flush()
    if context.json and not context.emitted:
        context.emit(document_of(error, verb))
    return error.exit_status


def text_of(error: KmendError) -> str:
    """The error as people read it: what, why, next step of each reason, and where artefacts lie."""
    lines = []
    for reason in error.reasons:
        lines.append(f"kmend: {reason.what}")
        for label, text in (("why", reason.why), ("next", reason.next_step)):
            if text:
                indented = text.rstrip().replace("\n", "\n        ")
                lines.append(f"  {label}:{' ' * (5 - len(label))}{indented}")
    if error.artefacts:
        lines.append(f"  kept: {error.artefacts}")
    return "\n".join(lines) + "\n"


def document_of(error: KmendError, verb: str) -> dict[str, object]:
    """The error as a JSON document, in the form of a build report's ``refused`` rows."""
    return {
        "schema": 1,
        "verb": verb,
        "result": "refused" if isinstance(error, Refused) else "failed",
        "refused": [
            {"rule": row.rule, "what": row.what, "why": row.why, "next_step": row.next_step}
            for row in error.reasons
        ],
        "artefacts": error.artefacts,
    }


def unexpected(error: Exception, context: Context) -> Failed:
    """Turn an exception that nobody foresaw into an error that names a log with its traceback."""
    place = write_log(error, context)
    kept = f"; the details are in {place}" if place else ""
    return Failed(
        f"an error inside kmend: {type(error).__name__}{kept}",
        why=str(error) or "no message",
        next_step="run again with --debug to see where; please report it with the log",
        rule="internal",
    )


def write_log(error: Exception, context: Context) -> str:
    """Keep the traceback in the cache's ``log`` folder, else in the temporary folder.

    Returns the file's path, '' when neither folder can be written.
    """
    import tempfile
    import traceback

    text = f"kmend {__version__}\n{sys.argv}\n" + "".join(traceback.format_exception(error))
    for folder in (context.config.cache / "log", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", prefix="kmend-", suffix=".log", dir=folder, delete=False
            ) as out:
                out.write(text)
            return out.name
        except OSError:
            continue
    return ""
