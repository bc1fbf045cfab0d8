"""The views of a transition under way, as a user's terminal and browser get them: in guests with a stall."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import bank
import inside
import pytest

from kmend.core.config import Config
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel

pytestmark = [pytest.mark.lab, pytest.mark.target]

EVIL = "<script>x=1"  # TASK_COMM_LEN leaves 15 characters
#: Two that sleep in hrtimer_nanosleep(), one of them under a name that is markup to a browser.
ACTORS = f"""
cp /usr/bin/sleep '/root/{EVIL}'
(exec '/root/{EVIL}' 1000) </dev/null >/dev/null 2>&1 &
/usr/bin/sleep 1000 </dev/null >/dev/null 2>&1 &
mkdir -p /dev/pts; mountpoint -q /dev/pts || mount -t devpts devpts /dev/pts
sleep 1
"""
#: script(1) passes the end of its own input on as Ctrl-D: it gets one that never ends.
WATCH = """
command='stty rows 30 cols 110; exec kmend status --watch'
command='stty rows 30 cols 110; exec kmend status --watch'
(tail -f /dev/null | TERM=xterm script -qf -c "$command" /root/watch) </dev/null >/dev/null 2>&1 &
for i in $(seq 200); do grep -q livepatch /root/watch 2>/dev/null && break; usleep 100000; done
"""


@pytest.fixture(
    scope="module",
    params=["target_55", pytest.param("target_612", marks=pytest.mark.slow)],
    ids=["6.1", "6.12"],
)
def guest(
    request: pytest.FixtureRequest, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    target: Target = request.getfixturevalue(request.param)
    module = bank.build(target, tmp_path_factory.mktemp("bank"))["naps"]
    with Guest.of(LabKernel.of(target), config.lab) as running:
        inside.settle(running, inside.VIEWS)
        running.put("/root/naps.ko", module.read_bytes())
        running.run(ACTORS, check=True)
        yield running


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_load_is_watched_and_reported(guest: Guest) -> None:
    guest.run(WATCH, timeout=60)
    found = inside.answer(guest, "load", "/root/naps.ko", "--report", "/root/report.html")
    action: dict[str, Any] = found["actions"][0]
    assert (found["status"], action["result"]) == (0, "done"), action
    names = {row["name"] for row in action["transitions"][0]["at_first"]["blockers"]}
    assert {EVIL, "sleep"} <= names
    page = guest.run("cat /root/report.html", check=True).text
    elements = Elements(page)
    assert "svg" in elements.found
    assert not elements.found & {"script", "iframe", "object", "link"}
    assert EVIL in elements.text
    for words in (
        "naps is in force",
        "interrupted",
        "hrtimer_nanosleep",
        "patching complete",
        action["sha256"],
    ):
        assert words in elements.text, words
    watched = guest.run("cat /root/watch", check=True).text
    assert "patching naps" in watched
    assert "hrtimer_nanosleep()" in watched
    assert EVIL in watched
    assert "\x1b[?1049h" in watched
    steps = [row["text"] for row in action["timeline"] if row["tids"]]
    assert steps, action["timeline"]

    refused = inside.answer(guest, "load", "/root/naps.ko", "--report", "/root/refused.html")
    assert refused["status"] == 1
    text = Elements(guest.run("cat /root/refused.html", check=True).text).text
    assert "refused · already-loaded" in text
