"""The one door for subprocesses: list arguments, checked, time-limited, replayable."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import Failed, Unable

log = logging.getLogger("kmend.run")

#: What a child sees of our environment; everything else is scrubbed so that a
#: user's CFLAGS or MAKEFLAGS cannot change what is compiled.
KEEP = ("PATH", "HOME", "TMPDIR", "XDG_CACHE_HOME", "http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True, slots=True)
class Result:
    """A finished child: exit status (negative: the signal that ended it) and output bytes."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")

    @property
    def errors(self) -> str:
        return self.stderr.decode(errors="replace")


class Children:
    """The children that several threads run for one piece of work, to be ended together.

    An interrupt (or a failure) reaches one thread only; without this the others would wait
    for their children to end by themselves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    @property
    def stopped(self) -> bool:
        return self._stopped

    def stop(self) -> None:
        """Kill every child with its process group; a later ``run`` with this object raises Failed."""
        with self._lock:
            self._stopped = True
            for child in self._alive:
                if child.returncode is not None:
                    continue  # already waited for: its number may be another process's by now
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def _add(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._alive.add(child)
            if self._stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def _ended(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._alive.discard(child)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The scrubbed environment of a child: ``KEEP``, the C locale, then ``extra``."""
    env = {name: os.environ[name] for name in KEEP if name in os.environ}
    env["LC_ALL"] = "C"
    env.update(extra or {})
    return env


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    timeout: float = 600.0,
    check: bool = True,
    clean_env: bool = True,
    pass_fds: Sequence[int] = (),
    children: Children | None = None,
) -> Result:
    """Run ``argv`` to its end and return its output.

    ``timeout`` is in seconds; the child's whole process group is killed when it
    is over or when we are interrupted. ``env`` adds to the scrubbed environment
    (``clean_env=False``: replaces it whole). The child inherits ``pass_fds`` (a lock that it
    shall hold with us). With ``children`` another thread can end it.

    Raises:
        Unable: the program does not exist.
        Failed: it took longer than ``timeout``, ``children`` was stopped, or (``check``) it
            ended with a status other than 0.
    """
    args = [os.fspath(a) for a in argv]
    line = shlex.join(args)
    log.debug("%s%s", f"cd {shlex.quote(str(cwd))} && " if cwd else "", line)
    try:
        child = subprocess.Popen(
            args,
            cwd=cwd,
            env=environment(env) if clean_env else dict(env or {}),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError as error:
        raise Unable(
            f"the program {args[0]} is not there"
            if not cwd or cwd.is_dir()
            else f"the folder {cwd} is not there",
            why=str(error),
            next_step="run `kmend doctor` or `make setup` in a checkout: both name the package that has it",
            rule="missing-tool",
        ) from error
    except OSError as error:
        raise Failed(f"{args[0]} could not be started", why=str(error), rule="subprocess") from error
    try:
        if children is not None:
            children._add(child)
        out, err = child.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        _kill(child)
        raise Failed(f"{args[0]} did not end within {timeout:g} s", why=line, rule="timeout") from error
    except BaseException:
        _kill(child)
        raise
    finally:
        if children is not None:
            children._ended(child)
    if children is not None and children.stopped:
        raise Failed(
            f"{Path(args[0]).name} was stopped", why="another part of the work failed", rule="stopped"
        )
    result = Result(tuple(args), child.returncode, out, err)
    if check and result.status != 0:
        tail = (result.errors.strip() or result.text.strip()).splitlines()[-15:]
        raise Failed(
            f"{Path(args[0]).name} ended with status {result.status}",
            why="\n".join(tail),
            next_step=f"by hand: {line}" if len(line) < 400 else "run again with --debug to see the command",
            rule="subprocess",
        )
    return result


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # closing flushes what a dead reader cannot take
                stream.close()
