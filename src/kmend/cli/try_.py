"""``kmend try``: a livepatch module in a guest that runs the stock kernel."""

from __future__ import annotations

import argparse
from pathlib import Path

from kmend.cli.context import Context
from kmend.core.target import Release

EPILOG = """\
The script runs as root in a guest of its own for each phase, and finds the phase in KMEND_PHASE: "stock",
"patched", and with --after "restored" (in the patched guest, once the patch has been taken back). It sees
this machine's /usr, read-only for the machine (changes stay in the guest), and can modprobe every module of
that kernel; patches are loaded before it starts, so modules that they patch arrive after them.

The verdict is the patched run's exit status. An oops on the stock kernel is shown and is no failure; on the
patched one it is. Exit status: 0 passed; 1 failed, kernel oops or guest lost (--json says which).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``try``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "module", nargs="+", metavar="KO", help="livepatch module; several load in this order"
    )
    parser.add_argument(
        "--kernel", metavar="RELEASE", help="the kernel to boot (default: the one the module was built for)"
    )
    parser.add_argument(
        "--run", metavar="SCRIPT", dest="script", help="script or program to run on both kernels"
    )
    parser.add_argument(
        "--after", action="store_true", help="run it once more when the patch has been taken back"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep consoles, kernel logs and outputs, and name the folder"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=120.0,
        metavar="SECONDS",
        help="limit of one run of the script (default: 120)",
    )
    parser.add_argument(
        "--cpus",
        type=int,
        choices=range(1, 9),
        default=1,
        metavar="N",
        help="processors of a guest (default: 1)",
    )
    parser.add_argument(
        "--accel",
        choices=("auto", "tcg", "kvm"),
        default="auto",
        help="how QEMU runs the guest; auto: KVM if this kernel has been seen to boot under it here",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def run(args: argparse.Namespace, context: Context) -> int:
    """Hold the trial and report it; 0 when it passed, 1 otherwise."""
    from kmend.core.errors import UsageError
    from kmend.kernel import lab_drivers
    from kmend.kernel.prepared import open_target
    from kmend.lab.host import Settings
    from kmend.lab.kernel import LabKernel
    from kmend.lab.machine import Accel
    from kmend.lab.modinfo import read_livepatch
    from kmend.lab.trial import TrialRequest, run_trial
    from kmend.report.verdict import succeeded, to_document, to_text

    if args.after and not args.script:
        raise UsageError(
            "--after needs --run",
            why="it runs the script once more",
            next_step="name the script with --run",
            rule="usage",
        )
    patches = tuple(Path(name) for name in args.module)
    release = Release(read_livepatch(patches[0]).release if args.kernel is None else args.kernel)
    target = open_target(context.config, release)
    kernel = LabKernel.of(target, lab_drivers.provide(context.config, target, context.progress))
    request = TrialRequest(
        release=kernel.release,
        vmlinuz=kernel.vmlinuz,
        modules=kernel.modules,
        vmlinux=kernel.vmlinux,
        drivers=kernel.drivers,
        patches=patches,
        cache=context.config.lab,
        script=Path(args.script) if args.script else None,
        keep=args.keep,
        after=args.after,
        timeout=args.timeout,
        settings=Settings(cpus=args.cpus, accel=None if args.accel == "auto" else Accel(args.accel)),
    )
    report = run_trial(request, context.progress)
    context.emit(to_document(report))
    context.say(to_text(report))
    return 0 if succeeded(report) else 1
