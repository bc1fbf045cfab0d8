"""The pictures of docs/img: `kmend status`, `status --watch`, `blockers` and `load --report` in a stall.

Everything in them is real: a stock Debian kernel in a guest, patches that kmend has built, tasks that sleep
in the patched functions, and the bytes that kmend wrote to a terminal there. Tasks sleep in
hrtimer_nanosleep(), and three parents of vfork() wait in kernel_clone() until their children go on.

    .venv/bin/pip install -e '.[pictures]'; apt-get install chromium fonts-dejavu-core
    .venv/bin/python bench/screens.py [--keep FOLDER] [--only-draw FOLDER]

``--keep`` leaves what the guest gave in a folder, ``--only-draw`` makes the pictures from such a folder.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyte
from PIL import Image

from kmend.core.config import load
from kmend.core.progress import Silent
from kmend.core.target import Release
from kmend.kernel.store import fetch
from kmend.lab.guest import Guest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/lab"))

import inside  # noqa: E402 - needs the path above

IMAGES = ROOT / "docs/img"
RELEASE = Release("6.1.0-55-amd64")
PATCHES = (ROOT / "examples/ext4-null-folio.patch", ROOT / "bench/pictures/sleepers.patch")
ROWS, COLUMNS = 36, 120
#: Lines of the terminal for what is printed once.
TALL = 200
SLEEPERS, PARENTS = 24, 3
MOUNTS = """
for pair in "debugfs /sys/kernel/debug" "tracefs /sys/kernel/tracing" "securityfs /sys/kernel/security" \\
        "devpts /dev/pts"; do
    set -- $pair; mkdir -p $2; mountpoint -q $2 || mount -t $1 $1 $2
done
hostname web-3
"""
#: A parent of vfork() whose child waits in open() of a FIFO before it calls exec.
PARENT = """
import os, sys
open("/proc/self/comm", "w").write("deploy")
action = (os.POSIX_SPAWN_OPEN, 0, "/root/fifo", os.O_RDONLY, 0)
os.posix_spawn("/usr/bin/true", ["true"], {}, file_actions=[action])
"""
#: Threads that sleep under names of their own.
POOL = """
import threading, time
def work(number):
    open("/proc/thread-self/comm", "w").write(f"pool-{number}")
    time.sleep(1000)
for number in range(4):
    threading.Thread(target=work, args=(number,), daemon=True).start()
threading.Event().wait()
"""


# -- in the guest ----------------------------------------------------------------------------------


#: Everything is imported before the transition begins: Python's start takes long in a guest.
READY = f"""
import sys, time
sys.path.insert(0, "{inside.PLACE}")
from pathlib import Path
from kmend.cli import blockers, main, status
from kmend.core import config, live, report
from kmend.report import build, live
from kmend import origin
Path("/root/ready-" + sys.argv[1]).touch()
while "1" not in [p.read_text()[0] for p in Path("/sys/kernel/livepatch").glob("*/transition")]:
    time.sleep(0.05)
time.sleep(1)
sys.exit(main(sys.argv[1:]))
"""


def on_terminal(command: str, file: str, rows: int = ROWS) -> str:
    """A shell command that runs another one on a terminal and keeps what that writes."""
    size = f"stty rows {rows} cols {COLUMNS}"
    # script passes the end of its own input on as Ctrl-D: there is none here
    return (
        f"tail -f /dev/null | TERM=xterm-256color COLORTERM=truecolor script -qf -c "
        f"'{size}; exec {command}' {file} >/dev/null"
    )


def begin(guest: Guest, command: str) -> None:
    """Run a command there without waiting for it."""
    guest.run(f"setsid sh -c {shell(command)} </dev/null >/dev/null 2>&1 &", check=True)


def shell(words: str) -> str:
    return "'" + words.replace("'", "'\\''") + "'"


def wait_for(guest: Guest, test: str, limit: float = 120.0) -> None:
    """Until a shell test holds there."""
    end = time.monotonic() + limit
    while (done := guest.run(test)).status != 0:
        if time.monotonic() > end:
            seen = guest.run("ps; cat /proc/[0-9]*/stack | sort | uniq -c | sort -n | tail -40").text
            raise SystemExit(f"it has not come in {limit:.0f} s: {test}\n{done.text}\n{seen}")
        time.sleep(0.2)


def actors(guest: Guest) -> None:
    """Tasks that sleep inside of the functions to be patched."""
    guest.put("/root/parent.py", PARENT.encode())
    guest.put("/root/pool.py", POOL.encode())
    guest.run("rm -f /root/fifo; mkfifo /root/fifo", check=True)
    for _ in range(SLEEPERS - 4):
        begin(guest, "exec /usr/bin/sleep 1000")
    begin(guest, "exec /usr/bin/python3 /root/pool.py")
    for _ in range(PARENTS):
        begin(guest, "exec /usr/bin/python3 /root/parent.py")
    stacks = "cat /proc/[0-9]*/task/*/stack 2>/dev/null"
    wait_for(guest, f'[ "$({stacks} | grep -c " kernel_clone+")" = {PARENTS} ]')
    wait_for(guest, f'[ "$({stacks} | grep -c " hrtimer_nanosleep+")" -ge {SLEEPERS} ]')


MOVING = "grep -q 1 /sys/kernel/livepatch/*/transition"


def record(guest: Guest, modules: list[Path], folder: Path) -> None:
    """Everything that the pictures are made of, into the folder."""
    inside.settle(guest, inside.VIEWS)
    guest.run(MOUNTS, check=True)
    for path in modules:
        guest.put(f"/root/{path.name}", path.read_bytes())
        report = path.with_suffix(".json")
        guest.put(f"/root/{report.name}", report.read_bytes())
    first, second = (path.name for path in modules)
    guest.run(f"kmend load /root/{first}", check=True, timeout=120)
    actors(guest)

    guest.put("/root/ready.py", READY.encode())
    for verb in ("status", "blockers"):
        begin(guest, on_terminal(f"/usr/bin/python3 /root/ready.py {verb}", f"/root/{verb}.out", TALL))
        wait_for(guest, f"[ -e /root/ready-{verb} ]")
    begin(guest, f"exec kmend load /root/{second} --no-wake --wait 14")
    wait_for(guest, "grep -q 'Script done' /root/status.out && grep -q 'Script done' /root/blockers.out")
    wait_for(guest, f"! {MOVING} && ! [ -d /sys/module/{second.removesuffix('.ko')} ]")

    # who was interrupted sleeps on in hrtimer_nanosleep_restart(), which is not patched: others begin anew
    guest.run("killall sleep; pkill -f pool.py; pkill -f parent.py; echo go >/root/fifo & sleep 2")
    actors(guest)
    begin(guest, on_terminal("kmend status --watch", "/root/watch.out"))
    wait_for(guest, "grep -q livepatches /root/watch.out")
    begin(guest, f"exec kmend load /root/{second} --wait 60 --report /root/report.html")
    wait_for(guest, MOVING)
    time.sleep(12)
    begin(guest, "exec sh -c 'echo go >/root/fifo'")  # the children call exec, and the parents go on
    wait_for(guest, "[ -s /root/report.html ]")
    time.sleep(4)
    begin(guest, "pkill -INT -f 'status --watch'")
    time.sleep(1)
    for name in ("status.out", "blockers.out", "watch.out", "report.html"):
        (folder / name).write_bytes(guest.run(f"cat /root/{name}", check=True).stdout)


# -- a terminal's bytes as a page ------------------------------------------------------------------

#: pyte knows no dim text (SGR 2): it gets a grey of its own.
_SGR = re.compile(rb"\x1b\[([0-9;]*)m")
_COLOURS = {
    "default": "#d7dbe0", "black": "#1b1f24", "red": "#ff7b72", "green": "#56c98a", "brown": "#e3b341",
    "blue": "#79b8ff", "magenta": "#d2a8ff", "cyan": "#5cc8d7", "white": "#d7dbe0",
}  # fmt: skip
_BACK = "#14181d"
_DIM = "8a94a0"


def undimmed(data: bytes) -> bytes:
    """Dim text as grey text; a colour that is dim keeps its colour."""

    def grey(match: re.Match[bytes]) -> bytes:
        words = match[1].split(b";")
        if words[0] != b"2":
            return match[0]
        red, green, blue = (int(_DIM[at : at + 2], 16) for at in (0, 2, 4))
        rest = b";".join(words[1:])
        return (rest and b"\x1b[" + rest + b"m") or f"\x1b[38;2;{red};{green};{blue}m".encode()

    return _SGR.sub(grey, data)


def body(data: bytes) -> bytes:
    """A typescript without script(1)'s own first and last lines."""
    start = data.index(b"\n") + 1 if data.startswith(b"Script started") else 0
    end = data.rfind(b"\nScript done")
    return data[start : end if end >= 0 else len(data)]


def frames(data: bytes, rows: int = ROWS) -> Iterator[pyte.Screen]:
    """The screen as it is whenever the cursor goes home: once for each picture of a live view."""
    screen = pyte.Screen(COLUMNS, rows)
    stream = pyte.ByteStream(screen)
    for part in re.split(rb"(?=\x1b\[H)", undimmed(body(data))):
        stream.feed(part)
        yield screen


def text_of(screen: pyte.Screen) -> str:
    return "\n".join(screen.display)


def page_of(screen: pyte.Screen, title: str) -> str:
    """The screen as HTML: one span for each stretch of equal characters."""
    used = max((at for at, line in enumerate(screen.display) if line.strip()), default=0) + 1
    lines = []
    for y in range(used):
        spans: list[tuple[str, list[str]]] = []
        for x in range(COLUMNS):
            one = screen.buffer[y][x]
            fore, back = colour(one.fg), _BACK if one.bg == "default" else colour(one.bg)
            if one.reverse:
                fore, back = back, fore
            style = f"color:{fore}" + (f";background:{back}" if back != _BACK else "")
            style += ";font-weight:700" if one.bold else ""
            if spans and spans[-1][0] == style:
                spans[-1][1].append(one.data)
            else:
                spans.append((style, [one.data]))
        lines.append(
            "".join(f'<span style="{style}">{html.escape("".join(text))}</span>' for style, text in spans)
        )
    return f"""<!DOCTYPE html><meta charset="utf-8"><style>
body {{ margin: 0; background: #fff; }}
div.window {{ display: inline-block; background: {_BACK}; border-radius: 10px; margin: 12px;
  box-shadow: 0 2px 9px #0005; overflow: hidden; }}
div.bar {{ background: #2a3038; color: #aeb6bf; font: 13px "DejaVu Sans", sans-serif; padding: 8px 14px; }}
div.bar i {{ display: inline-block; width: 11px; height: 11px; border-radius: 6px; margin-right: 7px;
  background: #59636e; }}
pre {{ margin: 0; padding: 12px 16px 14px; font: 14.95px/17px "DejaVu Sans Mono", monospace; }}
</style><div class="window"><div class="bar"><i></i><i></i><i></i>&nbsp; {html.escape(title)}</div>
<pre>{chr(10).join(lines)}</pre></div>
"""


def colour(name: str) -> str:
    return (
        f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else _COLOURS.get(name.removeprefix("bright"), "#fff")
    )


# -- pages as pictures -----------------------------------------------------------------------------


def photograph(
    page: Path, picture: Path, width: int, height: int, *, dark: bool = False, whole: bool = False
) -> None:
    """Let a browser draw the page; what is empty below it (and, unless ``whole``, beside it) is cut off."""
    with TemporaryDirectory(prefix="kmend-browser-") as profile:
        argv = [
            shutil.which("chromium") or "chromium", "--headless", "--no-sandbox", "--disable-gpu",
            "--hide-scrollbars", f"--user-data-dir={profile}", f"--window-size={width},{height}",
            "--force-device-scale-factor=2", f"--screenshot={picture}", page.as_uri(),
        ]  # fmt: skip
        if dark:
            argv.insert(1, "--blink-settings=preferredColorScheme=0")
        subprocess.run(argv, check=True, capture_output=True, timeout=120)
    image = Image.open(picture).convert("RGB")
    corner = image.getpixel((image.width - 1, image.height - 1))
    plain = Image.new("RGB", image.size, corner)
    from PIL import ImageChops  # noqa: PLC0415 - beside its only use

    box = ImageChops.difference(image, plain).getbbox()
    assert box is not None, f"{page} draws nothing"
    edge = 14
    right = image.width if whole else min(box[2] + edge, image.width)
    image = image.crop((0, 0, right, min(box[3] + edge, image.height)))
    image = image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.LANCZOS)
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(picture, optimize=True)


def draw(folder: Path) -> None:
    """All pictures from what the guest gave."""
    IMAGES.mkdir(exist_ok=True)
    for name in ("status", "blockers"):
        *_, last = frames((folder / f"{name}.out").read_bytes(), TALL)
        (folder / f"{name}.html").write_text(page_of(last, f"kmend {name}"))
        photograph(folder / f"{name}.html", IMAGES / f"{name}.png", 1160, 2400)
    best, page = -1, ""
    for screen in frames((folder / "watch.out").read_bytes()):
        text = text_of(screen)
        worth = text.count("interrupted") + 40 * ("waited for" in text) if "of" in text else 0
        if "tasks left" in text and worth >= best:
            best, page = worth, page_of(screen, "kmend status --watch")
    if not page:
        raise SystemExit("nobody saw the transition: nothing to draw")
    (folder / "watch.html").write_text(page)
    photograph(folder / "watch.html", IMAGES / "status-watch.png", 1160, 1000)
    # the page goes on with the stacks, the checks and the build report
    photograph(folder / "report.html", IMAGES / "load-report.png", 1060, 1320, whole=True)
    photograph(folder / "report.html", IMAGES / "load-report-dark.png", 1060, 1320, dark=True, whole=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="make the pictures of docs/img")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--only-draw", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.only_draw:
        draw(args.only_draw.absolute())
        return 0
    with TemporaryDirectory(prefix="kmend-screens-") as name:
        folder = (args.keep or Path(name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        config = load()
        modules = []
        for patch in PATCHES:
            word = "kmend_" + patch.stem.replace("-", "_")
            argv = [
                sys.executable,
                "-m",
                "kmend",
                "build",
                patch,
                "--kernel",
                RELEASE,
                "-o",
                folder,
                "-n",
                word,
            ]
            subprocess.run(
                [*map(str, argv), "--no-replace", "--quiet"], check=True, stdout=subprocess.DEVNULL
            )
            modules.append(folder / f"{word}.ko")
        with Guest.of(fetch(config, RELEASE, Silent()), config.lab) as guest:
            record(guest, modules, folder)
        draw(folder)
    for path in ("status", "status-watch", "blockers", "load-report", "load-report-dark"):
        sys.stdout.write(f"docs/img/{path}.png\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
