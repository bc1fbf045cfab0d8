"""The rules of `kmend check` on a machine that has no target: its facts are those of the target."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bank
import inside
import pytest
from resident import Resident

from kmend.cli import main
from kmend.core.config import Config
from kmend.core.run import run
from kmend.core.target import VMLINUX, Target
from kmend.elf.reader import read
from kmend.lab.guest import Guest
from kmend.verify.symbols import in_vmlinux_init
from kmend.view import TargetView

pytestmark = [pytest.mark.lab, pytest.mark.target]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: What the guest's own files say, as JSON.
FACTS = """
import dataclasses, json, time
from pathlib import Path
from kmend import running
from kmend.elf.reader import read
from kmend.facts import RunningFacts
from kmend.kernel import symvers
from kmend.runtime.observe import observe
from kmend.runtime.place import Place
from kmend.runtime.symbols import SymbolTable
from kmend.verify.symbols import in_vmlinux_init

asked = json.loads(Path("/root/asked.json").read_text())
place = Place()
kernel = observe(place, Path("/var/lib/kmend")).kernel
files, table, layout = running.OwnFiles(kernel), SymbolTable(place), running.layout(place)
distance = running.Linked(table, files.image()).distance


def linked(address):  # per-CPU variables are not moved
    return address - distance if address >> 63 else address


def facts(module):
    return RunningFacts(place, kernel.release, files, layout, table, read(module.read_bytes()))

own = facts(Path("/root/good.ko"))
exports = symvers.ImageExports(files.image())
out = dict(
    unexported=exports.get("kmend_no_such_symbol"),
    number=len(exports),
    exports=[dataclasses.astuple(exports.get(name)) for name in asked["exports"]],
    modules={
        name: [dataclasses.astuple(row) for row in symvers.of_module(files.module(name), name).values()]
        for name in asked["modules"]
    },
    places={name: [linked(row.address) for row in own.named(name)] for name in asked["symbols"]},
    traceable={n: [own.traceable("vmlinux", row.address) for row in own.named(n)] for n in asked["symbols"]},
    init={n: [in_vmlinux_init(own, row.address) for row in own.named(n)] for n in asked["symbols"]},
    vermagic=own.vermagic(),
    layout=dataclasses.asdict(layout),
    checked={},
)
for name in asked["checked"]:
    began = time.monotonic()
    one = facts(Path(f"/root/{name}.ko"))
    found = one.check(f"{name}.ko")
    out["checked"][name] = [
        [dataclasses.astuple(row) for row in found.refusals],
        found.checked,
        [row.what for row in one.unknown],
        time.monotonic() - began,
    ]
print(json.dumps(out))
"""


def built(target: Target, folder: Path) -> dict[str, Path]:
    """A module of kmend's own, of which some are spoilt; two that kmend would not build."""
    for patch in ("cmdline", "ext4-null-folio")[: 2 if target.release.startswith("6.1.0-55") else 1]:
        words = ["build", EXAMPLES / f"{patch}.patch", "--kernel", target.release, "-o", folder, "--quiet"]
        assert main([*map(str, words)]) == 0
    found = {"good": folder / "kmend_cmdline.ko"}
    if (ext4 := folder / "kmend_ext4_null_folio.ko").exists():
        found["module"] = ext4
    plain = found["good"].read_bytes()
    row = read(plain).section("__versions")
    assert row is not None
    at = plain.index(row.data)
    for name, data in (
        ("crc", plain[:at] + struct.pack("<I", 0xDEADBEEF) + plain[at + 4 :]),
        ("vermagic", plain.replace(b" mod_unload ", b" mod_unlo4d ")),
        ("unexported", plain.replace(b"\0klp_enable_patch\0", b"\0klp_enab1e_patch\0")),
        ("nowhere", plain.replace(b"vmlinux.saved_command_line,0", b"vmlinux.saved_command_line,2")),
    ):
        assert len(data) == len(plain)
        found[name] = folder / f"{name}.ko"
        found[name].write_bytes(data)
    wishes = {
        "notrace": bank.WISHES["notrace"],
        "init": bank.Wish((("kernel_init_freeable", 0, bank.NOTHING),)),
        "ext4": bank.Wish((("ext4_sync_fs", 0, bank.NOTHING),), object='.name = "ext4",'),
    }
    for name, wish in wishes.items():
        (folder / f"{name}.c").write_text(wish.source())
        found[name] = folder / f"{name}.ko"
    (folder / "Makefile").write_text("obj-m := " + " ".join(f"{name}.o" for name in wishes) + "\n")
    make = ("make", "-s", "-C", target.source, f"M={folder}", f"CC={target.compiler}", "modules")
    run(make, timeout=300)
    return found


def asked(view: TargetView, modules: dict[str, Path]) -> dict[str, Any]:
    """What the guest is asked about: every export of vmlinux, those of some modules, symbols of all kinds."""
    symbols = view.symbols.symbols()
    text = [row for row in symbols if row.type in "tTwW" and not row.name.startswith("__")]
    percpu = [row for row in symbols if not row.address >> 63]
    some = [*text[::120], *percpu[::20]]
    names = {row.name for row in some if row.name.isidentifier()}
    names |= {"do_syscall_64", "kernel_init_freeable", "start_kernel", "c_start", "fixed_percpu_data"}
    names |= {"kmend_no_such_symbol"}
    return {
        "exports": view.exports.of(VMLINUX),
        "modules": ["jbd2", "9pnet", "libcrc32c", "nf_conntrack"],
        "symbols": sorted(names),
        "checked": list(modules),
    }


@pytest.mark.parametrize("which", ["target_55", "target_612"])
def test_a_machine_without_a_cache_has_the_facts_of_its_target(
    which: str, request: pytest.FixtureRequest, config: Config, tmp_path: Path
) -> None:
    target: Target = request.getfixturevalue(which)
    view = TargetView(config, target)
    modules = built(target, tmp_path)
    questions = asked(view, modules)
    with Guest.of(target, config.lab) as guest:
        kmend = Resident(guest)
        inside.boot_image(guest, target)
        guest.put("/root/asked.json", json.dumps(questions).encode())
        for name, path in modules.items():
            guest.put(f"/root/{name}.ko", path.read_bytes())
        guest.run("[ ! -e /var/cache/kmend ] && modprobe jbd2", check=True)
        found = json.loads(kmend.run(FACTS, timeout=600).text)
        print(which, {name: round(row[3], 2) for name, row in found["checked"].items()})
        same_facts(view, questions, found)
        same_verdicts(view, modules, found["checked"])
        is_held_against_modules(kmend, modules)
        # without an image: what cannot be looked at is named, and nothing is refused for it
        guest.run("rm /boot/vmlinuz*", check=True)
        report = kmend.act("load", "/root/good.ko")
        assert report["status"] == 0
        names = [row["name"] for row in report["checks"] if row["passed"] is None]
        assert names == [
            "rules of kmend check: vermagic",
            "rules of kmend check: exports",
            "rules of kmend check: ftrace entries of vmlinux",
            "running code",
        ]


def same_facts(view: TargetView, questions: dict[str, Any], found: dict[str, Any]) -> None:
    """Exports, places, ftrace, init memory, vermagic and layout."""

    def row(name: str) -> list[object]:
        export = view.exports.get(name)
        assert export is not None
        return [export.name, export.crc, export.owner, export.gpl, export.namespace]

    assert found["unexported"] is None
    assert found["number"] == len(questions["exports"]) > 10_000
    assert found["exports"] == [row(name) for name in questions["exports"]]
    for name, rows in found["modules"].items():
        assert sorted(rows) == sorted(row(one) for one in view.exports.of(name)), name
        assert rows
    symbols = {name: view.symbols.named(name) for name in questions["symbols"]}
    assert found["places"] == {name: [one.address for one in rows] for name, rows in symbols.items()}
    assert sum(len(rows) > 1 for rows in symbols.values()) > 5
    traceable = {
        name: [view.traceable(VMLINUX, one.address) for one in rows] for name, rows in symbols.items()
    }
    # 6.12 has rows of zeros in its table, and a per-CPU variable at 0
    traceable["fixed_percpu_data"] = [False]
    assert found["traceable"] == traceable
    assert sum(map(any, traceable.values())) > 200
    assert sum(not any(row) for row in traceable.values()) > 50
    assert found["init"] == {
        name: [in_vmlinux_init(view.symbols, one.address) for one in rows] for name, rows in symbols.items()
    }
    layout = asdict(view.layout)
    own = {name: value for name, value in found["layout"].items() if value}
    assert own == {name: layout[name] for name in own}
    assert {"version_size", "version_name", "func_old_sympos", "callbacks"} <= own.keys()


def same_verdicts(view: TargetView, modules: dict[str, Path], found: dict[str, Any]) -> None:
    """The rules say of each module what they say against the target, word for word, and leave nothing out."""
    for name, path in modules.items():
        refusals, counts, unknown, _ = found[name]
        checked = view.check(path.read_bytes(), f"{name}.ko")
        assert [row[0] for row in refusals] == [row.rule for row in checked.refusals], name
        assert refusals == [list(asdict(row).values()) for row in checked.refusals], name
        assert (counts, unknown) == (checked.checked, []), name


def is_held_against_modules(kmend: Resident, modules: dict[str, Path]) -> None:
    """`kmend load` says so, and refuses by the rule's name."""
    for name, rule in (
        ("crc", "symbol-version"),
        ("vermagic", "vermagic"),
        ("notrace", "no-ftrace-entry"),
    ):
        report = kmend.act("load", f"/root/{name}.ko")
        assert (report["status"], [row["rule"] for row in report["refused"]]) == (1, [rule]), name
    report = kmend.act("load", "/root/init.ko")
    objections = [row for row in report["checks"] if row["name"] == "rules of kmend check"]
    assert (report["status"], [row["passed"] for row in objections]) == (1, [False])
    assert "old-function" in [row["rule"] for row in report["refused"]]  # others have their own words for it
    for name in ("good", "module"):
        if name in modules:
            report = kmend.act("load", f"/root/{name}.ko")
            assert report["status"] == 0
            (row,) = [row for row in report["checks"] if row["name"].startswith("rules of kmend check")]
            assert row["passed"] is True
            assert "things looked at in the kernel's own files, no objection" in row["text"]
            assert kmend.act("unload", report["patch"])["status"] == 0
