"""Functions and what they need, out of C text in kernel style."""

from __future__ import annotations

from kmend.patch.extract import find_function, includes, needed_by

TEXT = r"""// SPDX-License-Identifier: GPL-2.0
#include <linux/fs.h>
#ifdef CONFIG_A
#include <linux/a.h>
#else
#include <linux/b.h>
#endif
#include "internal.h"

#define LIMIT \
	(WIDTH * 2)
#define WIDTH 7

struct pair {
	int a, b;
};

static struct kmem_cache *cache __read_mostly;
static int prototype(int x);

/* wanted(a, b) { in a comment } */
static inline int tiny(struct pair *p)
{
	return p->a + LIMIT;
}

static noinline int
on_two_lines(struct pair *p,
int x)
{
	if (x) {
		return 1;
	}
	return use(cache);
}

static int prototype(int x)
{
	const char *text = "wanted(x) {";

	return wanted(x);
}

long __must_check wanted(int x) __releases(lock)
{
	struct pair p = { x, x };

	return tiny(&p) + on_two_lines(&p, x) + prototype(x);
}
EXPORT_SYMBOL(wanted);
"""


def test_definitions_are_found_and_nothing_else() -> None:
    wanted = find_function(TEXT, "wanted")
    assert wanted is not None
    assert wanted.head == "long __must_check wanted(int x)"
    assert wanted.body.startswith("{\n\tstruct pair p")
    assert wanted.body.endswith("}")
    assert not wanted.static
    two = find_function(TEXT, "on_two_lines")
    assert two is not None
    assert two.head.startswith("static noinline int\non_two_lines(")
    assert two.static
    assert not two.inline
    assert two.prototype == "int on_two_lines(struct pair *p, int x);"
    assert two.renamed("other").startswith("int\nother(struct pair *p,")
    assert find_function(TEXT, "use") is None
    assert find_function(TEXT, "EXPORT_SYMBOL") is None
    assert find_function(TEXT, "LIMIT") is None


def test_includes_keep_their_conditions() -> None:
    assert includes(TEXT) == (
        "#include <linux/fs.h>",
        "#ifdef CONFIG_A",
        "#include <linux/a.h>",
        "#endif",
        '#include "internal.h"',
    )


def test_what_a_function_needs_is_declared_where_the_kernel_has_it_and_copied_where_not() -> None:
    wanted = find_function(TEXT, "wanted")
    assert wanted is not None
    needed = needed_by(TEXT, (wanted,), lambda name: name in ("wanted", "prototype", "cache"))
    assert needed.declared == {
        "prototype": "int prototype(int x);",
        "cache": "extern struct kmem_cache *cache __read_mostly;",
    }
    assert set(needed.copied) == {"tiny", "on_two_lines"}
    assert set(needed.macros) == {"LIMIT", "WIDTH"}
    assert set(needed.types) == {"pair"}
    text = "\n".join(needed.parts())
    order = (
        "#define LIMIT \\\n\t(WIDTH * 2)",
        "struct pair {",
        "extern struct",
        "int tiny(",
        "on_two_lines(",
    )
    places = [text.index(word) for word in order]
    assert places == sorted(places)
