"""A trial: the script on the stock kernel and, in another fresh guest, with the patch loaded.

Both guests run at once where the host has two processors. The verdict is the patched run's; then the
patch is taken back, in the same guest, and what is left of it is looked at.
"""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter, strftime

from kmend.core import kmsg
from kmend.core.errors import Refusal, Refused, UsageError
from kmend.core.files import write_atomically
from kmend.core.kmsg import KernelMessage
from kmend.core.progress import Progress, Timings
from kmend.core.trial import (
    Outcome,
    PatchTrial,
    Phase,
    ScriptRun,
    Side,
    SysfsObject,
    SysfsPatch,
    TrialReport,
)
from kmend.lab import modinfo
from kmend.lab.guest import Guest
from kmend.lab.host import Host, Settings
from kmend.lab.kernel import LabKernel
from kmend.lab.modinfo import ModuleInfo
from kmend.lab.outcome import CommandTimeout, KernelOops, LostGuest

#: Where the script and the modules lie in the guest.
PLACE = "/kmend/trial"
#: A script gets this many more seconds after an oops: what waits for a dead task's lock waits forever.
OOPS_GRACE = 15.0
#: Divides the guest's own boot messages from those of the trial.
MARK = "kmend: the trial begins"


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """What to try. ``modules`` is ``…/lib/modules/RELEASE``; ``patches`` are loaded in their order.

    ``timeout`` is for one run of the script, ``transition_timeout`` for one transition, both in seconds.
    ``after``: run the script a third time when the patch has been taken back. ``cache`` is the folder of
    snapshots (``config.lab``), ``vmlinux`` and ``drivers`` as in :class:`~kmend.lab.kernel.LabKernel`. With
    ``keep`` everything that was seen is written to a folder in the cache.
    """

    release: str
    vmlinuz: Path
    modules: Path
    patches: tuple[Path, ...]
    cache: Path
    script: Path | None = None
    keep: bool = False
    after: bool = False
    timeout: float = 120.0
    transition_timeout: float = 60.0
    settings: Settings = field(default_factory=Settings)
    vmlinux: Path | None = None
    drivers: Path | None = None


@dataclass(frozen=True, slots=True)
class _Script:
    """The user's script as it is put into the guest."""

    name: str
    data: bytes

    @property
    def command(self) -> str:
        path = shlex.quote(f"{PLACE}/{self.name}")
        runnable = self.data.startswith((b"#!", b"\x7fELF"))
        return f"exec {path}" if runnable else f"exec /bin/sh {path}"


def run_trial(request: TrialRequest, progress: Progress) -> TrialReport:
    """Try the patches. How it ends is in the report; only a trial that cannot be held raises.

    Raises:
        UsageError: a module or the script cannot be read, or is none.
        Refused: a module is no livepatch, or was made for another kernel.
        Unable: QEMU, busybox or a driver is missing.
        LostGuest, KernelOops: not even the snapshot's guest came up.
        Failed: the cache cannot be written.
    """
    began = perf_counter()
    clock = Timings()
    infos = tuple(modinfo.read_livepatch(path) for path in request.patches)
    _check(infos, request.release)
    script = _read_script(request.script) if request.script else None
    kernel = LabKernel(request.release, request.vmlinuz, request.modules, request.vmlinux, request.drivers)
    host = Host(kernel, request.cache, request.settings, progress)
    host.snapshot().close()  # here, not in the threads: they would both wait for it in silence
    progress.step(f"trying {', '.join(info.name for info in infos)} on {request.release}")

    def verdict() -> None:
        clock.seconds["verdict"] = perf_counter() - began
        follows = "taking the patch back" if any(row.loaded for row in patched.patches) else "no patch is in"
        progress.step(f"verdict after {clock.seconds['verdict']:.1f} s; {follows}")

    patched = _Patched(Guest(host), request, script, infos, verdict)
    stock = _Stock(Guest(host), request, script) if script else None
    _run_both([side for side in (patched, stock) if side is not None])
    clock.seconds.setdefault("verdict", perf_counter() - began)
    side = patched.side()
    patches = _with_transitions(patched.patches, side)
    outcome, why, next_step = _judge(side, patches, script is not None)
    clock.seconds.update(host.clock.seconds)
    clock.seconds["total"] = perf_counter() - began
    report = TrialReport(
        release=request.release,
        outcome=outcome,
        why=why,
        next_step=next_step,
        accel=patched.guest.accel,
        patches=patches,
        stock=stock.side() if stock else None,
        patched=side,
        timings=clock.seconds,
    )
    if not request.keep:
        return report
    return replace(report, artefacts=str(_kept(request.cache, report, patched, stock)))


class _Observer:
    """One guest, and what is seen of it. A guest that is lost ends the story, not the trial."""

    def __init__(self, guest: Guest, request: TrialRequest, script: _Script | None) -> None:
        self.guest = guest
        self.error: BaseException | None = None
        self._request = request
        self._script = script
        self._runs: list[ScriptRun] = []
        self._messages: tuple[KernelMessage, ...] = ()
        self._taints: list[int] = []
        self._sysfs: tuple[SysfsPatch, ...] = ()
        self._lost = ""
        self._console: tuple[str, ...] = ()
        self._death: kmsg.KernelReport | None = None
        self._clock = Timings()

    def story(self) -> None:
        """Everything that happens in this guest."""
        raise NotImplementedError

    def observe(self) -> None:
        """Start the guest, tell its story, end it. Never raises: see ``error``."""
        try:
            with self.guest:
                try:
                    self._begin()
                    self.story()
                except (LostGuest, KernelOops) as error:
                    self._lost = error.what if isinstance(error, KernelOops) else error.why.partition(";")[0]
                    self._console = error.console
                    self._death = error.report if isinstance(error, KernelOops) else None
                    # the log cannot be asked for any more; the console showed the same lines
                    self._messages = self._since_mark(kmsg.parse(self.guest.console()))
        except BaseException as error:
            self.error = error

    def side(self) -> Side:
        """What was seen."""
        reports = kmsg.reports(self._messages)
        if self._death is not None and self._death.headline not in {report.headline for report in reports}:
            reports = (*reports, self._death)
        return Side(
            runs=tuple(self._runs),
            sysfs=self._sysfs,
            messages=self._messages,
            reports=reports,
            taint_before=self._taints[0] if self._taints else None,
            taint_after=self._taints[-1] if len(self._taints) > 1 else None,
            lost=self._lost,
            console=self._console,
            timings={**self._own(self.guest.timings), **self._clock.seconds},
        )

    @staticmethod
    def _own(timings: dict[str, float]) -> dict[str, float]:
        return {name: seconds for name, seconds in timings.items() if name != "boot"}

    def _begin(self) -> None:
        """Mark the kernel log, read the taint and place the script, in one command: each costs 25 ms."""
        command, data = f"mkdir -p {PLACE}; echo '{MARK}' >/dev/kmsg; cat /proc/sys/kernel/tainted", b""
        if self._script:
            path = shlex.quote(f"{PLACE}/{self._script.name}")
            command, data = f"{command}; cat >{path}; chmod 755 {path}", self._script.data
        self._taints.append(int(self.guest.run(command, stdin=data, check=True).text))

    def _look(self) -> None:
        """Read taint, the patches in sysfs and the kernel log."""
        found: list[SysfsPatch] = []
        for line in self.guest.run(_LOOK, check=True).text.splitlines():
            kind, name, *words = line.split()
            if kind == "taint":
                self._taints.append(int(name))
            elif kind == "patch":
                shown = None if words[2] == "-" else words[2] == "1"
                found.append(SysfsPatch(name, words[0] == "1", words[1] == "1", shown, ()))
            elif found:
                patched = SysfsObject(name, words[0] == "1", tuple(words[1:]))
                found[-1] = replace(found[-1], objects=(*found[-1].objects, patched))
        self._sysfs = tuple(found)
        self._messages = self._since_mark(self.guest.dmesg())

    @staticmethod
    def _since_mark(messages: tuple[KernelMessage, ...]) -> tuple[KernelMessage, ...]:
        for at, message in enumerate(messages):
            if message.text == MARK:
                return messages[at + 1 :]
        return messages

    def _run_script(self, phase: Phase) -> None:
        """Run the user's script; how it ends is in the run, also when the guest is lost by it."""
        if self._script is None:
            return
        env = {"KMEND_PHASE": phase.value, "KMEND_KERNEL": self._request.release}
        start = perf_counter()
        status, out, err, note = None, b"", b"", "the guest was lost"
        try:
            with self._clock.measure("run" if phase is not Phase.RESTORED else "run-restored"):
                done = self.guest.run(
                    self._script.command, timeout=self._request.timeout, env=env, oops_grace=OOPS_GRACE
                )
            (status, out, err), note = done, ""
        except CommandTimeout as error:
            out, err = error.done.stdout, error.done.stderr
            seconds = perf_counter() - start
            note = f"killed after {seconds:.0f} s" + (": the kernel had oopsed" if error.oops else "")
        finally:
            self._runs.append(
                ScriptRun(
                    phase=phase,
                    status=status,
                    stdout=out.decode(errors="replace"),
                    stderr=err.decode(errors="replace"),
                    seconds=perf_counter() - start,
                    note=note,
                )
            )


class _Stock(_Observer):
    """The kernel as it is."""

    def story(self) -> None:
        self._run_script(Phase.STOCK)
        self._look()


class _Patched(_Observer):
    """The kernel with the patches loaded, and then taken back."""

    def __init__(
        self,
        guest: Guest,
        request: TrialRequest,
        script: _Script | None,
        infos: tuple[ModuleInfo, ...],
        verdict: Callable[[], None],
    ) -> None:
        super().__init__(guest, request, script)
        self._infos = infos
        self._verdict = verdict
        self.patches = tuple(PatchTrial(info.name, str(info.path)) for info in infos)

    def story(self) -> None:
        with self._clock.measure("load"):
            complete = all(self._load(at, info) for at, info in enumerate(self._infos))
        if complete:
            self._run_script(Phase.PATCHED)
        self._look()
        sysfs = self._sysfs
        self._verdict()
        if any(report.kind is kmsg.ReportKind.OOPS for report in kmsg.reports(self._messages)):
            # tasks died inside of the kernel: a transition would wait for them, and prove nothing
            return
        with self._clock.measure("take-back"):
            for at in reversed(range(len(self._infos))):
                if self.patches[at].loaded:
                    self._take_back(at)
        if self._request.after and all(patch.gone for patch in self.patches):
            self._run_script(Phase.RESTORED)
        self._look()
        # what is told is how it was while the patch was loaded; that it is gone, each patch says
        self._sysfs = sysfs

    def _load(self, at: int, info: ModuleInfo) -> bool:
        """Load one module and wait for its transition; whether that is complete."""
        limit = self._request.transition_timeout
        needed = "".join(f"modprobe {shlex.quote(name)} && " for name in info.depends)
        command = _LOAD.format(
            needed=needed, path=f"{PLACE}/{at}-{info.name}.ko", name=shlex.quote(info.name)
        )
        try:
            done = self.guest.run(command, stdin=info.data, timeout=limit)
        except CommandTimeout as error:
            # it printed that it is loaded before it began to wait
            if not error.done.stdout:
                self._note(at, problem=f"loading did not end within {limit:.0f} s")
                return False
            blockers = (
                self.guest.run(_BLOCKERS.format(state=0)).text or "no task of user space stands in its way"
            )
            self._note(
                at, loaded=True, problem=f"the transition did not end within {limit:.0f} s: {blockers}"
            )
            return False
        self._note(at, loaded=bool(done.stdout), complete=done.status == 0)
        if not done.stdout:
            self._note(at, problem=f"loading: {self._reason(done.errors)}")
        elif done.status != 0:
            self._note(at, problem="loaded, but /sys/kernel/livepatch does not have it as enabled")
        return done.status == 0

    def _take_back(self, at: int) -> None:
        limit = self._request.transition_timeout
        name = self._infos[at].name
        try:
            done = self.guest.run(_TAKE_BACK.format(name=shlex.quote(name)), timeout=limit)
        except CommandTimeout:
            blockers = self.guest.run(_BLOCKERS.format(state=1)).text
            self._note(at, problem=f"taking back did not end within {limit:.0f} s: {blockers}".rstrip(": "))
            return
        if done.status != 0:
            self._note(at, problem=f"taking back: {self._reason(done.errors)}")
            return
        self._note(at, gone=True)

    def _note(self, at: int, **changes: object) -> None:
        rows = list(self.patches)
        rows[at] = replace(rows[at], **changes)  # type: ignore[arg-type]  # field names are checked at run time
        self.patches = tuple(rows)

    def _reason(self, said: str) -> str:
        """What the tool said, with what the kernel said about it."""
        log = self._since_mark(self.guest.dmesg())
        words = [row.text for row in log[-8:] if row.livepatch or row.level < kmsg.WARNING_LEVEL]
        return "; ".join(dict.fromkeys([said.strip().removeprefix("insmod: "), *words]))


#: Prints a word once the module is in. Ends with 0 when the transition is over and the patch enabled.
_LOAD = """\
cat >{path}
{needed}insmod {path} || exit 1
echo loaded
d=/sys/kernel/livepatch/{name}
while read -r moving <$d/transition && [ "$moving" = 1 ]; do usleep 10000; done
read -r enabled <$d/enabled && [ "$enabled" = 1 ]
"""
#: The folder goes when the transition is over (klp_free_patch_start(), kernel/livepatch/core.c); the module's
#: last reference is dropped a moment later, from a work queue.
_TAKE_BACK = """\
d=/sys/kernel/livepatch/{name}
if [ -d $d ] && read -r enabled <$d/enabled && [ "$enabled" = 1 ]; then
    echo 0 >$d/enabled || exit 1
fi
while [ -d $d ]; do usleep 10000; done
tries=0
until rmmod {name} 2>/dev/null; do
    tries=$((tries + 1))
    if [ $tries -gt 100 ]; then rmmod {name}; exit 1; fi
    usleep 20000
done
[ ! -e /sys/module/{name} ]
"""
#: Tasks that have not switched yet: patch_state is {state} (Documentation/livepatch/livepatch.rst).
_BLOCKERS = """\
for d in /proc/[0-9]*/task/[0-9]*; do
    read -r state <$d/patch_state 2>/dev/null || continue
    [ "$state" = {state} ] || continue
    read -r name <$d/comm
    echo "task ${{d##*/}} ($name): $(head -n 4 $d/stack | sed 's/^\\[<0>\\] //' | tr '\\n' ' ')"
done 2>/dev/null | head -n 5
"""
#: The taint, and ``/sys/kernel/livepatch`` (Documentation/ABI/testing/sysfs-kernel-livepatch), line by line.
_LOOK = """\
# not with `read`, which asks for single bytes: a sysctl gives its first byte and then nothing
echo "taint $(cat /proc/sys/kernel/tainted)"
cd /sys/kernel/livepatch || exit 0
for patch in */; do
    [ -d "$patch" ] || continue
    patch=${patch%/}
    replace=-
    [ -r "$patch/replace" ] && read -r replace <"$patch/replace"
    read -r enabled <"$patch/enabled"
    read -r transition <"$patch/transition"
    echo "patch $patch $enabled $transition $replace"
    for object in "$patch"/*/; do
        [ -d "$object" ] || continue
        read -r patched <"$object/patched"
        name=${object#*/}
        functions=
        for function in "$object"*/; do
            [ -d "$function" ] || continue
            function=${function%/}
            functions="$functions ${function##*/}"
        done
        echo "object ${name%/} $patched$functions"
    done
done
"""


def _check(infos: tuple[ModuleInfo, ...], release: str) -> None:
    """Refuse what the kernel could only answer with a less clear word."""
    refusals = [
        Refusal(
            "vermagic",
            f"{info.path} was built for {info.release}",
            f"a livepatch fits one exact kernel, and the trial is of {release}",
            f"leave out --kernel, or build the patch with --kernel {release}",
        )
        for info in infos
        if info.release != release
    ]
    names = [info.name for info in infos]
    refusals += [
        Refusal(
            "same-name",
            f"two of the modules are named {name}",
            "the kernel loads one module of a name",
            "build one of them with another name (-n)",
        )
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if refusals:
        raise Refused(refusals)


def _read_script(path: Path) -> _Script:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the script {path} cannot be read",
            why=error.strerror or str(error),
            next_step="name a file that the guest can run",
            rule="script",
        ) from error
    return _Script(path.name, data)


def _run_both(sides: list[_Observer]) -> None:
    """Run the sides, at once when there are two processors, and raise the first error of the trial itself."""
    if len(sides) == 1 or (os.cpu_count() or 1) < 2:
        for side in sides:
            side.observe()
    else:
        threads = [threading.Thread(target=side.observe, name="kmend-guest") for side in sides]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # interrupted: take the guests from under the threads
            for side in sides:
                side.guest.abandon()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
    for side in sides:
        if side.error is not None:
            raise side.error


_STEP = re.compile(r"^livepatch: '([^']+)': (starting (?:un)?patching transition|(?:un)?patching complete)$")


def _with_transitions(patches: tuple[PatchTrial, ...], side: Side) -> tuple[PatchTrial, ...]:
    """Add what the kernel log says about each patch's transitions."""
    times: dict[tuple[str, str], float] = {}
    for message in side.messages:
        if match := _STEP.match(message.text):
            times[match[1], match[2]] = message.seconds

    def between(name: str, word: str) -> float | None:
        start = times.get((name, f"starting {word} transition"))
        end = times.get((name, f"{word} complete"))
        return None if start is None or end is None else round(max(0.0, end - start), 6)

    return tuple(
        replace(
            patch,
            transition=between(patch.name, "patching"),
            take_back_transition=between(patch.name, "unpatching") if patch.gone else None,
            unpatched=patch.loaded and (patch.name, "unpatching complete") in times,
        )
        for patch in patches
    )


def _judge(side: Side, patches: tuple[PatchTrial, ...], scripted: bool) -> tuple[Outcome, str, str]:
    """The outcome, why, and what to do next; the worst first."""
    if side.oopses:
        oops = side.oopses[0]
        where = f" in {oops.where}" if oops.where else ""
        return (
            Outcome.OOPS,
            f"the kernel died on the patched side{where}: {oops.headline}",
            "read the oops below: its RIP line and call trace name the functions",
        )
    if side.lost:
        return (
            Outcome.LOST,
            f"the guest was lost on the patched side: {side.lost}",
            "try again; if it is lost again, keep the console with --keep",
        )
    for patch in patches:
        if patch.problem:
            return (
                Outcome.FAILED,
                f"{patch.name}: {patch.problem}",
                "the kernel messages below have the kernel's own reason",
            )
    for phase in (Phase.PATCHED, Phase.RESTORED):
        run = side.run_of(phase)
        if run is not None and run.status != 0:
            how = run.note or f"ended with status {run.status}"
            return (
                Outcome.FAILED,
                f"the script, with the patch {'loaded' if phase is Phase.PATCHED else 'taken back'}: {how}",
                "see the script's output",
            )
    for patch in patches:
        if not (patch.complete and patch.gone):
            return (Outcome.FAILED, f"{patch.name} was not taken back", "see the kernel messages")
    done = "the script passed with the patch loaded" if scripted else "the patch was loaded"
    return Outcome.PASSED, f"{done}, and the patch was taken back", ""


def _kept(cache: Path, report: TrialReport, patched: _Patched, stock: _Stock | None) -> Path:
    """Write consoles, kernel logs and outputs to a folder of their own and return it."""
    folder = cache / "kept" / f"{strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    for name, observer, side in (("patched", patched, report.patched), ("stock", stock, report.stock)):
        if observer is None or side is None:
            continue
        write_atomically(folder / f"{name}.console", observer.guest.console().encode())
        log = "".join(f"<{row.level}>[{row.seconds:12.6f}] {row.text}\n" for row in side.messages)
        write_atomically(folder / f"{name}.dmesg", log.encode())
        for run in side.runs:
            write_atomically(folder / f"{run.phase.value}.stdout", run.stdout.encode())
            write_atomically(folder / f"{run.phase.value}.stderr", run.stderr.encode())
    return folder
