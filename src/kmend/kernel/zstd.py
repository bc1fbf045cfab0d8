"""Unpacking zstd: by the Python package zstandard, else by the C library.

Debian's dpkg depends on the library, so a server has it without any Python package; Python has no decoder of
its own before 3.14. The package unpacks faster. Interface of the library: zstd.h, "Streaming decompression".
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

from kmend.core.errors import Unable

#: So much is unpacked at once.
_CHUNK = 8 << 20


class _Buffer(ctypes.Structure):
    """``ZSTD_inBuffer`` and ``ZSTD_outBuffer``: place, size, how much of it is used."""

    _fields_ = (("place", ctypes.c_void_p), ("size", ctypes.c_size_t), ("used", ctypes.c_size_t))


def decompress(data: bytes) -> bytes:
    """The frame at the beginning of ``data``; what follows it is passed over.

    Raises:
        ValueError: it is damaged or cut short, or there is no room to unpack it.
        Unable: (rule ``missing-tool``) neither the package nor the library is there.
    """
    try:
        import zstandard  # noqa: PLC0415 - a server that only loads patches has not got it
    except ImportError:
        return _by_library(data)
    decoder = zstandard.ZstdDecompressor().decompressobj()
    try:
        out = decoder.decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if not decoder.eof:
        raise ValueError("cut short")
    return out


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
            why=f"there is no Python package zstandard, and of the library: {error}",
            next_step="apt install libzstd1 (or python3-zstandard)",
            rule="missing-tool",
        ) from error
    return library


def _by_library(data: bytes) -> bytes:
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
