"""kmend is killed at random moments; the same command again always ends in a clean state."""

from __future__ import annotations

import json
from pathlib import Path

import bank
import inside
import pytest

from kmend.core.config import Config
from kmend.core.target import Target
from kmend.lab.guest import Guest

pytestmark = [pytest.mark.lab, pytest.mark.target, pytest.mark.slow]

KILLS = 54
#: Runs in the guest, with kmend imported once: each action is its child. Prints one JSON line per trouble.
HARNESS = """
import io, json, os, random, signal, subprocess, sys, time
sys.path.insert(0, "/opt/kmend")
from kmend.cli import main
import kmend.cli.acting, kmend.cli.load_, kmend.cli.status, kmend.cli.unload, kmend.manager
import kmend.elf.reader, kmend.kernel.prepared, kmend.module.describe, kmend.report.action, kmend.running

seed, kills = int(sys.argv[1]), int(sys.argv[2])
choose = random.Random(seed)

def say(line):
    print(line, flush=True)

def run(words, kill=None):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("/root/out", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        status = main(words)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    # most of the time goes into checks: what is measured, and shot at, is what follows the journal's entry
    begun = None
    size = written()
    while True:
        now = time.monotonic()
        if begun is None and written() != size:
            begun = now
        if kill is not None and begun is not None and now >= begun + kill:
            os.kill(pid, signal.SIGKILL)
            kill = None
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), now - (begun or now), open("/root/out").read()
        time.sleep(0.001)

def written():
    try:
        return os.stat("/var/lib/kmend/log").st_size
    except FileNotFoundError:
        return 0

def state():
    status, _, text = run(["status", "--json", "--quiet"])
    if status:
        raise SystemExit(f"status: {status} {text}")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])

def there():
    found = state()
    return ({row["name"]: row["phase"] for row in found["patches"]}, [row["name"] for row in found["left"]],
            [row["verb"] for row in found["unfinished"]])

CYCLE = [
    (["load", "/root/one.ko"], {"one"}),
    (["load", "/root/naps.ko"], {"one", "naps"}),
    (["load", "/root/all_new.ko"], {"all_new"}),
    (["unload", "all_new"], set()),
    (["load", "/root/other.ko"], {"other"}),
    (["unload", "--all"], set()),
]
subprocess.Popen(["/usr/bin/sleep", "100000"])
subprocess.Popen(["/usr/bin/sleep", "100000"])
time.sleep(0.2)
times = {}
for words, wanted in CYCLE:  # once without: it must work, and how long it takes is the measure
    status, took, text = run(words)
    times[tuple(words)] = took
    if status or set(there()[0]) != wanted:
        say(json.dumps(["undisturbed", words, status, text, there()]))
killed = finished = 0
seen = {}
while killed < kills:
    for words, wanted in CYCLE:
        status, _, _ = run(words, kill=choose.uniform(0, 1.1 * times[tuple(words)]))
        killed += status == -signal.SIGKILL
        between = there()
        for phase in between[0].values():
            seen[phase] = seen.get(phase, 0) + 1
        seen["unfinished"] = seen.get("unfinished", 0) + len(between[2])
        seen["left"] = seen.get("left", 0) + len(between[1])
        status, _, text = run(words)
        # it had been done before it was killed: the second says so
        done = status == 0 or "already-loaded" in text or "unknown-patch" in text or "no livepatch" in text
        now = there()
        clean = set(now[0]) == wanted and set(now[0].values()) <= {"enabled"} and not now[1] and not now[2]
        if not (done and clean):
            say(json.dumps([killed, words, status, text, between, now]))
modules = [line.split()[0] for line in open("/proc/modules") if "OEK" in line]
say(json.dumps(["end", killed, seen, modules, times.__repr__()]))
"""


@pytest.mark.timeout(3600)  # two minutes on an idle machine
def test_fifty_kills_leave_nothing_behind(target_55: Target, config: Config, tmp_path: Path) -> None:
    modules = bank.build(target_55, tmp_path)
    with Guest.of(target_55, config.lab) as guest:
        inside.settle(guest)
        for name in ("one", "other", "naps", "all_new"):
            guest.put(f"/root/{name}.ko", modules[name].read_bytes())
        guest.put("/root/harness.py", HARNESS.encode())
        done = guest.run(f"/usr/bin/python3 /root/harness.py 1 {KILLS}", timeout=3000)
        assert done.status == 0, done.errors
        *troubles, last = [json.loads(line) for line in done.text.splitlines()]
        assert troubles == []
        assert last[1] >= KILLS - 3
        assert last[3] == []
        assert last[2].get("unfinished", 0) > 5, last  # some were killed in the middle
        assert not [row for row in guest.dmesg() if "WARNING:" in row.text or "BUG:" in row.text]
