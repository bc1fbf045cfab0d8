"""The outcome of ``kmend diff`` as the contract's JSON document and as text."""

from __future__ import annotations

from kmend.diff.compare import ObjectDiff
from kmend.diff.select import Selection


def to_document(diff: ObjectDiff, selection: Selection) -> dict[str, object]:
    """Schema 1: every list holds objects with the name first."""
    new = diff.new
    return {
        "schema": 1,
        "changed": [
            {"name": new.parts[row.key].name, "original": row.original, "why": row.difference}
            for row in selection.changed
        ],
        "new": [{"name": new.parts[key].name} for key in diff.new_functions],
        "removed": [{"name": diff.old.parts[key].name} for key in diff.removed],
        "data": [
            {"name": new.parts[key].name, "status": "changed", "why": row.what}
            for key, row in diff.changed_data.items()
        ]
        + [{"name": new.parts[key].name, "status": "new", "why": ""} for key in diff.new_data]
        + [{"name": name, "status": "changed", "why": "section"} for name in diff.changed_sections],
        "refused": [
            {"rule": r.rule, "what": r.what, "why": r.why, "next_step": r.next_step}
            for r in selection.refusals
        ],
    }


def to_text(diff: ObjectDiff, selection: Selection) -> str:
    """One line for each finding."""
    document = to_document(diff, selection)
    lines = []
    for kind in ("changed", "new", "removed", "data", "refused"):
        rows = document[kind]
        if not isinstance(rows, list):
            continue
        for row in rows:
            name = row["name"] if "name" in row else f"{row['rule']}: {row['what']}"
            why = row.get("why")
            lines.append(f"{kind:8} {name}" + (f"  ({why})" if why else ""))
    return "\n".join(lines) or "the two objects mean the same"
