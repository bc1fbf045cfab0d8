"""`kmend module --new` on a real tree: what it writes compiles, links and passes every rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kmend.cli import main
from kmend.core.target import Target

pytestmark = pytest.mark.target


def kmend(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, dict[str, Any]]:
    status = main([*map(str, args), "--json", "--quiet"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("functions", "obj", "source", "declared"),
    [
        (("vfs_read", "__fput"), "vmlinux", "fs/file_table.c", "extern struct percpu_counter nr_files"),
        (("ext4_sync_fs",), "ext4", "fs/ext4/super.c", ""),
        (("do_sys_openat2",), "vmlinux", "fs/open.c", ""),
        (("tcp_rcv_established",), "vmlinux", "net/ipv4/tcp_input.c", "tcp_ack("),
    ],
)
def test_a_beginning_builds_as_it_is(
    functions: tuple[str, ...],
    obj: str,
    source: str,
    declared: str,
    target_55: Target,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [word for name in functions for word in ("--func", name)]
    new = ["module", "--new", "my-begin", *asked, "--object", obj, "--kernel", target_55.release]
    status, made = kmend(capsys, *new, "-o", tmp_path)
    assert status == 0
    assert {row["name"] for row in made["functions"]} == set(functions)
    assert source in {row["source"] for row in made["functions"]}
    folder = tmp_path / "my-begin"
    text = (folder / Path(source).name).read_text()
    assert f"livepatch_{functions[-1]}(" in text
    assert declared in text
    status, built = kmend(capsys, "module", folder, "--kernel", target_55.release, "-o", tmp_path)
    assert (status, built["result"]) == (0, "built"), built["refused"]
    assert built["objects"][0]["name"] == obj
    assert {row["name"] for row in built["objects"][0]["functions"]} == set(functions)
    report = json.loads((tmp_path / "my_begin.json").read_text())
    assert report["sha256"] == built["sha256"]
    status, checked = kmend(capsys, "check", tmp_path / "my_begin.ko")
    assert (status, checked["result"]) == (0, "passed")
    # what was written must not be lost
    status, again = kmend(capsys, *new, "-o", tmp_path)
    assert (status, again["refused"][0]["rule"]) == (2, "exists")


@pytest.mark.parametrize(
    ("arguments", "rule", "what"),
    [
        (("--func", "no_such_function"), "function-not-found", "no_such_function"),
        (("--func", "__x64_sys_read"), "function-not-found", "__x64_sys_read"),
        (("--func", "seq_show"), "function-not-found", "seq_show"),
        (("--func", "vfs_read", "--object", "no_module"), "unknown-module", "no_module"),
    ],
)
def test_what_cannot_be_copied_is_refused_by_name(
    arguments: tuple[str, ...],
    rule: str,
    what: str,
    target_55: Target,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, found = kmend(
        capsys, "module", "--new", "x", *arguments, "--kernel", target_55.release, "-o", tmp_path
    )
    assert status == 1
    assert [(row["rule"], row["what"]) for row in found["refused"]] == [(rule, what)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [(), ("--new", "x"), ("x", "--func", "y"), ("x", "--new", "y", "--func", "z"), ("x", "--sign-key", "k")],
)
def test_wrong_usage_is_said(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, found = kmend(capsys, "module", *arguments)
    assert (status, found["refused"][0]["rule"]) == (2, "usage")
