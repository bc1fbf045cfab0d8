"""What the acting verbs have in common: flags of a transition, the question at a stall, the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from kmend.cli.context import Context
from kmend.core.errors import UsageError
from kmend.core.live import ActionReport, Transition
from kmend.manager import Ask, Choice, Following, Manager, OnStall
from kmend.runtime.follow import Patience

EPILOG = """\
On a stall: tasks that sleep in a function which is about to change are interrupted for a moment (--no-wake
forbids it); their system calls return what they would return under the kernel's own signal, which comes
after 15 seconds. What cannot be woken is waited for, up to --wait seconds; then --on-stall decides.

Exit status: 0 done (with --no-wait: begun); 1 refused, failed, or taken back after a stall; 2 wrong usage;
3 this machine or user cannot do it.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb that follows a transition."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    default = Patience()
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=default.limit,
        metavar="SECONDS",
        help=f"how long a transition may take before it counts as stalled (default: {default.limit:g})",
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="return once the transition has begun; do not follow it"
    )
    parser.add_argument(
        "--on-stall",
        choices=[row.value for row in OnStall],
        default=OnStall.REVERSE.value,
        help="then: go back to how it was (default), wait on, or ask",
    )
    parser.add_argument("--no-wake", action="store_true", help="interrupt no task")
    parser.add_argument(
        "--interrupt-io-uring",
        action="store_true",
        help="interrupt also tasks in io_uring_enter(), which then returns EINTR",
    )


def _seconds(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e7:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of seconds")
    return value


def following(args: argparse.Namespace) -> Following:
    """The flags as a value.

    Raises:
        UsageError: ``--on-stall ask`` without a terminal to ask on.
    """
    if args.on_stall == OnStall.ASK.value and not sys.stdin.isatty():
        raise UsageError(
            "--on-stall ask needs a terminal",
            why="nobody could answer",
            next_step="--on-stall reverse or wait",
            rule="usage",
        )
    return Following(
        wait=not args.no_wait,
        patience=Patience(limit=args.wait, wake=not args.no_wake, io_uring=args.interrupt_io_uring),
        on_stall=OnStall(args.on_stall),
    )


def manager(context: Context) -> Manager:
    """The manager of this machine; asks on the terminal."""
    return Manager(context.config, context.progress, ask=asker(context) if sys.stdin.isatty() else None)


def asker(context: Context) -> Ask:
    """Shows what holds the transition up and reads a letter."""

    def ask(last: Transition | None) -> Choice:
        from kmend.report import live

        context.progress.close()
        lines = list(live.blockers_text(last)) if last is not None else ["no task of user space is left"]
        out = sys.stderr
        out.write("\n".join(lines) + "\n")
        while True:
            out.write("[r]everse, [w]ait on, or [l]eave it as it is? ")
            out.flush()
            word = sys.stdin.readline().strip().lower()
            match word[:1]:
                case "r":
                    return Choice.REVERSE
                case "w":
                    return Choice.WAIT
                case "l":
                    return Choice.LEAVE
                case "":
                    if not word:  # the terminal is gone: the safe way
                        return Choice.REVERSE
                case _:
                    pass

    return ask


def tell(verb: str, reports: Sequence[ActionReport], context: Context) -> int:
    """Print the reports; the verb's exit status."""
    from kmend.report.action import succeeded, to_document, to_text

    context.emit(to_document(verb, reports))
    for report in reports:
        text = to_text(report)
        if succeeded(report):
            context.say(text)
        else:
            context.progress.close()
            sys.stderr.write(text + "\n")
    return 0 if all(map(succeeded, reports)) else 1


def each(verb: str, names: Sequence[str], work: Callable[[str], ActionReport], context: Context) -> int:
    """Do it for each name in turn, up to the first that does not succeed."""
    from kmend.report.action import succeeded

    reports: list[ActionReport] = []
    for name in names:
        try:
            reports.append(work(name))
        except KeyboardInterrupt:
            context.progress.close()
            sys.stderr.write(
                f"\nkmend: interrupted; the kernel goes on with what was begun for {name}: "
                "`kmend status` shows it, the same command again goes on with it\n"
            )
            raise
        if not succeeded(reports[-1]):
            break
    return tell(verb, reports, context)
