"""The documents hold what the code does: every refusal rule has its row, every named file exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Calls whose first argument is a rule's name.
MAKERS = {"Refusal", "PathRule", "refuse", "_refuse", "_refuse_late", "warn", "_warn"}


def strings(node: ast.expr) -> set[str]:
    """The texts that an expression may have, as far as they stand in it (``"a" if x else "b"``)."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.IfExp):
        return strings(node.body) | strings(node.orelse)
    return set()


def rules_in_code() -> set[str]:
    found: set[str] = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Assign) and any(
                isinstance(name, ast.Name) and name.id == "rule" for name in node.targets
            ):
                found |= strings(node.value)
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in MAKERS and node.args:
                found |= strings(node.args[0])
            for keyword in node.keywords:
                if keyword.arg == "rule":
                    found |= strings(keyword.value)
    return found


def rules_in_docs() -> set[str]:
    return set(re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs/refusals.md").read_text(), re.MULTILINE))


def test_every_rule_is_explained_and_every_explained_rule_exists() -> None:
    code, docs = rules_in_code() - {"failed"}, rules_in_docs()
    assert len(code) > 50
    assert sorted(code - docs) == [], "rules without a row in docs/refusals.md"
    assert sorted(docs - code) == [], "rows of rules that no code raises"


def test_links_in_documents_lead_somewhere() -> None:
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            if not target.startswith("http"):
                assert (file.parent / target).exists(), f"{file.name}: {target}"
