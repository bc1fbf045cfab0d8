"""Targets of a user's own parts that are not of one build: refused, with what differs.

A custom target is made by copying and preparing a whole tree (50 s). What that yields is put together here
from a prepared kernel, with links in place of copies, so that every stage behind it does its real work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from kmend.cli import main
from kmend.core.run import run
from kmend.core.target import Target
from kmend.kernel.overlay import make_overlay

pytestmark = pytest.mark.target

CMDLINE = "fs/proc/cmdline.c"
CHANGE = ("saved_command_line);\n", 'saved_command_line);\n\tseq_puts(m, " patched");\n')

Custom = Callable[[Target, Path], str]


@pytest.fixture
def custom(tmp_path: Path) -> Custom:
    """Make a custom target of a prepared one and another tree, in a cache of its own; returns its name."""

    def make(target: Target, source: Path) -> str:
        name = f"{target.release}@custom"
        folder = tmp_path / "cache" / "targets" / name
        folder.mkdir(parents=True)
        for entry in target.folder.iterdir():
            # commands and glue belong to one tree
            if entry.name not in ("source", "target.json", "commands") and "glue" not in entry.name:
                (folder / entry.name).symlink_to(entry)
        (folder / "source").symlink_to(source)
        record = json.loads((target.folder / "target.json").read_bytes())
        (folder / "target.json").write_text(json.dumps({**record, "source_version": "custom"}))
        return name

    return make


def patch_of(tmp_path: Path, source: Path, path: str, before: str, after: str) -> Path:
    """A patch of one file, with a single line of context."""
    old = (source / path).read_text()
    assert old.count(before) == 1
    (tmp_path / "old.c").write_text(old)
    (tmp_path / "new.c").write_text(old.replace(before, after))
    labels = ["--label", f"a/{path}", "--label", f"b/{path}"]
    made = run(["diff", "-U1", *labels, tmp_path / "old.c", tmp_path / "new.c"], check=False)
    (tmp_path / "the.patch").write_bytes(made.stdout)
    return tmp_path / "the.patch"


def build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], patch: Path, name: str
) -> tuple[int, Mapping[str, object], list[dict[str, str]]]:
    """`kmend build --json`: status, document, the reasons of a refusal."""
    (tmp_path / "out").mkdir()
    words = ["build", str(patch), "--kernel", name, "--cache", str(tmp_path / "cache"), "--json", "--quiet"]
    status = main([*words, "-o", str(tmp_path / "out")])
    document = json.loads(capsys.readouterr().out)
    return status, document, document["refused"]


def test_a_tree_with_one_altered_constant(
    target_56: Target, custom: Custom, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``return 0`` is ``return 1`` in the user's tree, in the very function that the patch changes."""
    text = (target_56.source / CMDLINE).read_text()
    shown = text.index("cmdline_proc_show")
    altered = text[:shown] + text[shown:].replace("return 0;", "return 1;", 1)
    tree = make_overlay(target_56.source, {CMDLINE: altered.encode()}, tmp_path / "tree")
    patch = patch_of(tmp_path, tree, CMDLINE, *CHANGE)
    status, document, refused = build(tmp_path, capsys, patch, custom(target_56, tree))
    assert (status, document["result"]) == (1, "refused")
    assert [row["rule"] for row in refused] == ["provenance"]
    assert "cmdline_proc_show" in refused[0]["what"]
    assert "movl $1, %eax" in refused[0]["why"], "as the tree has it"
    assert "xorl %eax, %eax" in refused[0]["why"], "as the kernel has it"
    assert refused[0]["next_step"]
    assert list((tmp_path / "out").iterdir()) == []


def test_the_same_tree_unaltered_is_built_for(
    target_56: Target, custom: Custom, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The proof that nothing but the constant made the difference."""
    text = (target_56.source / CMDLINE).read_bytes()
    tree = make_overlay(target_56.source, {CMDLINE: text}, tmp_path / "tree")
    patch = patch_of(tmp_path, tree, CMDLINE, *CHANGE)
    status, document, _ = build(tmp_path, capsys, patch, custom(target_56, tree))
    assert (status, document["result"]) == (0, "built")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_the_source_of_another_release(
    target_55: Target,
    target_56: Target,
    custom: Custom,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Debian's 6.1.192-2 in place of 6.1.192-1: one file differs, and that one is to be patched."""
    patch = patch_of(
        tmp_path,
        target_56.source,
        "fs/ext4/mballoc.c",
        'mb_debug(sb, "load group %u\\n", group);\n',
        'mb_debug(sb, "load the group %u\\n", group);\n\tcond_resched();\n',
    )
    status, document, refused = build(tmp_path, capsys, patch, custom(target_55, target_56.source))
    assert (status, document["result"]) == (1, "refused")
    assert {row["rule"] for row in refused} == {"provenance"}
    assert any("ext4_mb_load_buddy_gfp" in row["what"] for row in refused)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_vmlinux_of_another_release(
    target_55: Target, target_56: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is copied: the configuration names the release that it was made for."""
    cache = tmp_path / "cache"
    words = ["kernel", "fetch", "--source", str(target_56.source), "--config", str(target_56.config)]
    words += ["--symvers", str(target_56.symvers), "--vmlinux", str(target_55.vmlinux)]
    assert main([*words, "--cache", str(cache), "--json", "--quiet"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["refused"]
    assert row["rule"] == "custom-mismatch"
    assert "6.1.0-56-amd64" in row["why"]
    assert "6.1.0-55-amd64" in row["why"]
    assert not cache.exists()
