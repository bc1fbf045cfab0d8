"""What all tests share."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests that boot a guest to one worker (``--dist loadgroup``), first of all.

    Several guests at once would only slow each other down and make time limits lie; and begun
    last, they would run alone at the end.
    """
    for item in items:
        if item.get_closest_marker("lab") is not None:
            item.add_marker(pytest.mark.xdist_group("lab"))
    items.sort(key=lambda item: item.get_closest_marker("lab") is None)
