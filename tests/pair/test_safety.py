"""What the safety analysis says of compiled pairs, and what it does not say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pairs import FLAGS, compiled

from kmend.core.errors import Refusal, UsageError
from kmend.diff.compare import compare
from kmend.diff.select import select
from kmend.diff.unit import UnitObject
from kmend.verify.allow import ALLOWABLE, REASONS, split
from kmend.verify.callers import TargetCallers
from kmend.verify.callgraph import CallGraph
from kmend.verify.flow import RETURN, START, Flow
from kmend.verify.hooks import who_hooks
from kmend.verify.safety import Callers, Reached, Review, ReviewUnit, _primitive, review

#: The kernel's functions that the rules know by name.
KERNEL = """
struct task; struct lock { int x; };
extern struct task *kthread_create_on_node(int (*f)(void *), void *data, int node, const char *name, ...);
extern _Bool kthread_should_stop(void);
extern void schedule(void);
extern long schedule_timeout(long timeout);
extern void msleep(unsigned int ms);
extern void mutex_lock(struct lock *lock);
extern void mutex_unlock(struct lock *lock);
extern void fput(void *file);
extern void kfree(const void *p);
extern void panic(const char *text, ...) __attribute__((noreturn));
struct lock m;
"""

Look = Callable[..., Review]


def built(folder: Path, name: str, text: str) -> UnitObject:
    return compiled(folder, name, KERNEL + text, flags=[*FLAGS, "-gbtf"])


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """The review of a pair of C texts: the original, and the same with each ``(before, after)`` replaced."""

    def make(old: str, *edits: tuple[str, str], callers: Callers | None = None) -> Review:
        new = old
        for before, after in edits:
            assert new.count(before) == 1, before
            new = new.replace(before, after)
        diff = compare(built(tmp_path, "old", old), built(tmp_path, "new", new))
        selection = select(diff)
        assert selection.changed
        return review([ReviewUnit("vmlinux", selection)], callers=callers)

    return make


def rows(found: tuple[Refusal, ...], rule: str) -> dict[str, str]:
    return {row.what: row.why for row in found if row.rule == rule}


# -- can the transition end? -------------------------------------------------------------------------

THREAD = """
extern int work(int);
static int main_loop(void *data)
{
    int n = 3;
    while (!kthread_should_stop()) { n = work(n); schedule_timeout(n); }
    return n;
}
struct task *start(void) { return kthread_create_on_node(main_loop, 0, -1, "x"); }
"""


def test_the_loop_of_a_kernel_thread_never_leaves(look: Look) -> None:
    found = look(THREAD, ("n = 3", "n = 5"))
    why = rows(found.refusals, "never-leaves")["main_loop"]
    assert "started by start()" in why
    assert rows(found.warnings, "may-sleep") == {}, "what never leaves needs no second word"


def test_who_starts_the_thread_does_leave(look: Look) -> None:
    assert look(THREAD, ("0, -1", "0, -2")).refusals == ()


def test_a_thread_that_does_one_thing_and_ends_leaves(look: Look) -> None:
    text = THREAD.replace(
        "while (!kthread_should_stop()) { n = work(n); schedule_timeout(n); }", "n = work(n);"
    )
    found = look(text, ("n = 3", "n = 5"))
    assert found.refusals == ()
    assert found.warnings == ()


def test_a_loop_that_asks_nothing_and_waits_for_nothing_leaves(look: Look) -> None:
    text = THREAD.replace("!kthread_should_stop()", "n < 100").replace("schedule_timeout(n);", "")
    assert look(text, ("n = 3", "n = 5")).refusals == ()


def test_a_thread_started_elsewhere_is_known_by_its_loop(look: Look) -> None:
    text = THREAD.replace("static int main_loop", "int main_loop")
    text = text[: text.index("struct task *start")]
    found = look(text, ("n = 3", "n = 5"))
    assert "kthread_should_stop()" in rows(found.refusals, "never-leaves")["main_loop"]


def test_a_loop_below_the_threads_function_never_leaves_either(look: Look) -> None:
    text = """
    extern int work(int);
    static noinline int inner(int n, int m)
    {
        while (!kthread_should_stop()) { n = work(n * 3); schedule_timeout(m); }
        return n;
    }
    static int main_loop(void *data) { return inner(work(1), work(2)) + 1; }
    struct task *start(void) { return kthread_create_on_node(main_loop, 0, -1, "x"); }
    """
    assert set(rows(look(text, ("n * 3", "n * 5")).refusals, "never-leaves")) == {"inner"}
    # the same, called by others as well, only sleeps
    shared = text + "int other(int n) { return inner(n, 7); }\n"
    found = look(shared, ("n * 3", "n * 5"))
    assert found.refusals == ()
    assert set(rows(found.warnings, "may-sleep")) == {"inner"}


def test_a_function_without_a_way_out_never_leaves(look: Look) -> None:
    text = "extern int work(int);\nvoid forever(int n) { for (;;) { n = work(n) + 3; schedule(); } }"
    found = look(text, ("+ 3", "+ 5"))
    assert "never returns" in rows(found.refusals, "never-leaves")["forever"]


def test_a_function_that_only_panics_is_no_loop(look: Look) -> None:
    text = 'extern int work(int);\nvoid bad(int n) { schedule(); panic("%d", work(n) + 3); }'
    assert look(text, ("+ 3", "+ 5")).refusals == ()


def test_sleepers_are_named_with_their_way_to_it(look: Look) -> None:
    text = """
    extern int work(int);
    static noinline int deep(int n) { schedule(); return work(n); }
    static noinline int middle(int n) { return deep(n) + 1; }
    int outer(int n) { return middle(n) * 3; }
    int timed(int n) { return schedule_timeout(n) + 3; }
    int brief(int n) { mutex_lock(&m); msleep(n + 3); mutex_unlock(&m); return n; }
    """
    found = look(text, ("* 3", "* 5"), ("(n) + 3; }", "(n) + 5; }"), ("n + 3", "n + 5"))
    sleeps = rows(found.warnings, "may-sleep")
    assert set(sleeps) == {"outer", "timed"}, "a pause and a lock end by themselves"
    assert "schedule() by way of middle and deep()" in sleeps["outer"]
    assert "schedule_timeout()" in sleeps["timed"]


# -- prototypes --------------------------------------------------------------------------------------

CALLED = """
struct a {{ int v; }}; struct b {{ int v; }};
extern void keep(void *);
{how} int target(struct a *a, int n) {{ return outside(a->v + n); }}
int user(struct a *a) {{ return target(a, 3) + 1; }}
{more}
"""


@pytest.mark.parametrize(
    ("how", "more", "who"),
    [
        ("noinline", "", "other files can call it"),
        ("static noinline", "void *table[] = { (void *)target };", "held by table"),
        ("static noinline", "void give(void) { keep((void *)target); }", "held by give"),
        (
            "noinline",
            'asm(".section ___ksymtab+target,\\"a\\"\\n__ksymtab_target: .long target - .\\n.text");',
            "exported",
        ),
    ],
)
def test_a_changed_prototype_that_others_rely_on_is_refused(
    look: Look, how: str, more: str, who: str
) -> None:
    old = CALLED.format(how=how, more=more)
    found = look(
        old, ("int n) {", "int n, long extra) {"), ("+ n);", "+ n + extra);"), ("(a, 3)", "(a, 3, 4)")
    )
    why = rows(found.refusals, "changed-signature")["target"]
    assert "parameter extra is new" in why
    assert who in why


def test_callers_that_are_all_compiled_anew_are_right(look: Look) -> None:
    old = CALLED.format(how="static noinline", more="")
    found = look(
        old, ("int n) {", "int n, long extra) {"), ("+ n);", "+ n + extra);"), ("(a, 3)", "(a, 3, 4)")
    )
    assert found.refusals == ()


@pytest.mark.parametrize(
    ("reached", "word"),
    [
        (Reached(("user",), ()), None),
        (Reached(("user", "elsewhere"), ()), "elsewhere"),
        (Reached(("user",), ("some_ops",)), "some_ops"),
        (Reached(("user (one of several of that name)",), ()), "one of several"),
        (None, "other files can call it"),
    ],
)
def test_the_kernel_is_asked_who_else_calls_a_global_function(
    look: Look, reached: Reached | None, word: str | None
) -> None:
    class Known:
        def outside(self, owner: str, name: str) -> Reached | None:
            assert (owner, name) == ("vmlinux", "target")
            return reached

    old = CALLED.format(how="noinline", more="")
    edits = (("int n) {", "int n, long extra) {"), ("+ n);", "+ n + extra);"), ("(a, 3)", "(a, 3, 4)"))
    why = rows(look(old, *edits, callers=Known()).refusals, "changed-signature")
    assert (word is None and why == {}) or (word is not None and word in why["target"])


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("int f(struct a *p, int n)", "int f(struct b *p, int n)", "p was struct a * and is struct b *"),
        ("int f(struct a *p, int n)", "int f(struct a *p, long n)", "n was integer of 4 bytes"),
        ("int f(struct a *p, int n)", "long f(struct a *p, int n)", "returned integer of 4 bytes"),
        ("int f(struct a *p, int n)", "int f(int n, struct a *p)", "n was struct a *"),
        ("int f(struct a *p, int n)", "int f(struct a *p)", "n is gone"),
        ("int f(int n, int k)", "int f(int k, int n)", "changed places"),
        ("int f(struct a *p, int n)", "int f(struct a *p, int n, ...)", "is new"),
        ("int f(int n, int *k)", "int f(int n, long *k)", "pointer to integer of 4 bytes"),
        ("int f(struct a *p, int n)", "int f(struct a *q, unsigned m)", None),
        ("int f(void *p, int n)", "int f(struct a *p, int n)", None),
        ("void f(struct a *p, int n)", "int f(struct a *p, int n)", None),
        ("int f(struct a *p, int n)", "int f(const struct a *p, int n)", None),
    ],
)
def test_what_a_caller_would_notice(look: Look, before: str, after: str, word: str | None) -> None:
    def text(head: str, number: int) -> str:
        return head + " { " + ("" if head.startswith("void") else "return ") + f"outside({number}); }}"

    old = "struct a { int v; }; struct b { int v; };\n" + text(before, 3)
    found = look(old, (text(before, 3), text(after, 4)))
    why = rows(found.refusals, "changed-signature")
    assert (word is None and why == {}) or (word is not None and word in why["f"])


def test_an_object_without_types_has_no_prototypes_to_compare(tmp_path: Path) -> None:
    diff = compare(
        compiled(tmp_path, "old", "int f(int n) { return outside(n); }"),
        compiled(tmp_path, "new", "int f(int n, int k) { return outside(n + k); }"),
    )
    assert review([ReviewUnit("vmlinux", select(diff))]) == Review()


# -- locks -------------------------------------------------------------------------------------------

LOCKED = """
int f(int *p, void *file)
{
    int n;
    mutex_lock(&m);
    n = outside(*p);
    if (n < 0)
        goto out;
    fput(file);
out:
    mutex_unlock(&m);
    kfree(p);
    return n * 3;
}
"""


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("goto out;", "return n;", "possible now: the return right after mutex_lock()"),
        (
            "    mutex_unlock(&m);\n    kfree(p);",
            "    kfree(p);\n    mutex_unlock(&m);",
            "possible now: kfree() right after fput()",
        ),
        ("    fput(file);", "", "fput() is called at 0 places (was 1)"),
        ("n = outside(*p);", "n = outside(*p); fput(p);", ", fput() right after mutex_lock()"),
    ],
)
def test_another_order_of_locks_is_told(look: Look, before: str, after: str, word: str) -> None:
    if "fput() right after mutex_lock()" in word:
        found = look(LOCKED.replace("    fput(file);\n", ""), (before, after))
    else:
        found = look(LOCKED, (before, after))
    assert word in rows(found.warnings, "lock-change")["f"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("n * 3", "n * 5"),
        ("    mutex_lock(&m);", "    if (!p) return -22;\n    mutex_lock(&m);"),
        ("    kfree(p);", "    if (n) kfree(p);"),
        ("    if (n < 0)\n", "    if (n < 0 && n != -7)\n"),
        # an error path that gives up the same as those before it, written out once more
        ("        goto out;", "        { mutex_unlock(&m); kfree(p); return 7; }"),
    ],
)
def test_the_same_order_is_not_told(look: Look, before: str, after: str) -> None:
    assert rows(look(LOCKED, (before, after)).warnings, "lock-change") == {}


def test_atomic_instructions_are_counted_beside_it(look: Look) -> None:
    table = '.pushsection .smp_locks,\\"a\\"\\n.long 671f - .\\n.popsection'
    atomic = f'asm volatile("{table}\\n671: lock incl %0" : "+m" (*p));'
    found = look(LOCKED, ("    fput(file);", "    " + atomic))
    assert "it has 1 instructions with a LOCK prefix (had 0)" in rows(found.warnings, "lock-change")["f"]


def test_what_is_got_counts_when_it_can_be_given_back(look: Look) -> None:
    text = """
    extern void *thing_get(int n); extern int reg_get(int n); extern void thing_put(void *p);
    int f(int n) { mutex_lock(&m); n = outside(n); mutex_unlock(&m); return n; }
    void g(void *p) { thing_put(p); }
    """
    found = look(text, ("n = outside(n);", "n = reg_get(n);"))
    assert rows(found.warnings, "lock-change") == {}
    found = look(text, ("n = outside(n);", "n = outside(n) + !thing_get(n);"))
    assert "thing_get() right after mutex_lock()" in rows(found.warnings, "lock-change")["f"]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *(("_raw_spin_lock_irqsave", True), ("mutex_trylock", True), ("down_read_killable", True)),
        *(
            ("up_write", True),
            ("__srcu_read_unlock", True),
            ("xfs_buf_unlock", True),
            ("lock_sock_nested", True),
        ),
        *(("release_sock", True), ("fput", True), ("refcount_warn_saturate", True), ("tty_kref_put", True)),
        *(("kfree", True), ("__SCT__tp_func_lock_x", False), ("assert_locked", False), ("block_read", False)),
        *(("local_clock", False), ("skb_put", False), ("ktime_get", False), ("tty_set_lock_subclass", False)),
        *(
            ("dlm_print_one_lock", False),
            ("__mmap_lock_do_trace_released", False),
            ("rds_bind_lock_init", False),
        ),
        *(("lookup_one", False), ("update_x", False), ("backup", False), ("shutdown", False)),
    ],
)
def test_what_counts_as_a_lock_or_reference(name: str, counts: bool) -> None:
    assert _primitive(name) is counts


# -- the flow of a function ----------------------------------------------------------------------------


def flow(folder: Path, text: str, name: str = "f") -> Flow:
    unit = built(folder, "flow", text)
    diff = compare(unit, unit)
    return Flow(CallGraph(unit), diff.old_special, name)


def test_flow_sees_loops_and_returns(tmp_path: Path) -> None:
    text = """
    extern int a(int), b(int), c(int), d(int);
    int f(int n) { n = a(n); while (n > 0) { n = b(n); if (n == 7) n = c(n); } return d(n) + 1; }
    """
    found = flow(tmp_path, text)
    assert found.looped() == {"b", "c"}
    assert found.leaves()
    wanted = frozenset({"a", "b", "c", "d"})
    assert found.order(wanted) == {
        *((START, "a"), ("a", "b"), ("a", "d"), ("b", "b"), ("b", "c"), ("b", "d")),
        *(("c", "b"), ("c", "d"), ("d", RETURN)),
    }
    assert found.order(frozenset({"c"})) == {(START, "c"), (START, RETURN), ("c", "c"), ("c", RETURN)}


def test_flow_ends_at_what_does_not_come_back_and_at_sibling_calls(tmp_path: Path) -> None:
    text = """
    extern int a(int), b(int);
    int f(int n) { if (n == 3) { a(n); panic("x"); } if (n == 4) { a(n); __builtin_trap(); } return b(n); }
    """
    assert flow(tmp_path, text).order(frozenset({"a", "b"})) == {(START, "a"), (START, "b"), ("b", RETURN)}


def test_flow_goes_through_cold_parts(tmp_path: Path) -> None:
    text = """
    extern int a(int), b(int); extern void rare(int) __attribute__((cold));
    int f(int n) { a(n); if (n == 3) { rare(n); mutex_lock(&m); } return b(n) + 1; }
    """
    found = flow(tmp_path, text)
    assert "f.cold" in built(tmp_path, "cold", text).parts
    assert found.order(frozenset({"a", "b", "mutex_lock"})) == {
        *((START, "a"), ("a", "b"), ("a", "mutex_lock"), ("mutex_lock", "b"), ("b", RETURN)),
    }


def test_flow_goes_on_after_a_warning_and_not_after_a_bug(tmp_path: Path) -> None:
    def stop(flags: int) -> str:
        return (
            'asm volatile("1: ud2\\n.pushsection __bug_table,\\"aw\\"\\n2: .long 1b - .\\n.long 0\\n'
            f'.word 1\\n.word {flags}\\n.popsection");'
        )

    text = "extern int a(int), b(int);\nint f(int n) {{ a(n); if (n == 3) {{ a(1); {} }} return b(n) + 1; }}"
    wanted = frozenset({"a", "b"})
    straight = {(START, "a"), ("a", "b"), ("a", "a"), ("b", RETURN)}
    assert flow(tmp_path, text.format(stop(1))).order(wanted) == straight
    after = text.replace("b(n) + 1; }}", "outside(n) + 1; }}").replace("a(1);", "a(1); b(2);")
    assert ("b", RETURN) in flow(tmp_path, after.format(stop(1))).order(wanted)
    assert ("b", RETURN) not in flow(tmp_path, after.format(stop(0) + "__builtin_unreachable();")).order(
        wanted
    )


def test_flow_follows_jump_labels(tmp_path: Path) -> None:
    text = """
    extern int a(int), b(int); extern char key;
    int f(int n)
    {
        asm goto("1: .byte 0x0f,0x1f,0x44,0x00,0x00\\n.pushsection __jump_table,\\"aw\\"\\n"
                 ".long 1b - ., %l[on] - .\\n.quad %c0 - .\\n.popsection" : : "i" (&key) : : on);
        return b(n) + 1;
    on:
        return a(n) + 2;
    }
    """
    assert flow(tmp_path, text).order(frozenset({"a", "b"})) == {
        *((START, "a"), (START, "b"), ("a", RETURN), ("b", RETURN)),
    }


# -- tracers -----------------------------------------------------------------------------------------


def test_hooked_functions_are_named_and_calls_that_pass_the_hook_by(look: Look) -> None:
    text = """
    noinline int vfs_read(int n) { return outside(n) + 3; }
    int reader(int n) { return vfs_read(n) * 3; }
    int quiet(int n) { return outside(n) * 7; }
    """
    alone = rows(look(text, ("+ 3", "+ 5")).warnings, "commonly-hooked")
    assert "bcc" in alone["vfs_read"]
    assert "not seen" not in alone["vfs_read"]
    both = rows(look(text, ("+ 3", "+ 5"), ("* 3", "* 5")).warnings, "commonly-hooked")
    assert "calls from reader" in both["vfs_read"]
    assert rows(look(text, ("* 7", "* 9")).warnings, "commonly-hooked") == {}


@pytest.mark.parametrize(
    "name", ["tcp_v4_connect", "security_file_open", "__x64_sys_execve", "__blk_account_io_done"]
)
def test_known_hooks(name: str) -> None:
    assert who_hooks(name)


@pytest.mark.parametrize("name", ["ext4_mb_load_buddy_gfp", "x_security_y", "sysfs_create_file"])
def test_unknown_hooks(name: str) -> None:
    assert who_hooks(name) is None


# -- what may be allowed -----------------------------------------------------------------------------


def test_allowed_refusals_become_warnings_that_say_so() -> None:
    stays = Refusal("never-leaves", "f", "it loops", "move it")
    proof = Refusal("provenance", "g", "bytes differ", "fetch again")
    found = split([stays, proof], ["never-leaves"])
    assert found.refusals == (proof,)
    (row,) = found.warnings
    assert (row.rule, row.what) == ("never-leaves", "f")
    assert "--allow" in row.why
    assert REASONS["never-leaves"] in row.next_step
    assert split([stays, proof], ()).refusals == (stays, proof)


@pytest.mark.parametrize(
    "rule", ["provenance", "ambiguous-symbol", "init-code", "reshaped-data", "nonsense", ""]
)
def test_what_nobody_can_know_better_cannot_be_allowed(rule: str) -> None:
    assert rule not in ALLOWABLE
    with pytest.raises(UsageError) as caught:
        split([], [rule])
    assert caught.value.rule == "not-allowable"


def test_a_variable_of_another_size_is_another_rule_than_other_contents(tmp_path: Path) -> None:
    def found(old: str, new: str) -> list[str]:
        text = "\nint f(int n) { return table[n]; }"
        diff = compare(built(tmp_path, "old", old + text), built(tmp_path, "new", new + text))
        return [row.rule for row in select(diff).refusals]

    assert found("int table[] = { 1, 2 };", "int table[] = { 1, 3 };") == ["changed-data"]
    assert found("int table[] = { 1, 2 };", "int table[] = { 1, 2, 3 };") == ["reshaped-data"]
    assert found("const int table[] = { 1, 2 };", "int table[] = { 1, 2 };") == ["reshaped-data"]


def test_with_changed_data_allowed_the_kernel_keeps_its_own_contents(tmp_path: Path) -> None:
    """The module must link to the kernel's variable, and bring no copy along."""

    def text(last: int, add: int) -> str:
        return f"const int table[] = {{ 1, {last} }};\nint f(int n) {{ return table[n] + outside({add}); }}"

    selection = select(compare(built(tmp_path, "old", text(2, 3)), built(tmp_path, "new", text(9, 4))))
    assert [row.rule for row in selection.refusals] == ["changed-data"]
    assert split(selection.refusals, ["changed-data"]).refusals == ()
    assert selection.included == ("f",)
    assert selection.outer == ("table",)


# -- who reaches a function of a module -----------------------------------------------------------------


def test_callers_and_holders_in_a_module_are_told_apart(tmp_path: Path) -> None:
    unit = built(
        tmp_path,
        "module",
        "noinline int f(int n) { return outside(n); }\nint g(int n) { return f(n) + 1; }\n"
        "int (*table[])(int) = { f };\nint (*h(void))(int) { return f; }",
    )
    callers = TargetCallers(NoImage(), NoSymbols(), lambda name: unit if name == "m" else None)
    reached = callers.outside("m", "f")
    assert reached is not None
    assert reached.calls == ("g",)
    assert set(reached.holders) == {"table", "h"}
    assert callers.outside("m", "absent") is None
    assert callers.outside("other", "f") is None


class NoImage:
    sections = ()

    def contents(self, name: str) -> bytes:
        raise AssertionError(name)


class NoSymbols:
    def named(self, name: str) -> tuple[()]:
        return ()

    def at(self, address: int) -> tuple[()]:
        return ()

    def covering(self, address: int) -> None:
        return None

    def next_after(self, address: int) -> None:
        return None
