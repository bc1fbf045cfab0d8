"""The arguments of the verbs that make a module: for which kernel, where it goes, how it is signed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core.errors import UsageError
from kmend.core.target import Release

if TYPE_CHECKING:
    from kmend.product import Signing


def configure(parser: argparse.ArgumentParser, *, name: str) -> None:
    """``--kernel``, ``-o``, ``-n`` (``name`` says where the default comes from), ``--sign-…``."""
    parser.add_argument(
        "--kernel", metavar="RELEASE", help="the kernel to build for (default: the running one)"
    )
    parser.add_argument("-o", "--output", metavar="DIR", default=".", help="where NAME.ko and NAME.json go")
    parser.add_argument("-n", "--name", help=f"the module's name (default: {name})")
    parser.add_argument("--sign-key", metavar="FILE", help="private key (PEM or PKCS#11 URI) to sign with")
    parser.add_argument("--sign-cert", metavar="FILE", help="its X.509 certificate")


def release(args: argparse.Namespace) -> Release:
    """The kernel meant: ``--kernel``, or the running one."""
    return Release(os.uname().release if args.kernel is None else args.kernel)


def folder(args: argparse.Namespace) -> Path:
    """The folder that ``-o`` names.

    Raises:
        UsageError: it cannot be written.
    """
    output = Path(args.output)
    if not output.is_dir() or not os.access(output, os.W_OK):
        raise UsageError(
            f"{output} is no folder that can be written",
            why="the module and its report go there",
            next_step="make it, or name another one with -o",
            rule="unwritable",
        )
    return output


def signing(args: argparse.Namespace) -> Signing | None:
    """The key and the certificate, when they are given.

    Raises:
        UsageError: one of the two is missing.
    """
    from kmend.product import Signing

    if bool(args.sign_key) != bool(args.sign_cert):
        raise UsageError(
            "--sign-key and --sign-cert belong together",
            why="the kernel looks for the certificate's key id in a signature",
            next_step="give both",
            rule="usage",
        )
    return Signing(args.sign_key, Path(args.sign_cert)) if args.sign_key else None
