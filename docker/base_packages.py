"""Keeps the packages that the base image brings: they are built for each other, for its GPUs and for its driver.

python3 base_packages.py write FILE      a pip constraint for each, before anything is installed
python3 base_packages.py check FILE      exit with 1 if a package has changed since
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

KEPT = re.compile(
    r"torch(vision|audio)?|(pytorch-)?triton(-.*)?|apex|transformer-engine(-.*)?|flash-attn(-.*)?|(amd-)?aiter|flydsl"
    r"|primus-turbo|megatron-core|(amd|rocm|nvidia)-.*"
)


def installed() -> dict[str, str]:
    """Normalised name -> version of the packages to keep."""
    found = {re.sub(r"[-_.]+", "-", item.name).lower(): item.version for item in distributions()}
    return {name: version for name, version in sorted(found.items()) if KEPT.fullmatch(name)}


def changes(constraints: str, now: dict[str, str]) -> list[str]:
    """What differs from the constraints, one line for each package."""
    before = dict(line.split("==", 1) for line in constraints.splitlines())
    return [
        f"{name} was {version} in the base image and is {now.get(name, 'gone')} now"
        for name, version in before.items()
        if now.get(name) != version
    ]


def main(action: str, file: str) -> int:
    if action == "write":
        Path(file).write_text("".join(f"{name}=={version}\n" for name, version in installed().items()))
        print(Path(file).read_text(), end="")
        return 0
    changed = changes(Path(file).read_text(), installed())
    print("\n".join(changed) or "all packages of the base image are as they were")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
