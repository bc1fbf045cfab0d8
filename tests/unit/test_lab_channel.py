"""The host's side of the agent's protocol, against an agent that misbehaves."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from time import monotonic

import pytest

from kmend.lab.channel import Channel, Done, Expired, Hangup


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def soon() -> float:
    return monotonic() + 0.3


def test_a_command_and_its_answer_carry_any_bytes(ends: tuple[Channel, socket.socket]) -> None:
    channel, agent = ends
    channel.send("cat", b"\0in\n", soon())
    assert agent.recv(4096) == b"run 1 3 4\ncat\0in\n"
    agent.sendall(b"done 1 3 4 5\n\0\n\xff!err\n\0")
    assert channel.wait(soon()) == Done(3, b"\0\n\xff!", b"err\n\0")


def test_an_answer_in_pieces(ends: tuple[Channel, socket.socket]) -> None:
    channel, agent = ends
    channel.send("x", b"", soon())
    for piece in (b"do", b"ne 1 0 3", b" 0\nab"):
        agent.sendall(piece)
        with pytest.raises(Expired):
            channel.wait(monotonic() + 0.02)
    agent.sendall(b"c")
    assert channel.wait(soon()).text == "abc"


def test_an_answer_to_an_older_command_is_dropped(ends: tuple[Channel, socket.socket]) -> None:
    channel, agent = ends
    channel.send("old", b"", soon())
    channel.send("new", b"", soon())
    agent.sendall(b"done 1 0 3 0\nolddone 2 0 3 0\nnew")
    assert channel.wait(soon()).text == "new"


@pytest.mark.parametrize("said", [b"nonsense\n", b"done 1 0 0\n", b"done 1 x 0 0\n", b"done 1 0 -1 0\n"])
def test_nonsense_is_a_hangup(ends: tuple[Channel, socket.socket], said: bytes) -> None:
    channel, agent = ends
    channel.send("x", b"", soon())
    agent.sendall(said)
    with pytest.raises(Hangup):
        channel.wait(soon())


def test_the_other_end_goes_away(ends: tuple[Channel, socket.socket]) -> None:
    channel, agent = ends
    channel.send("x", b"", soon())
    agent.close()
    with pytest.raises(Hangup):
        channel.wait(soon())


def test_an_agent_that_reads_nothing_does_not_hold_us(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    start = monotonic()
    with pytest.raises(Hangup):
        channel.send("x", bytes(50_000_000), monotonic() + 0.2)
    assert monotonic() - start < 5


def test_what_watches_may_stop_the_wait(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    calls = 0

    def watch() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError

    channel.send("x", b"", soon())
    with pytest.raises(KeyError):
        channel.wait(monotonic() + 5, watch)
