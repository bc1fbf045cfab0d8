"""Module signatures, with the target's own ``scripts/sign-file``."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from kmend.core.errors import Failed, UsageError
from kmend.core.run import run
from kmend.core.target import Target

#: kernel/module/signing.c: what a signed module ends with.
MAGIC = b"~Module signature appended~\n"


def sign(target: Target, module: bytes, key: Path | str, certificate: Path) -> bytes:
    """The module with a signature appended.

    ``key`` is a PEM file or a ``pkcs11:`` URI, ``certificate`` X.509 in PEM or DER; the digest is the one
    of the target's configuration (``CONFIG_MODULE_SIG_HASH``), which its kernel is sure to know.

    Raises:
        UsageError: a file cannot be read.
        Failed: sign-file refuses them.
    """
    for path in (certificate, *(() if str(key).startswith("pkcs11:") else (Path(key),))):
        if not path.is_file():
            raise UsageError(
                f"{path} is no file",
                why="signing needs a private key and its certificate",
                next_step="name both with --sign-key and --sign-cert",
                rule="unreadable",
            )
    tool = target.source / "scripts" / "sign-file"
    if not tool.exists():
        raise Failed(
            f"{target.release} has no scripts/sign-file",
            why="its configuration has no CONFIG_MODULE_SIG_FORMAT",
            next_step="build without --sign-key",
            rule="no-sign-file",
        )
    found = re.search(r'^CONFIG_MODULE_SIG_HASH="(\w+)"$', target.config.read_text(), re.MULTILINE)
    digest = found[1] if found else "sha256"
    with tempfile.TemporaryDirectory(prefix="kmend-sign-") as folder:
        plain, signed = Path(folder) / "module.ko", Path(folder) / "signed.ko"
        plain.write_bytes(module)
        run([tool, digest, str(key), certificate, plain, signed], timeout=120)
        data = signed.read_bytes()
    if not data.endswith(MAGIC):
        raise Failed("sign-file appended no signature", rule="signing")
    return data
