"""Random livepatch scenarios on the model and on the real kernel in a guest: as many as one likes.

    klp_differential.py [RELEASE [COUNT [FIRST_SEED]]]

A scenario in which the two differ is made smaller and printed; then the status is 1. ``wrong handler found
in`` says in how many of them a model whose handler ignores ``func->transition`` would have been told from the
kernel. Only one guest runs at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from kmend.core.target import Release
from kmend.klp.line import line as line_of
from measure import settings, show, target_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/lab"))

from klp_guest import (
    Ground,
    Modules,
    ignore_transition,
    on_model,
    random_scenario,
    shrink,
)  # found by the line above


def main() -> int:
    given = sys.argv[1:]
    release = given[0] if given else "6.1.0-56-amd64"
    count = int(given[1]) if len(given) > 1 else 50
    first = int(given[2]) if len(given) > 2 else 1
    config = settings()
    target = target_of(config, Release(release))
    line = line_of(*map(int, release.split(".")[:2]))
    began = monotonic()
    differ = steps = done = caught = 0
    with TemporaryDirectory(prefix="kmend-bench-") as folder:
        modules = Modules(target, config, Path(folder) / "modules")
        with Ground(target, config.lab, modules) as ground:
            for seed in range(first, first + count):
                scenario = random_scenario(seed)
                observed = ground.run(scenario)
                done += 1
                steps += len(observed.results)
                caught += bool(on_model(scenario, line, ignore_transition).differences(observed))
                if on_model(scenario, line).differences(observed):
                    differ += 1
                    least, found = shrink(ground, scenario, line)
                    print(f"{scenario.name} differs:", *least.patches, *least.steps, *found, sep="\n  ")
                if not done % 10:
                    print(f"{done} scenarios, {differ} differ, {monotonic() - began:.0f} s", flush=True)
            starts = ground.starts
            built = len(modules.made)
    numbers = (done, steps, differ, caught, built, starts, round(monotonic() - began))
    show(
        f"random scenarios, model against kernel (seeds {first} to {first + count - 1})",
        ("kernel", "scenarios", "steps", "differ", "wrong handler found in", "modules", "guests", "seconds"),
        [[release, *map(str, numbers)]],
    )
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
