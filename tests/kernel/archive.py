"""A package archive laid out like Debian's snapshot archive, made of small packages, on 127.0.0.1.

It signs its indexes with a key of its own. What it serves can be changed while it runs, so that tests
can damage it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Deb:
    name: str
    version: str
    architecture: str
    control: str
    data: bytes

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.version}_{self.architecture}.deb"

    @property
    def pool(self) -> str:
        return f"pool/main/l/linux/{self.file_name}"

    def stanza(self) -> str:
        return (
            f"{self.control.rstrip()}\nFilename: {self.pool}\nSize: {len(self.data)}\n"
            f"SHA256: {hashlib.sha256(self.data).hexdigest()}\n"
        )


def make_deb(
    folder: Path, name: str, version: str, architecture: str, files: dict[str, bytes], depends: str = ""
) -> Deb:
    """Build a real .deb with dpkg-deb."""
    root = folder / f"{name}_{version}"
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\nInstalled-Size: 1\n"
        "Maintainer: Nobody <nobody@example.invalid>\nDescription: made for a test\n"
    )
    if depends:
        control += f"Depends: {depends}\n"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(control)
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    deb = folder / f"{name}_{version}_{architecture}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", root, deb], check=True, capture_output=True
    )
    return Deb(name, version, architecture, control, deb.read_bytes())


@dataclass
class Source:
    """A source package: its packaging alone, which is what kmend asks for."""

    name: str
    version: str
    packaging: bytes

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.version}.debian.tar.xz"

    @property
    def dsc(self) -> bytes:
        """Unsigned: nobody has the keys of those who upload."""
        digest = hashlib.sha256(self.packaging).hexdigest()
        return (
            f"Format: 3.0 (quilt)\nSource: {self.name}\nVersion: {self.version}\n"
            f"Checksums-Sha256:\n {digest} {len(self.packaging)} {self.file_name}\n"
        ).encode()

    @property
    def files(self) -> dict[str, bytes]:
        return {f"{self.name}_{self.version}.dsc": self.dsc, self.file_name: self.packaging}

    def stanza(self) -> str:
        rows = [(hashlib.sha256(data).hexdigest(), len(data), name) for name, data in self.files.items()]
        return (
            f"Package: {self.name}\nBinary: linux-source-6.1\nVersion: {self.version}\nArchitecture: any\n"
            f"Format: 3.0 (quilt)\nDirectory: pool/main/l/linux\n"
            "Checksums-Sha256:\n" + "".join(f" {digest} {size} {name}\n" for digest, size, name in rows)
        )


class Signer:
    """A key made for the test, and its public half as a keyring."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "gnupg"
        self.home.mkdir(mode=0o700)
        self.keyring = folder / "keyring.gpg"
        self._gpg("--quick-generate-key", "Test Archive <test@example.invalid>", "ed25519", "sign", "never")
        self.keyring.write_bytes(self._gpg("--export"))

    def sign(self, text: bytes) -> bytes:
        return self._gpg("--clearsign", "--digest-algo", "SHA512", "--output", "-", "-", data=text)

    def _gpg(self, *arguments: str, data: bytes = b"") -> bytes:
        return subprocess.run(
            ["gpg", "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", "", *arguments],
            input=data,
            check=True,
            capture_output=True,
            env={**os.environ, "GNUPGHOME": str(self.home)},
        ).stdout

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", self.home, "--kill", "all"], check=False, capture_output=True)


@dataclass
class Archive:
    """``files`` maps a path of the server to its content; ``asked`` records the requests."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def publish(
        self,
        signer: Signer,
        archive: str,
        moment: str,
        suite: str,
        debs: list[Deb],
        sources: Sequence[Source] = (),
    ) -> None:
        """Put a signed suite below ``/archive/ARCHIVE/MOMENT/``, and its packages into the interface."""
        root = f"/archive/{archive}/{moment}"
        packages = "\n".join(deb.stanza() for deb in debs).encode()
        indexes = {"main/binary-amd64/Packages": packages}
        if sources:
            indexes["main/source/Sources"] = "\n".join(source.stanza() for source in sources).encode()
        indexes |= {f"{name}.gz": gzip.compress(data) for name, data in indexes.items()}
        rows = "".join(
            f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}\n" for name, data in indexes.items()
        )
        release = (
            f"Origin: Test\nSuite: {suite}\nCodename: {suite}\nComponents: main\nArchitectures: amd64 all\n"
            "Date: Mon, 02 Jan 2023 00:00:00 UTC\nValid-Until: Mon, 09 Jan 2023 00:00:00 UTC\n"
            f"Acquire-By-Hash: no\nSHA256:\n{rows}"
        )
        self.files[f"{root}/dists/{suite}/InRelease"] = signer.sign(release.encode())
        for name, data in indexes.items():
            self.files[f"{root}/dists/{suite}/{name}"] = data
        for source in sources:
            for name, data in source.files.items():
                self.files[f"{root}/pool/main/l/linux/{name}"] = data
        for deb in debs:
            self.files[f"{root}/{deb.pool}"] = deb.data
            self.describe(deb, archive, moment)

    def describe(self, deb: Deb, archive: str, moment: str) -> None:
        digest = hashlib.sha1(deb.data).hexdigest()
        info = {
            "archive_name": archive,
            "first_seen": moment,
            "name": deb.file_name,
            "path": f"/{deb.pool}",
            "size": len(deb.data),
        }
        versions = json.loads(self.files.get(f"/mr/binary/{deb.name}/", b'{"result": []}'))
        versions["result"].insert(0, {"name": deb.name, "binary_version": deb.version, "source": "linux"})
        self.files[f"/mr/binary/{deb.name}/"] = json.dumps(versions).encode()
        self.files[f"/mr/binary/{deb.name}/{deb.version}/binfiles"] = json.dumps(
            {
                "result": [{"architecture": deb.architecture, "hash": digest}],
                "fileinfo": {digest: [info]},
            }
        ).encode()


@contextmanager
def serving(archive: Archive) -> Iterator[Archive]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            archive.asked.append(path)
            data = archive.files.get(path)
            start = 0
            if data is not None and (ranged := self.headers.get("Range", "")).startswith("bytes="):
                start = min(int(ranged[6:].split("-")[0]), len(data))
            if data is None:
                self.send_response(404)
                data = b""
            elif start:
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:])

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        archive.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield archive
        finally:
            server.shutdown()
            thread.join()
