"""What a trial makes of its input and of what it saw, without a guest."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from kmend.core.errors import KmendError, Refused, Unable, UsageError
from kmend.core.kmsg import KernelMessage, reports
from kmend.core.progress import Silent
from kmend.core.trial import Outcome, PatchTrial, Phase, ScriptRun, Side, SysfsObject, SysfsPatch, TrialReport
from kmend.lab import initramfs, kernel, machine, modinfo
from kmend.lab.kernel import LabKernel, boot_modules
from kmend.lab.trial import TrialRequest, _judge, _Script, _with_transitions, run_trial
from kmend.report.verdict import succeeded, to_document, to_text


def module_file(**fields: str) -> bytes:
    """The smallest ELF file that has these modinfo fields, byte by byte."""
    info = b"".join(f"{key}={value}\0".encode() for key, value in fields.items())
    names = b"\0.modinfo\0.shstrtab\0"
    body = info + names
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, 1, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, 3, 2)
    rows = [
        bytes(64),
        struct.pack("<IIQQQQIIQQ", 1, 1, 2, 0, 64, len(info), 0, 0, 1, 0),
        struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0),
    ]
    return head + body + b"".join(rows)


RELEASE = "6.1.0-55-amd64"
MAGIC = f"{RELEASE} SMP preempt mod_unload modversions "


def write(folder: Path, file: str, /, **fields: str) -> Path:
    path = folder / file
    path.write_bytes(module_file(**fields))
    return path


def test_modinfo_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path, "my-fix.ko", livepatch="Y", depends="ext4,crc-t10dif", name="my_fix", vermagic=MAGIC
    )
    info = modinfo.read_livepatch(path)
    assert (info.name, info.release, info.depends) == ("my_fix", RELEASE, ("ext4", "crc_t10dif"))
    unnamed = modinfo.read(write(tmp_path, "other-fix.ko", vermagic=MAGIC))
    assert unnamed.name == "other_fix"
    assert not unnamed.livepatch


def request(
    tmp_path: Path, *patches: Path, release: str = RELEASE, script: Path | None = None
) -> TrialRequest:
    return TrialRequest(release, tmp_path / "vmlinuz", tmp_path, patches, tmp_path / "lab", script)


def refused(tmp_path: Path, *patches: Path, **more: object) -> KmendError:
    with pytest.raises(KmendError) as error:
        run_trial(request(tmp_path, *patches, **more), Silent())  # type: ignore[arg-type]  # as given
    assert not (tmp_path / "lab").exists()
    return error.value


def test_bad_modules_are_refused_before_anything_starts(tmp_path: Path) -> None:
    good = write(tmp_path, "good.ko", livepatch="Y", name="good", vermagic=MAGIC)
    plain = write(tmp_path, "plain.ko", name="plain", vermagic=MAGIC)
    short = tmp_path / "short.ko"
    short.write_bytes(good.read_bytes()[:-100])
    empty = tmp_path / "empty.ko"
    empty.write_bytes(b"")
    for path in (tmp_path, tmp_path / "absent.ko", short, empty):
        error = refused(tmp_path, path)
        assert isinstance(error, UsageError), path
        assert error.what
        assert error.next_step
    error = refused(tmp_path, plain)
    assert isinstance(error, Refused)
    assert error.rule == "not-a-livepatch"
    assert refused(tmp_path, good, release="6.1.0-56-amd64").rule == "vermagic"
    assert refused(tmp_path, good, good).rule == "same-name"
    assert refused(tmp_path, good, script=tmp_path).rule == "script"


def test_no_qemu_and_no_busybox_are_said_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(Unable) as error:
        machine.qemu()
    assert "qemu-system-x86" in error.value.next_step
    with pytest.raises(Unable) as error:
        initramfs.busybox()
    assert "busybox-static" in error.value.next_step


def test_a_dynamic_busybox_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "busybox"
    fake.write_bytes(b"\x7fELF" + bytes(100) + b"/lib64/ld-linux-x86-64.so.2\0")
    monkeypatch.setattr("shutil.which", lambda name: str(fake))
    with pytest.raises(Unable, match="static"):
        initramfs.busybox()


def test_boot_modules_come_in_loading_order_without_what_is_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "BOOT_MODULES", ("virtio_pci", "9p", "overlay"))
    for name in ("virtio-ring", "virtio", "virtio_pci", "netfs", "9pnet", "9p"):
        (tmp_path / f"{name}.ko").write_bytes(name.encode())
    (tmp_path / "modules.dep").write_text(
        "virtio_pci.ko: virtio.ko virtio-ring.ko\n9p.ko: netfs.ko 9pnet.ko\nvirtio.ko: virtio-ring.ko\n"
    )
    (tmp_path / "modules.builtin").write_text("kernel/fs/overlayfs/overlay.ko\n")
    rows = boot_modules(LabKernel(RELEASE, tmp_path / "vmlinuz", tmp_path))
    assert [name for name, _ in rows] == [
        "virtio_ring.ko",
        "virtio.ko",
        "virtio_pci.ko",
        "9pnet.ko",
        "netfs.ko",
        "9p.ko",
    ]
    assert rows[0][1] == b"virtio-ring"
    (tmp_path / "modules.builtin").unlink()
    with pytest.raises(Unable, match="cannot be a guest"):
        boot_modules(LabKernel(RELEASE, tmp_path / "vmlinuz", tmp_path))
    (tmp_path / "modules.dep").unlink()
    with pytest.raises(Unable):
        boot_modules(LabKernel(RELEASE, tmp_path / "vmlinuz", tmp_path))


def test_a_script_without_an_interpreter_goes_to_the_shell() -> None:
    assert _Script("a b.sh", b"#!/bin/sh\n").command == "exec '/kmend/trial/a b.sh'"
    assert _Script("x", b"echo hello\n").command == "exec /bin/sh /kmend/trial/x"


LOG = tuple(
    KernelMessage(seconds, 5, text)
    for seconds, text in (
        (5.0, "livepatch: enabling patch 'fix'"),
        (5.1, "livepatch: 'fix': starting patching transition"),
        (6.35, "livepatch: 'fix': patching complete"),
        (7.0, "livepatch: 'fix': starting unpatching transition"),
        (7.5, "livepatch: 'fix': unpatching complete"),
    )
)
GOOD = PatchTrial("fix", "fix.ko", loaded=True, complete=True, gone=True)


def run_row(status: int | None, phase: Phase = Phase.PATCHED, note: str = "") -> ScriptRun:
    return ScriptRun(phase, status, "out\n", "", 0.5, note)


def test_transition_times_come_from_the_kernels_own_stamps() -> None:
    (patch,) = _with_transitions((GOOD,), Side(messages=LOG))
    assert patch.transition == pytest.approx(1.25)
    assert patch.take_back_transition == pytest.approx(0.5)
    assert patch.unpatched
    (patch,) = _with_transitions((GOOD,), Side(messages=LOG[:2]))
    assert patch.transition is None
    assert not patch.unpatched


OOPS = reports([KernelMessage(1.0, 1, "BUG: kernel NULL pointer dereference, address: 0")])


@pytest.mark.parametrize(
    ("side", "patch", "outcome"),
    [
        (Side(runs=(run_row(0),)), GOOD, Outcome.PASSED),
        (Side(), GOOD, Outcome.PASSED),
        (Side(runs=(run_row(1),)), GOOD, Outcome.FAILED),
        (Side(runs=(run_row(None, note="killed after 120 s"),)), GOOD, Outcome.FAILED),
        (Side(runs=(run_row(0), run_row(1, Phase.RESTORED))), GOOD, Outcome.FAILED),
        (
            Side(),
            replace(GOOD, loaded=False, complete=False, gone=False, problem="loading: no"),
            Outcome.FAILED,
        ),
        (Side(runs=(run_row(0),)), replace(GOOD, gone=False), Outcome.FAILED),
        (Side(runs=(run_row(0),), reports=OOPS), GOOD, Outcome.OOPS),
        (Side(runs=(run_row(None),), lost="QEMU ended"), GOOD, Outcome.LOST),
        (Side(runs=(run_row(None),), lost="the kernel died", reports=OOPS), GOOD, Outcome.OOPS),
    ],
)
def test_the_outcomes_are_told_apart(side: Side, patch: PatchTrial, outcome: Outcome) -> None:
    found, why, next_step = _judge(side, (patch,), scripted=bool(side.runs))
    assert found is outcome
    assert why
    assert bool(next_step) == (outcome is not Outcome.PASSED)


def report(**changes: object) -> TrialReport:
    patched = Side(
        runs=(run_row(0),),
        sysfs=(SysfsPatch("fix", True, False, None, (SysfsObject("ext4", False, ("ext4_sync_fs,1",)),)),),
        messages=LOG,
        taint_before=0,
        taint_after=45056,
        timings={"restore": 0.2},
    )
    stock = Side(runs=(run_row(1, Phase.STOCK),), reports=OOPS, taint_before=0, taint_after=128)
    whole = TrialReport(RELEASE, Outcome.PASSED, "it passed", "", "tcg", (GOOD,), stock, patched)
    return replace(whole, **changes)  # type: ignore[arg-type]  # any of its fields


def test_the_document_is_json_and_has_both_sides() -> None:
    document = json.loads(json.dumps(to_document(report())))
    assert document["result"] == "passed"
    assert document["stock"]["oopses"][0]["headline"].startswith("BUG: kernel NULL")
    assert document["patched"]["taint"]["flags"][-1]["bit"] == 15
    assert document["patched"]["sysfs"][0]["objects"][0] == {
        "name": "ext4",
        "patched": False,
        "functions": ["ext4_sync_fs,1"],
    }
    assert len(document["patched"]["messages"]["livepatch"]) == 5
    assert succeeded(report())
    assert json.loads(json.dumps(to_document(report(stock=None))))["stock"] is None


def test_the_text_tells_people_the_verdict_first() -> None:
    text = to_text(report())
    assert text.splitlines()[0] == "passed: it passed"
    assert "oops on the stock kernel" in text
    assert "bit 15 K" in text
    assert "ext4: not patched (not loaded): ext4_sync_fs,1" in text
    assert "unpatching complete" in text
    lost = report(
        outcome=Outcome.LOST,
        patched=Side(
            runs=(run_row(None, note="the guest was lost"),), lost="it is silent", console=("last words",)
        ),
    )
    assert not succeeded(lost)
    assert "last words" in to_text(lost)


def test_long_output_is_cut_at_its_beginning() -> None:
    long = ScriptRun(Phase.PATCHED, 1, "".join(f"line {n}\n" for n in range(500)), "", 0.1)
    text = to_text(report(patched=Side(runs=(long,))))
    assert "line 499" in text
    assert "line 100\n" not in text
    assert "460 lines before" in text
