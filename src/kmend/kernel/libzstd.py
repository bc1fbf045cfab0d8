"""zstd by the C library: Debian's dpkg depends on it, so a server has it without any Python package.

Kernels of Debian's 6.12 line are packed so (``CONFIG_KERNEL_ZSTD``); Python has no decoder of its own before
3.14. Interface: zstd.h, "Streaming decompression".
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

from kmend.core.errors import Unable

MAGIC = b"\x28\xb5\x2f\xfd"
#: So much is unpacked at once.
_CHUNK = 8 << 20


class _Buffer(ctypes.Structure):
    """``ZSTD_inBuffer`` and ``ZSTD_outBuffer``: place, size, how much of it is used."""

    _fields_ = (("place", ctypes.c_void_p), ("size", ctypes.c_size_t), ("used", ctypes.c_size_t))


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libzstd.so.1")
        library.ZSTD_createDStream.restype = ctypes.c_void_p
        library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
        library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        library.ZSTD_decompressStream.restype = ctypes.c_size_t
        library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError) as error:
        raise Unable(
            "zstd cannot be unpacked",
            why=str(error),
            next_step="apt install libzstd1",
            rule="missing-tool",
        ) from error
    return library


def decompress(data: bytes) -> bytes:
    """The frame at the beginning of ``data``; what follows it is passed over.

    Raises:
        ValueError: it is damaged or cut short, or there is no room to unpack it.
        Unable: (rule ``missing-tool``) the library is not there.
    """
    library = _library()
    stream = library.ZSTD_createDStream()
    if not stream:
        raise ValueError("no room")
    try:
        taken = _Buffer(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data), 0)
        room = ctypes.create_string_buffer(_CHUNK)
        out = []
        while True:
            given = _Buffer(ctypes.addressof(room), _CHUNK, 0)
            left = library.ZSTD_decompressStream(stream, ctypes.byref(given), ctypes.byref(taken))
            if library.ZSTD_isError(left):
                raise ValueError("damaged")
            out.append(ctypes.string_at(room, given.used))
            if left == 0:
                return b"".join(out)
            if taken.used == taken.size and given.used < given.size:
                raise ValueError("cut short")
    finally:
        library.ZSTD_freeDStream(stream)


def unpack_inside(image: bytes, begins: bytes) -> bytes | None:
    """What the first frame in ``image`` unpacks to that begins so; None: there is no such frame.

    Raises:
        Unable: (rule ``missing-tool``) the library is not there.
    """
    at = image.find(MAGIC)
    while at >= 0:
        try:
            found = decompress(image[at:])
        except ValueError:
            found = b""
        if found.startswith(begins):
            return found
        at = image.find(MAGIC, at + 1)
    return None
