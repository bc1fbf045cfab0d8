"""The model replays the kernel's own livepatch selftests: the scripts are read from the target's source.

Each scenario's log on the model must be the text that the script hands to ``check_result``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from klp_modules import LIVEPATCHES, PLAIN, VMLINUX, World
from klp_shell import Exit, Shell, Unsupported

from kmend.core.target import Target
from kmend.klp import core, sysfs
from kmend.klp.ftrace import set_ftrace_enabled
from kmend.klp.line import LINES, Line
from kmend.klp.module import delete_module, load_module
from kmend.klp.sched import advance, fork, new_kernel_tasks, seconds
from kmend.klp.structs import DEBUG_FUNCTIONS, EINVAL, Kernel, Level, Patch
from kmend.klp.transition import klp_init_transition

pytestmark = pytest.mark.target

SELFTESTS = Path("tools/testing/selftests/livepatch")
#: What check_result keeps of the log, and what it then leaves out (functions.sh).
KEPT = re.compile("livepatch:|test_klp")
LEFT_OUT = re.compile("(tainting|taints) kernel")
#: What `insmod` of kmod says for EINVAL (mod_strerror() in tools/insmod.c); `modprobe` prints strerror().
INSMOD_WORDS = {EINVAL: "Invalid parameters"}
STOCK = "as without any patch\n"


class Died(Exception):
    """The script called ``die``."""


@dataclass
class Scenario:
    """A finished scenario: what the script expected and what the model logged."""

    script: str
    name: str
    expected: list[str]
    found: list[str]
    warned: list[str]

    @property
    def same(self) -> bool:
        return self.expected == self.found and not self.warned


@dataclass
class Replay:
    """One script on a fresh machine. The commands are those of ``functions.sh``."""

    folder: Path
    script: Path
    line: Line
    done: list[Scenario] = field(default_factory=list)
    values_checked: int = 0

    def __post_init__(self) -> None:
        self.functions = (self.folder / "functions.sh").read_text()
        k = Kernel(self.line)
        k.kallsyms[None] = [k.text(name, None) for name in VMLINUX]
        new_kernel_tasks(k, 2)
        self.world = World(k)
        self.insmod = 'insmod "test_modules/$mod.ko"' in self.functions
        self.test = ""
        self.shell = Shell(self.commands(), self.write, self.glob, {"0": str(self.script)})

    def run(self) -> None:
        """Interpret the whole script."""
        with pytest.raises(Exit):
            self.shell.script(self.script.read_text())

    def commands(self) -> dict[str, Callable[[list[str], str], tuple[int, str]]]:
        own: dict[str, Callable[..., object]] = {
            "setup_config": self.setup_config,
            "start_test": self.start_test,
            "check_result": self.check_result,
            "load_mod": self.load,
            "load_lp_nowait": self.load_lp_nowait,
            "load_lp": self.load_lp,
            "load_failing_mod": self.load_failing_mod,
            "unload_mod": self.unload,
            "unload_lp": self.unload,
            "disable_lp": self.disable_lp,
            "set_pre_patch_ret": self.set_pre_patch_ret,
            "set_ftrace_enabled": self.set_ftrace_enabled,
            "check_sysfs_rights": self.check_sysfs_rights,
            "check_sysfs_value": self.check_sysfs_value,
            "log": self.log,
            "die": self.die,
        }

        def command(function: Callable[..., object]) -> Callable[[list[str], str], tuple[int, str]]:
            def called(words: list[str], given: str) -> tuple[int, str]:
                function(*words)
                return 0, ""

            return called

        return {
            **{name: command(function) for name, function in own.items()},
            ".": self.source,
            "dirname": lambda words, given: (0, str(Path(words[0]).parent) + "\n"),
            "loop_until": self.loop_until,
            "cat": lambda words, given: (0, self.read(words[0])),
            "grep": self.grep,
            "echo": lambda words, given: (0, " ".join(words) + "\n"),
            "exit": self.exit,
            "true": lambda words, given: (0, ""),
            "getconf": lambda words, given: (0, f"{len(self.world.k.idle)}\n"),
            "seq": lambda words, given: (
                0,
                "".join(f"{i}\n" for i in range(int(words[0]), int(words[1]) + 1)),
            ),
            "tr": lambda words, given: (0, given.replace(words[0], words[1])),
            "./test_klp-call_getpid": self.hammer,
            "kill": self.kill,
        }

    # the machine

    def log(self, text: str) -> None:
        self.world.k.printk(Level.NOTICE, text)

    def write(self, path: str, text: str) -> None:
        if path != "/dev/kmsg":
            raise Unsupported(f"writing to {path}")
        for line in text.splitlines():
            self.log(line)

    def die(self, text: str) -> None:
        raise Died(f"{self.script.name}: {self.test}: {text}")

    def exit(self, words: list[str], given: str) -> tuple[int, str]:
        raise Exit

    def source(self, words: list[str], given: str) -> tuple[int, str]:
        assert words == [str(self.folder / "functions.sh")], "what the commands above stand for"
        return 0, ""

    def glob(self, pattern: str) -> list[str]:
        if pattern != f"{sysfs.ROOT}/*":
            raise Unsupported(f"the pattern {pattern}")
        # bash leaves a pattern that matches nothing as it is
        return [f"{sysfs.ROOT}/{patch.name}" for patch in self.world.k.kobjects] or [pattern]

    def read(self, path: str) -> str:
        match path.removeprefix(sysfs.ROOT + "/"):
            case "/proc/cmdline":
                return self.world.show("cmdline_proc_show", STOCK)
            case "/proc/meminfo":
                return self.world.show("meminfo_proc_show", STOCK)
            case "/sys/kernel/test_klp_syscall/npids":
                return f"{len(self.world.waiting)}\n"
            case name if name != path:
                entry = sysfs.view(self.world.k).get(name)
                assert entry and entry.value is not None, f"{path} cannot be read"
                return entry.value + "\n"
        raise Unsupported(f"reading {path}")

    def grep(self, words: list[str], given: str) -> tuple[int, str]:
        quiet = words[0] == "-q"
        pattern, path = words[1:] if quiet else words
        found = [line for line in self.read(path).splitlines() if re.search(pattern, line)]
        return int(not found), "" if quiet else "".join(line + "\n" for line in found)

    def found(self, pattern: str) -> str:
        """What the pattern's group matches in functions.sh, which has to have it."""
        match = re.search(pattern, self.functions, re.MULTILINE)
        assert match is not None, pattern
        return match[1]

    def until(self, condition: Callable[[], bool], failure: str) -> None:
        """``loop_until``: MAX_RETRIES attempts, RETRY_INTERVAL seconds apart."""
        retries = int(self.found(r"^MAX_RETRIES=(\d+)"))
        interval = float(self.found(r'^RETRY_INTERVAL="([\d.]+)"'))
        for _ in range(retries + 1):
            self.world.hammer()
            if condition():
                return
            advance(self.world.k, seconds(interval))
        self.die(failure)

    def loop_until(self, words: list[str], given: str) -> tuple[int, str]:
        self.until(lambda: self.shell.script(" ".join(words)) == 0, f"{words} never became true")
        return 0, ""

    # functions.sh

    def setup_config(self) -> None:
        """``set_dynamic_debug``: all of kernel/livepatch, without the functions that it switches off."""
        switched = self.found(r"file kernel/livepatch/\* \+p\n((?:\s*func \w+ -p\n)*)")
        off = re.findall(r"func (\w+) -p", switched)
        self.world.k.debug = DEBUG_FUNCTIONS - set(off)
        self.set_ftrace_enabled("1")

    def start_test(self, name: str) -> None:
        self.test = name
        self.log(f"===== TEST: {name} =====")
        self.begin = len(self.world.k.log)

    def check_result(self, *expected: str) -> None:
        lines = [message.text for message in self.world.k.log[self.begin :]]
        found = [line for line in lines if KEPT.search(line) and not LEFT_OUT.search(line)]
        warned, self.world.k.warned = self.world.k.warned, []
        wanted = " ".join(expected).splitlines()
        self.done.append(Scenario(self.script.name, self.test, wanted, found, warned))
        self.begin = len(self.world.k.log)

    def try_load(self, mod: str, parameters: tuple[str, ...]) -> int:
        tool = f"insmod test_modules/{mod}.ko" if self.insmod else f"modprobe {mod}"
        self.log(" ".join(["%", tool, *parameters]))
        values = dict(parameter.split("=", 1) for parameter in parameters)
        result = load_module(self.world.k, self.world.build(mod, values))
        advance(self.world.k, 0)
        return result

    def load(self, mod: str, *parameters: str) -> None:
        result = self.try_load(mod, parameters)
        if result:
            self.die(f"{mod}: {os.strerror(-result)}")

    def load_lp_nowait(self, mod: str, *parameters: str) -> None:
        assert mod in LIVEPATCHES
        self.load(mod, *parameters)
        self.until(lambda: mod in sysfs.view(self.world.k), f"failed to load module {mod} (sysfs)")

    def load_lp(self, mod: str, *parameters: str) -> None:
        self.load_lp_nowait(mod, *parameters)
        self.until(
            lambda: sysfs.view(self.world.k)[f"{mod}/transition"].value == "0",
            "failed to complete transition",
        )

    def load_failing_mod(self, mod: str, *parameters: str) -> None:
        result = self.try_load(mod, parameters)
        if not result:
            self.die(f"{mod} unexpectedly loaded")
        if self.insmod:
            words = INSMOD_WORDS.get(-result) or os.strerror(-result)
            self.log(f"insmod: ERROR: could not insert module test_modules/{mod}.ko: {words}")
        else:
            self.log(f"modprobe: ERROR: could not insert '{mod}': {os.strerror(-result)}")

    def unload(self, mod: str) -> None:
        self.until(lambda: self.world.k.modules[mod].refcnt == 0, f"failed to unload module {mod} (refcnt)")
        self.log(f"% rmmod {mod}")
        result = delete_module(self.world.k, mod)
        if result:
            self.die(os.strerror(-result))

    def disable_lp(self, mod: str) -> None:
        self.log(f"% echo 0 > /sys/kernel/livepatch/{mod}/enabled")
        result = sysfs.write(self.world.k, f"{mod}/enabled", "0\n")
        assert result == 0, os.strerror(-result)
        self.until(lambda: mod not in sysfs.view(self.world.k), f"failed to disable livepatch {mod}")

    def set_pre_patch_ret(self, mod: str, value: str) -> None:
        self.log(f"% echo {value} > /sys/module/{mod}/parameters/pre_patch_ret")
        self.world.k.modules[mod].parameters["pre_patch_ret"] = int(value)

    def set_ftrace_enabled(self, *words: str) -> None:
        value = words[-1]
        result = set_ftrace_enabled(self.world.k, value == "1")
        if result and words[0] == "--fail":
            self.log(f'livepatch: sysctl: setting key "kernel.ftrace_enabled": {os.strerror(-result)}')
            return
        assert result == 0
        self.log(f"livepatch: kernel.ftrace_enabled = {int(self.world.k.ftrace_enabled)}")

    def check_sysfs_rights(self, mod: str, path: str, expected: str) -> None:
        self.values_checked += 1
        entry = sysfs.view(self.world.k)[f"{mod}/{path}".rstrip("/")]
        if entry.rights != expected:
            self.die(f"Unexpected access rights of {path}: {expected} vs. {entry.rights}")

    def check_sysfs_value(self, mod: str, path: str, expected: str) -> None:
        self.values_checked += 1
        value = sysfs.view(self.world.k)[f"{mod}/{path}"].value
        if value != expected:
            self.die(f"Unexpected value in {path}: {expected} vs. {value}")

    def hammer(self, words: list[str], given: str) -> tuple[int, str]:
        assert words == ["&"], "it only ever runs in the background"
        task = fork(self.world.k, None, 1000 + len(self.world.hammers), "test_klp-call_g")
        self.world.hammers.append(task)
        return 0, str(task.pid)

    def kill(self, words: list[str], given: str) -> tuple[int, str]:
        for task in [task for task in self.world.hammers if str(task.pid) in words]:
            self.world.hammers.remove(task)
            self.world.k.tasks.remove(task)
        return 0, ""


def replay(target: Target, line: Line) -> tuple[list[Scenario], int]:
    """All scripts of a kernel's source; the scenarios, and how many sysfs values were compared besides."""
    folder = target.source / SELFTESTS
    done: list[Scenario] = []
    values = 0
    for script in sorted(folder.glob("test-*.sh")):
        one = Replay(folder, script, line)
        one.run()
        done += one.done
        values += one.values_checked
    return done, values


def table(rows: list[Scenario], line: Line) -> str:
    """A row per scenario."""
    lines = [f"livepatch selftests of {line.name} on the model"]
    for row in rows:
        verdict = f"{len(row.found)} lines, as the kernel's" if row.same else "DIFFERS"
        lines.append(f"  {row.script:21} {row.name:58} {verdict}")
    return "\n".join(lines)


@pytest.mark.parametrize(("release", "line", "least"), [("56", "6.1", 22), ("612", "6.12", 25)])
def test_every_selftest_scenario_has_the_kernels_log_on_the_model(
    release: str, line: str, least: int, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    target: Target = request.getfixturevalue(f"target_{release}")
    rows, values = replay(target, LINES[line])
    text = (target.source / SELFTESTS).glob("test-*.sh")
    written = sum(len(re.findall(r"^start_test ", script.read_text(), re.MULTILINE)) for script in text)
    with capsys.disabled():
        print(f"\n{table(rows, LINES[line])}\n  {len(rows)} of {written} scenarios, {values} sysfs values")
    for row in rows:
        assert row.found == row.expected, f"{row.script}: {row.name}"
        assert row.warned == []
        assert len(row.found) >= 4
    assert len(rows) == written, "a scenario was not replayed"
    assert written >= least
    assert values >= 10


def test_the_replay_finds_a_model_that_is_wrong(target_56: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second log line of a transition, no scenario of a script may pass."""

    def silent(k: Kernel, patch: Patch, state: int) -> None:
        k.debug, keep = frozenset(), k.debug
        klp_init_transition(k, patch, state)
        k.debug = keep

    monkeypatch.setattr(core, "klp_init_transition", silent)
    folder = target_56.source / SELFTESTS
    one = Replay(folder, folder / "test-livepatch.sh", LINES["6.1"])
    one.run()
    assert len(one.done) == 3
    assert not any(row.same for row in one.done)


@pytest.mark.parametrize(
    ("release", "folder"), [("56", "lib/livepatch"), ("612", f"{SELFTESTS}/test_modules")]
)
def test_the_table_of_modules_says_what_the_c_sources_say(
    release: str, folder: str, request: pytest.FixtureRequest
) -> None:
    target: Target = request.getfixturevalue(f"target_{release}")
    sources = sorted((target.source / folder).glob("*.c"))
    names = {path.stem for path in sources}
    assert names <= {*LIVEPATCHES, *PLAIN}
    for path in sources:
        text = path.read_text()
        if include := re.search(r'#include "(\w+\.c)"', text):
            text = (path.parent / include[1]).read_text()
        row = LIVEPATCHES.get(path.stem)
        assert ('MODULE_INFO(livepatch, "Y")' in text) == (row is not None)
        if row is None:
            continue
        old = re.findall(r'\.old_name = (?:"(\w+)"|__stringify\(FN_PREFIX\) "(\w+)")', text)
        described = [old_name.removeprefix("__x64_") for part in row.objects for old_name, _ in part.funcs]
        assert described == [a or b for a, b in old]
        new = re.findall(r"\.new_func = (\w+)", text)
        assert [name for part in row.objects for _, name in part.funcs] == new
        assert [part.name for part in row.objects if part.name] == re.findall(r'\.name = "(\w+)"', text)
        for kind in ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch"):
            assert text.count(f".{kind} = {kind}_callback") == sum(part.callbacks for part in row.objects)
        for show in row.shows:
            body = text[text.index(f"int {show}(") :]
            assert body.index("this has been live patched") < body.index("}")
        states = re.search(r"\.id = (\w+),\s*\.version = (\w+),", text)
        defined = dict(re.findall(r"#define (\w+) (\d+)", text))
        assert row.states == (((int(defined[states[1]]), int(defined[states[2]])),) if states else ())
        assert (row.replace is True) == (".replace = true" in text)
        assert (row.replace is None) == ("patch.replace = replace" in text)
        assert row.pre_patch_ret == ("return pre_patch_ret;" in text)
