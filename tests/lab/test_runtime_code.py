"""The code that runs is the code of the image: every function of running stock kernels."""

from __future__ import annotations

import json
from pathlib import Path

import bank
import inside
import pytest

from kmend.core.config import Config
from kmend.core.target import Target
from kmend.lab.guest import Guest

pytestmark = [pytest.mark.lab, pytest.mark.target]

ALL = """
import json, sys
sys.path.insert(0, "/opt/kmend")
from pathlib import Path
from kmend.kernel.vmlinux import Image
from kmend.running import RunningCode
from kmend.runtime.place import Place

code = RunningCode(Place(), Image.open(Path("/root/vmlinux")), lambda name: None)
found = code.all_functions()
print(json.dumps([found.functions, found.size, found.left_out, [str(row) for row in found.differences]]))
"""


@pytest.mark.parametrize("which", ["target_55", "target_612"])
def test_every_function_of_a_running_kernel_is_that_of_its_image(
    which: str, request: pytest.FixtureRequest, config: Config
) -> None:
    target: Target = request.getfixturevalue(which)
    with Guest.of(target, config.lab) as guest:
        inside.settle(guest)
        guest.put("/root/vmlinux", target.vmlinux.read_bytes())
        guest.put("/root/all.py", ALL.encode())
        done = guest.run("/usr/bin/python3 /root/all.py", timeout=600, check=True)
    functions, size, left_out, differences = json.loads(done.text)
    assert differences == []
    assert functions > 40_000
    assert left_out < 0.12 * size


def test_changed_code_is_refused_and_a_probe_that_is_shown_is_not(
    target_55: Target, config: Config, tmp_path: Path
) -> None:
    modules = bank.build(target_55, tmp_path)
    with Guest.of(target_55, config.lab) as guest:
        inside.settle(guest)
        guest.put("/root/one.ko", modules["one"].read_bytes())
        inside.boot_image(guest, target_55)
        guest.run(
            "cd /sys/kernel; mountpoint -q tracing || mount -t tracefs tracefs tracing; cd tracing\n"
            "mountpoint -q ../debug || mount -t debugfs debugfs ../debug\n"
            "echo 'p:x cmdline_proc_show+0x10' >kprobe_events && echo 1 >events/kprobes/x/enable",
            check=True,
        )
        found = inside.answer(guest, "load", "/root/one.ko")
        assert found["status"] == 0
        (row,) = [row for row in found["actions"][0]["checks"] if row["name"] == "running code"]
        assert row["passed"] is True
        assert row["text"].startswith("1 functions")
        assert inside.answer(guest, "unload", "one")["status"] == 0
        # unseen, the probe is a change of the code like any other
        guest.run("umount -l /sys/kernel/debug", check=True)
        found = inside.answer(guest, "load", "/root/one.ko")
        assert found["status"] == 1
        assert [row["rule"] for row in found["actions"][0]["refused"]] == ["running-code"]
        assert guest.run("ls /sys/kernel/livepatch").text == ""
