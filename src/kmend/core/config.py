"""Where things lie: flags over environment (``KMEND_*``) over ``/etc/kmend/kmend.toml``.

One row of :data:`SETTINGS` is everything about one setting.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import UsageError

CONFIG_FILE = Path("/etc/kmend/kmend.toml")
#: Of the package debian-archive-keyring: what apt itself checks Debian's indexes with.
DEFAULT_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True, slots=True)
class Setting:
    """A row: key in the TOML file; ``KMEND_`` + its upper case in the environment; what it means."""

    key: str
    help: str


SETTINGS = (
    Setting("cache", "folder of downloaded and prepared kernels"),
    Setting("state", "folder of kmend's own state (installed patches, journal)"),
    Setting("jobs", "how many compilers run at once"),
    Setting("mirror", "base URL of a package archive laid out like Debian's snapshot archive"),
    Setting("keyring", "public keys that the indexes of that archive must be signed with"),
)


@dataclass(frozen=True, slots=True)
class Config:
    """The settings in force."""

    cache: Path
    state: Path
    jobs: int
    mirror: str
    keyring: Path = DEFAULT_KEYRING

    @property
    def targets(self) -> Path:
        """One folder per prepared kernel."""
        return self.cache / "targets"

    @property
    def downloads(self) -> Path:
        return self.cache / "downloads"

    @property
    def objects(self) -> Path:
        """Compiled original objects, by content."""
        return self.cache / "objects"

    @property
    def lab(self) -> Path:
        """Snapshots of booted guests."""
        return self.cache / "lab"


def default_cache(env: Mapping[str, str], *, root: bool) -> Path:
    """``$XDG_CACHE_HOME/kmend``; without it ``/var/cache/kmend`` for root, ``~/.cache/kmend`` for others."""
    base = env.get("XDG_CACHE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "kmend"
    if root:
        return Path("/var/cache/kmend")
    return Path(env.get("HOME", "/")) / ".cache" / "kmend"


def load(
    flags: Mapping[str, str | None] | None = None,
    env: Mapping[str, str] | None = None,
    file: Path = CONFIG_FILE,
) -> Config:
    """Merge the three sources of settings.

    Raises:
        UsageError: the file is no TOML, has an unknown key, or a value has the wrong form.
    """
    env = os.environ if env is None else env
    values: dict[str, str] = {}
    known = {row.key for row in SETTINGS}
    data = _read(file)
    for key, value in data.items():
        if key not in known or not isinstance(value, str | int):
            raise UsageError(
                f"{file}: unknown setting {key!r}"
                if key not in known
                else f"{file}: {key} has the wrong type",
                why=f"known settings: {', '.join(sorted(known))}",
                next_step="remove the line",
                rule="config",
            )
        values[key] = str(value)
    for row in SETTINGS:
        if text := env.get("KMEND_" + row.key.upper()):
            values[row.key] = text
        flag = (flags or {}).get(row.key)
        if flag is not None:
            values[row.key] = flag
    jobs_text = values.get("jobs", str(os.cpu_count() or 1))
    if not jobs_text.isdigit() or int(jobs_text) < 1:
        raise UsageError(f"jobs = {jobs_text!r}", why="a whole number of at least 1 is needed", rule="config")
    return Config(
        cache=Path(values.get("cache") or default_cache(env, root=os.geteuid() == 0)).absolute(),
        state=Path(values.get("state", "/var/lib/kmend")).absolute(),
        jobs=int(jobs_text),
        mirror=values.get("mirror", "https://snapshot.debian.org").rstrip("/"),
        keyring=Path(values.get("keyring") or DEFAULT_KEYRING).absolute(),
    )


def _read(file: Path) -> Mapping[str, object]:
    """The values of the settings file; none when there is no such file.

    Raises:
        UsageError: rule ``config``.
    """
    try:
        text = file.read_text()
        if not text.strip():
            return {}
        import tomllib  # noqa: PLC0415 - few machines have the file; each start would pay for the parser

        return tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no TOML
        raise UsageError(
            f"{file} cannot be read", why=str(error), next_step="mend or remove the file", rule="config"
        ) from error
