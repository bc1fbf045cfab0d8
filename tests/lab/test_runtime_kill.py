"""kmend is killed at random moments; the same command again always ends in a clean state."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import bank
import inside
import pytest

from kmend.core.config import Config
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel

pytestmark = [pytest.mark.lab, pytest.mark.target, pytest.mark.slow]

KILLS = 52
#: Of the random moments; at most so many rounds are made until every kind of kill has been there.
FIRST, ROUNDS = 1, 20
MODULES = ("one", "other", "naps", "all_new", "doze", "kthread", "sleeper")
#: Of each at least so many: actions by their verb; before the first line of the journal; a replacement, and a
#: stalled load that takes itself back, with an action in the journal that has no end.
WANTED = {
    **dict.fromkeys(("load", "unload", "enable", "disable", "install", "uninstall"), 1),
    **{"before the journal": 3, "replacing": 1, "taking back": 1},
}
#: A round in the guest, with kmend imported once: each action is its child. Prints a JSON line per trouble.
HARNESS = """
import contextlib, io, json, os, random, signal, subprocess, sys, time
from pathlib import Path
from typing import NamedTuple
sys.path.insert(0, "/opt/kmend")
from kmend.cli import main
import kmend.cli.acting, kmend.cli.install, kmend.cli.load_, kmend.cli.status, kmend.cli.unload
import kmend.elf.reader, kmend.installer, kmend.kernel.prepared, kmend.manager, kmend.module.describe
import kmend.plan
import kmend.report.action, kmend.report.live, kmend.running, kmend.verify.provenance, kmend.view

choose = random.Random(int(sys.argv[1]))
STATE = Path("/var/lib/kmend")

def say(*row):
    print(json.dumps(row), flush=True)

def journal():
    return os.stat(STATE / "log").st_size if (STATE / "log").exists() else 0

# What is shot at, from when on: an action writes down that it begins; what changes the store holds the lock
# a moment before that.
def begun(words):
    size = journal()
    def look():
        with contextlib.suppress(OSError):
            if words[0] in ("install", "uninstall", "healthy") and os.stat("/run/kmend.lock").st_size:
                return True
            return os.stat(STATE / "log").st_size != size
        return False
    return look

# The same of a load that stalls: it turns its transition round.
def turned(words):
    was = set()
    def look():
        with contextlib.suppress(OSError):
            was.add(open("/sys/kernel/livepatch/kthread/enabled").read()[0])
            return was == {"0", "1"} and open("/sys/kernel/livepatch/kthread/enabled").read()[0] == "0"
        return "1" in was
    return look

class Step(NamedTuple):
    words: list
    loaded: dict  # patches and their phases afterwards
    installed: list = []
    left: list = []  # modules that are left
    status: int = 0
    first: str = ":"  # a script, before it
    mark: object = begun

# An action, killed `kill` seconds after its start (`early`) or after the mark. Its status; the seconds to the
# mark, and from there to its end; what it said.
def run(step, kill=None, early=False):
    mark = step.mark(step.words)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("/root/out", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sys.argv = ["kmend", *step.words]
        status = main([*step.words, "--quiet"])
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    began, first = time.monotonic(), None
    while True:
        now = time.monotonic()
        if first is None and mark():
            first = now
        since = began if early else first
        if kill is not None and since is not None and now >= since + kill:
            os.kill(pid, signal.SIGKILL)
            kill = None
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            first = first or now
            return os.waitstatus_to_exitcode(status), (first - began, now - first), open("/root/out").read()
        time.sleep(0.0005)

# `kmend status`, in this process: it changes nothing.
def status():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["status", "--json", "--quiet"])
    if code:
        raise SystemExit(f"status: {code} {out.getvalue()}")
    found = json.loads(out.getvalue())
    patches = {row["name"]: row["phase"] for row in found["patches"]}
    return patches, [row["name"] for row in found["left"]], [row["verb"] for row in found["unfinished"]], (
        sorted(row["name"] for row in found["boot"]["patches"]), found["boot"]["trouble"])

# What lies in the store and no index names.
def litter():
    names = set()
    for index in STATE.glob("*/index.json"):
        names |= {row[key] for row in json.loads(index.read_text())["patches"] for key in ("file", "report")}
    there = {path.name for path in STATE.glob("*/*")} | {path.name for path in STATE.glob("*/.*")}
    return sorted(there - names - {"index.json", "attempt.json"})

# What an action should have left, and has not; '' when all is well.
def wrong(step):
    now = status()
    if now != (step.loaded, step.left, [], (step.installed, None)):
        return now
    return litter() if step.words[0] in ("install", "uninstall") else ""

def on(*names):
    return dict.fromkeys(names, "enabled")

ONE, OTHER, NAPS, ALL, DOZE, KTHREAD = (
    "/root/%s.ko" % name for name in ("one", "other", "naps", "all_new", "doze", "kthread"))
# Somebody who stays in the patch's function until the patch is taken back for good.
READER = '''
/usr/bin/dd if=/proc/loadavg of=/dev/null >/dev/null 2>&1 & echo $! >/root/reader
until grep -qF '[doze]' /proc/$(cat /root/reader)/stack; do usleep 20000; done
'''
# What is done, and what is loaded and installed afterwards.
CYCLE = [
    Step(["load", ONE], on("one")),
    Step(["load", NAPS], on("one", "naps")),
    Step(["load", ALL], on("all_new")),
    Step(["unload", "all_new"], {}),
    Step(["load", DOZE], on("doze")),
    Step(["disable", "doze", "--no-wait"], {"doze": "unpatching"}, first=READER),
    Step(["enable", "doze"], on("doze")),
    Step(["disable", "doze"], {}, left=["doze"], first="kill -9 $(cat /root/reader)"),
    Step(["unload", "doze"], {}),
    Step(["load", KTHREAD, "--wait", "2"], {}, status=1, mark=turned),
    Step(["install", ONE, OTHER], {}, ["one", "other"]),
    Step(["load", "--all", "--boot"], on("one", "other"), ["one", "other"]),
    Step(["healthy"], on("one", "other"), ["one", "other"]),
    Step(["uninstall", "one", "--unload"], on("other"), ["other"]),
    Step(["install", ALL], on("other"), ["all_new", "other"]),
    Step(["load", "--all"], on("all_new"), ["all_new", "other"]),
    Step(["uninstall", "--all"], on("all_new")),
    Step(["unload", "--all"], {}),
]
# The first was killed after it had done its work: the second says that nothing is left to do.
NOTHING = ("already-loaded", "unknown-patch", "no livepatch", "not installed")

measured = Path("/root/times.json")
if not measured.exists():  # once without: it must work, and how long it takes is the measure
    times = {}
    for step in CYCLE:
        subprocess.run(["sh", "-c", step.first], check=True, timeout=60)
        code, times[" ".join(step.words)], text = run(step)
        now = wrong(step)
        if code != step.status or now:
            say("undisturbed", step.words, code, text, now)
    measured.write_text(json.dumps(times))
times = json.loads(measured.read_text())
killed, seen, hit = 0, {}, {}

def count(name, number=1):
    hit[name] = hit.get(name, 0) + number

for step in CYCLE:
    subprocess.run(["sh", "-c", step.first], check=True, timeout=60)
    head, rest = times[" ".join(step.words)]
    early = choose.random() < 0.25
    former, size = status(), journal()
    kill = choose.uniform(0, 1.05 * head) if early else choose.uniform(0, 1.1 * rest)
    code, took, _ = run(step, kill, early)
    between = status()
    if code != -signal.SIGKILL:
        times[" ".join(step.words)] = took  # the machine may be less busy now
    else:
        killed += 1
        count(step.words[0])
        if journal() == size:
            count("before the journal")
            if between != former:
                say("nothing was written down", step.words, former, between)
        elif between[2] and step.words == ["load", ALL]:
            count("replacing")
        elif between[2] and step.mark is turned and not early:
            count("taking back")
    for phase in between[0].values():
        seen[phase] = seen.get(phase, 0) + 1
    seen["unfinished"] = seen.get("unfinished", 0) + len(between[2])
    seen["left"] = seen.get("left", 0) + len(between[1])
    seen["litter"] = seen.get("litter", 0) + len(litter())
    code, _, text = run(step)
    done = code == step.status or any(word in text for word in NOTHING)
    now = wrong(step)
    if not done or now:
        say(step.words, code, text, between, now)
modules = [line.split()[0] for line in open("/proc/modules") if "OEK" in line]
measured.write_text(json.dumps(times))
times = {words: [round(seconds, 2) for seconds in row] for words, row in times.items()}
say("end", killed, hit, seen, modules, times)
"""


@pytest.mark.parametrize("line", ["target_55", "target_612"], ids=["6.1", "6.12"])
@pytest.mark.timeout(3600)  # some minutes on an idle machine
def test_fifty_kills_leave_nothing_behind(
    line: str, request: pytest.FixtureRequest, config: Config, tmp_path: Path
) -> None:
    target: Target = request.getfixturevalue(line)
    modules = bank.build(target, tmp_path)
    killed, hit, seen = 0, Counter[str](), Counter[str]()
    with Guest.of(LabKernel.of(target), config.lab) as guest:
        inside.settle(guest)
        for name in MODULES:
            guest.put(f"/root/{name}.ko", modules[name].read_bytes())
        guest.put("/root/harness.py", HARNESS.encode())
        guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
        guest.run("/usr/bin/sleep 100000 & /usr/bin/sleep 100000 & usleep 200000")
        for seed in range(FIRST, FIRST + ROUNDS):
            done = guest.run(f"LANGUAGE=C /usr/bin/python3 /root/harness.py {seed}", timeout=900)
            assert done.status == 0, done.errors
            *troubles, last = [json.loads(row) for row in done.text.splitlines()]
            print(*last, flush=True)
            assert troubles == [], f"seed {seed}"
            killed += last[1]
            hit.update(last[2])
            seen.update(last[3])
            assert last[4] == []
            if killed >= KILLS and all(hit[kind] >= number for kind, number in WANTED.items()):
                break
        print(killed, dict(hit), dict(seen))
        assert killed >= KILLS
        assert {kind: hit[kind] for kind, number in WANTED.items() if hit[kind] < number} == {}
        assert seen["unfinished"] > 5  # some were killed in the middle
        assert not [row for row in guest.dmesg() if "WARNING:" in row.text or "BUG:" in row.text]
