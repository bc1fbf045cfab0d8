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

pytestmark = [pytest.mark.lab, pytest.mark.target, pytest.mark.slow]

KILLS = 52
#: Of the random moments.
FIRST = 1
#: A round in the guest, with kmend imported once: each action is its child. Prints a JSON line per trouble.
HARNESS = """
import contextlib, io, json, os, random, signal, sys, time
from pathlib import Path
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

# What is shot at: `load` and `unload` look for a second before they write down that they begin; what changes
# the store does so at once when it holds the lock.
def begun(words, size):
    with contextlib.suppress(OSError):
        if words[0] in ("install", "uninstall", "healthy") and os.stat("/run/kmend.lock").st_size:
            return True
        return os.stat(STATE / "log").st_size != size
    return False

def run(words, kill=None):
    size = os.stat(STATE / "log").st_size if (STATE / "log").exists() else 0
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("/root/out", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sys.argv = ["kmend", *words]
        status = main([*words, "--quiet"])
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    first = None
    while True:
        now = time.monotonic()
        if first is None and begun(words, size):
            first = now
        if kill is not None and first is not None and now >= first + kill:
            os.kill(pid, signal.SIGKILL)
            kill = None
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), now - (first or now), open("/root/out").read()
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

ONE, OTHER, NAPS, ALL = ("/root/%s.ko" % name for name in ("one", "other", "naps", "all_new"))
# what is done, and what is loaded and installed afterwards
CYCLE = [
    (["load", ONE], {"one"}, []),
    (["load", NAPS], {"one", "naps"}, []),
    (["load", ALL], {"all_new"}, []),
    (["unload", "all_new"], set(), []),
    (["install", ONE, OTHER], set(), ["one", "other"]),
    (["load", "--all", "--boot"], {"one", "other"}, ["one", "other"]),
    (["healthy"], {"one", "other"}, ["one", "other"]),
    (["uninstall", "one", "--unload"], {"other"}, ["other"]),
    (["install", ALL], {"other"}, ["all_new", "other"]),
    (["load", "--all"], {"all_new"}, ["all_new", "other"]),
    (["uninstall", "--all"], {"all_new"}, []),
    (["unload", "--all"], set(), []),
]
# The first was killed after it had done its work: the second says that nothing is left to do.
NOTHING = ("already-loaded", "unknown-patch", "no livepatch", "not installed")

measured = Path("/root/times.json")
if not measured.exists():  # once without: it must work, and how long it takes is the measure
    times = {}
    for words, wanted, installed in CYCLE:
        code, took, text = run(words)
        times[" ".join(words)] = took
        now = status()
        if code or set(now[0]) != wanted or now[3] != (installed, None):
            say("undisturbed", words, code, text, now)
    measured.write_text(json.dumps(times))
times = json.loads(measured.read_text())
killed, seen, hit = 0, {}, {}
for words, wanted, installed in CYCLE:
    code, _, _ = run(words, kill=choose.uniform(0, 1.1 * times[" ".join(words)]))
    killed += code == -signal.SIGKILL
    hit[words[0]] = hit.get(words[0], 0) + (code == -signal.SIGKILL)
    between = status()
    for phase in between[0].values():
        seen[phase] = seen.get(phase, 0) + 1
    seen["unfinished"] = seen.get("unfinished", 0) + len(between[2])
    seen["left"] = seen.get("left", 0) + len(between[1])
    seen["litter"] = seen.get("litter", 0) + len(litter())
    code, _, text = run(words)
    done = code == 0 or any(word in text for word in NOTHING)
    now = status()
    clean = set(now[0]) == wanted and set(now[0].values()) <= {"enabled"} and not now[1] and not now[2]
    stored = now[3] == (installed, None) and (words[0] not in ("install", "uninstall") or not litter())
    if not (done and clean and stored):
        say(words, code, text, between, now, litter())
modules = [line.split()[0] for line in open("/proc/modules") if "OEK" in line]
say("end", killed, hit, seen, modules, {key: round(value, 2) for key, value in times.items()})
"""


@pytest.mark.timeout(3600)  # four minutes on an idle machine
def test_fifty_kills_leave_nothing_behind(target_55: Target, config: Config, tmp_path: Path) -> None:
    modules = bank.build(target_55, tmp_path)
    killed, hit, seen = 0, Counter[str](), Counter[str]()
    with Guest.of(target_55, config.lab) as guest:
        inside.settle(guest)
        for name in ("one", "other", "naps", "all_new"):
            guest.put(f"/root/{name}.ko", modules[name].read_bytes())
        guest.put("/root/harness.py", HARNESS.encode())
        guest.run("/usr/bin/sleep 100000 & /usr/bin/sleep 100000 & usleep 200000")
        for seed in range(FIRST, FIRST + 20):
            done = guest.run(f"LANGUAGE=C /usr/bin/python3 /root/harness.py {seed}", timeout=900)
            assert done.status == 0, done.errors
            *troubles, last = [json.loads(line) for line in done.text.splitlines()]
            print(*last, flush=True)
            assert troubles == [], f"seed {seed}"
            killed += last[1]
            hit.update(last[2])
            seen.update(last[3])
            assert last[4] == []
            if killed >= KILLS:
                break
        print(killed, dict(hit), dict(seen))
        assert killed >= KILLS
        assert min(hit[verb] for verb in ("load", "unload", "install", "uninstall")) >= 1
        assert seen["unfinished"] > 5  # some were killed in the middle
        assert not [row for row in guest.dmesg() if "WARNING:" in row.text or "BUG:" in row.text]
