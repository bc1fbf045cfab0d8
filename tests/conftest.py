"""What all tests share."""

from __future__ import annotations

import signal

import pytest

from kmend.core.config import Config, load
from kmend.core.progress import Silent
from kmend.core.target import Release, Target
from kmend.kernel.store import fetch


def pytest_configure() -> None:
    """A shell starts what runs in its background deaf to Ctrl-C, and so would be the programs under test."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the tests that boot a guest first: begun last, they would run alone at the end.

    Slow ones are skipped unless the markers asked for name them.
    """
    if "slow" not in config.getoption("markexpr"):
        skip = pytest.mark.skip(reason="slow: run with -m slow")
        for item in items:
            if item.get_closest_marker("slow") is not None:
                item.add_marker(skip)
    items.sort(key=lambda item: item.get_closest_marker("lab") is None)


@pytest.fixture(scope="session")
def config() -> Config:
    """The settings of whoever runs the tests: prepared kernels are shared with daily use."""
    return load()


@pytest.fixture(scope="session")
def target_55(config: Config) -> Target:
    """Debian 6.1.192-1, the kernel with the ext4 crash; downloaded and prepared on first use."""
    return fetch(config, Release("6.1.0-55-amd64"), Silent())


@pytest.fixture(scope="session")
def target_56(config: Config) -> Target:
    """Debian 6.1.192-2, which has the ext4 fix."""
    return fetch(config, Release("6.1.0-56-amd64"), Silent())


@pytest.fixture(scope="session")
def target_612(config: Config) -> Target:
    """Debian's 6.12 line: IBT, padding in front of functions, objtool on the linked image."""
    return fetch(config, Release("6.12.117+deb12-amd64"), Silent())
