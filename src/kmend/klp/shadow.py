"""``kernel/livepatch/shadow.c``: variables attached to objects that exist, in a global hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kmend.klp.structs import Kernel, KernelHang, Level, Shadow

#: DEFINE_HASHTABLE(klp_shadow_hash, 12)
HASH_BITS = 12
GOLDEN_RATIO_64 = 0x61C8864680B583EB
#: ``klp_shadow_ctor_t``: (object, the new variable, ctor_data) -> errno
Ctor = Callable[[int, Shadow, object], int]
#: ``klp_shadow_dtor_t``: (object, the variable)
Dtor = Callable[[int, Shadow], None]


def _bucket(k: Kernel, obj: int) -> list[Shadow]:
    """The hash's bucket of an object: ``hash_64()`` of ``include/linux/hash.h``."""
    if not k.klp_shadow_hash:
        k.klp_shadow_hash.extend([] for _ in range(1 << HASH_BITS))
    return k.klp_shadow_hash[(obj * GOLDEN_RATIO_64 & (1 << 64) - 1) >> (64 - HASH_BITS)]


@contextmanager
def _shadow_lock(k: Kernel) -> Iterator[None]:
    """``klp_shadow_lock``, under which constructors and destructors run."""
    if k.klp_shadow_locked:
        raise KernelHang(
            "the kernel hangs: klp_shadow_lock is taken twice",
            why="constructors and destructors run under klp_shadow_lock (kernel/livepatch/shadow.c)",
            next_step="do not allocate or free shadow variables in a constructor or destructor",
            rule="klp-hang",
        )
    k.klp_shadow_locked = True
    try:
        yield
    finally:
        k.klp_shadow_locked = False


def klp_shadow_get(k: Kernel, obj: int, id_: int) -> Shadow | None:
    """The variable of the object under the id, None when there is none."""
    for shadow in _bucket(k, obj):
        if shadow.obj == obj and shadow.id == id_:
            return shadow
    return None


def _get_or_alloc(
    k: Kernel, obj: int, id_: int, size: int, ctor: Ctor | None, ctor_data: object, *, warn_on_exist: bool
) -> Shadow | None:
    """``__klp_shadow_get_or_alloc()``."""
    found = klp_shadow_get(k, obj, id_)
    if found is None:
        with _shadow_lock(k):
            new = Shadow(obj, id_, size)
            if ctor is not None:
                err = ctor(obj, new, ctor_data)
                if err:
                    k.pr_err(f"Failed to construct shadow variable <{obj:016x}, {id_:x}> ({err})")
                    return None
            # hlist_add_head: the newest of a bucket comes first
            _bucket(k, obj).insert(0, new)
            return new
    if warn_on_exist:
        k.warned.append("klp_shadow_alloc: duplicate")
        k.printk(Level.WARNING, f"Duplicate shadow variable <{obj:016x}, {id_:x}>")
        return None
    return found


def klp_shadow_alloc(
    k: Kernel, obj: int, id_: int, size: int, ctor: Ctor | None = None, ctor_data: object = None
) -> Shadow | None:
    """Attach a new variable; None (and a warning) when there is one already, None when ``ctor`` fails.

    The kernel prints hashed pointers where the log here has the object's address.
    """
    return _get_or_alloc(k, obj, id_, size, ctor, ctor_data, warn_on_exist=True)


def klp_shadow_get_or_alloc(
    k: Kernel, obj: int, id_: int, size: int, ctor: Ctor | None = None, ctor_data: object = None
) -> Shadow | None:
    """The variable that is there, else a new one; ``ctor`` runs for a new one only."""
    return _get_or_alloc(k, obj, id_, size, ctor, ctor_data, warn_on_exist=False)


def klp_shadow_free(k: Kernel, obj: int, id_: int, dtor: Dtor | None = None) -> None:
    """Detach and free the variable of the object under the id; nothing happens when there is none."""
    with _shadow_lock(k):
        bucket = _bucket(k, obj)
        for shadow in bucket:
            if shadow.obj == obj and shadow.id == id_:
                bucket.remove(shadow)
                if dtor is not None:
                    dtor(shadow.obj, shadow)
                break


def klp_shadow_free_all(k: Kernel, id_: int, dtor: Dtor | None = None) -> None:
    """Detach and free the variables of all objects under the id, in the order of the hash's buckets."""
    with _shadow_lock(k):
        for bucket in k.klp_shadow_hash:
            for shadow in [row for row in bucket if row.id == id_]:
                bucket.remove(shadow)
                if dtor is not None:
                    dtor(shadow.obj, shadow)


def klp_shadows(k: Kernel) -> tuple[Shadow, ...]:
    """All variables that are attached, in the order of the hash's buckets."""
    return tuple(shadow for bucket in k.klp_shadow_hash for shadow in bucket)
