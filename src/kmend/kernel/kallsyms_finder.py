"""Child process: find and decode the kallsyms tables inside a vmlinux, one row per symbol on stdout.

Run as ``python -m kmend.kernel.kallsyms_finder VMLINUX``. The work is vmlinux-to-elf's, which scans
the whole image for the tables; in a process of its own its 180 MB, its loggers and whatever it
raises stay out of kmend. Rows: ``address letter name`` in the order of the table.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(path: str) -> int:
    """Write the rows; a failure ends the process with the library's own message on stderr."""
    from vmlinux_to_elf.core.kallsyms import KallsymsFinder  # noqa: PLC0415 - heavy, and only wanted here

    finder = KallsymsFinder(Path(path).read_bytes(), bit_size=64)
    rows = zip(finder.kernel_addresses, finder.symbol_names, strict=True)
    sys.stdout.write("".join(f"{address:x} {name[0]} {name[1:]}\n" for address, name in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
