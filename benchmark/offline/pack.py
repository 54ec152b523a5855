"""Gathers what a GPU machine without a network lacks, so that benchmarks and tests run there.

    python -m benchmark.offline.pack FOLDER

Into FOLDER go the wheels that wheels.txt lists, at the versions of python/constraints.txt, and this
package's own. With the repository and FOLDER copied there:

    bash benchmark/offline/run.sh FOLDER python3 -m benchmark.encode --shape t5-xxl --device cuda
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "python"


def wheels() -> list[str]:
    """Names of packages, without their versions."""
    lines = (HERE / "wheels.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def platforms(glibc: int) -> list[str]:
    """What pip calls x86-64 machines with glibc 2.`glibc`: it knows that of no newer ones by
    itself."""
    numbers = [f"manylinux_2_{minor}_x86_64" for minor in range(glibc, 4, -1)]
    return [*numbers, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments), "-q"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the other machine")
    parser.add_argument("--glibc", type=int, default=39, help="its minor version, there")
    args = parser.parse_args()
    if any(args.folder.glob("*.whl")):
        # Two versions of a package would keep all from being installed.
        parser.error(f"{args.folder} holds wheels already; give a folder without any")

    pip(
        "download", "--no-deps", "--only-binary=:all:", "--implementation=cp",
        f"--python-version={args.python}", *(f"--platform={one}" for one in platforms(args.glibc)),
        f"--constraint={PACKAGE / 'constraints.txt'}", f"--dest={args.folder}", *wheels(),
    )  # fmt: skip
    pip("wheel", "--no-deps", f"--wheel-dir={args.folder}", PACKAGE)
    size = sum(wheel.stat().st_size for wheel in args.folder.glob("*.whl"))
    print(f"{len(wheels()) + 1} wheels, {size / 1e6:.0f} MB, in {args.folder}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode) from error
