"""How a stage tells what it is doing. The command line shows it; tests collect it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol


class Progress(Protocol):
    """Told of every step that may take over a second."""

    def step(self, text: str) -> None:
        """A new step has begun; ``text`` is one line in the present tense."""

    def amount(self, done: int, total: int) -> None:
        """How far the present step is, in its own unit (bytes, files); total 0: unknown."""


class Silent:
    """Shows nothing."""

    def step(self, text: str) -> None:
        pass

    def amount(self, done: int, total: int) -> None:
        pass


class Timings:
    """Wall seconds per named stage; adding to the same name adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start
