"""Power cuts at random moments of install, uninstall and boot, in guests whose disk outlives them.

    .venv/bin/python bench/power_cuts.py [NUMBER] [SEED] [RELEASE]      (default: 30 cuts, 1, 6.1.0-55-amd64)

Every other cut kills a guest that changes the store of installed patches without pause; the others one whose
boot is loading what is installed. The next boot must find the store sound, load exactly what it names (or
nothing, by the crash guard), and change it again. Prints what each boot found; ends with status 1 at the
first that is not as it should be.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/lab"))

import test_boot as lab  # noqa: E402 - the path above makes it importable

from kmend.core.target import Release  # noqa: E402 - as above
from kmend.lab.kernel import LabKernel  # noqa: E402 - as above
from measure import settings, target_of  # noqa: E402 - as above


def main() -> int:
    """Cut, boot, look; again."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    release = Release(sys.argv[3] if len(sys.argv) > 3 else "6.1.0-55-amd64")
    chance = random.Random(seed)
    config = settings()
    target = target_of(config, release)
    with tempfile.TemporaryDirectory(prefix="kmend-power-cuts-") as scratch:
        folder = Path(scratch)
        modules = lab.build(target, folder)
        server = lab.Server(LabKernel.of(target), config, modules, folder / "disk")
        began = time.monotonic()
        cuts = lab.Cuts(server, chance)
        print(
            ", ".join(f"{kind}: {took:.1f} s undisturbed" for kind, took in cuts.seconds.items()), flush=True
        )
        for at in range(1, number + 1):
            found = cuts.cut(lab.KINDS[at % 2])
            print(f"{at:3}/{number}  {found}  ({time.monotonic() - began:.0f} s)", flush=True)
        print(f"         {cuts.end()}")
    print(
        f"{number} power cuts on {release}, every boot sound "
        f"(seed {seed}, load average {os.getloadavg()[0]:.1f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
