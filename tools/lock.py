"""Versions: `make lock` writes constraints.txt from what is installed.

    python tools/lock.py                 constraints.txt
    python tools/lock.py --floor         to stdout, the lowest versions that settings.ini allows, for the weekly run
    python tools/lock.py --check FILE    does a published `pip freeze` (Colab's) satisfy our requirements?
    python tools/lock.py --pins FILE     to stdout, such a freeze as constraints
"""
import argparse
import re
import sys
from configparser import ConfigParser
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# The versions that the suite was last seen green with: pip install -c constraints.txt -e .[dev,peers,kernels,docs]\n"


def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def requirements(*keys):
    "The requirements under these keys of settings.ini; those of the package itself if none is given."
    return [Requirement(line) for key in keys or ("requirements",) for line in settings()[key].split()]


def installed():
    "Name -> version of what is installed, without the installers and this project; a local version (2.13.0+cpu) is cut to what an index has."
    skip = {"pip", "setuptools", "wheel", canonicalize_name(settings()["lib_name"])}
    found = {d.metadata["Name"]: d.version.partition("+")[0] for d in distributions()}
    return {n: found[n] for n in sorted(found, key=str.casefold) if canonicalize_name(n) not in skip}


def pins(freeze):
    "Name -> version in a freeze: `name==version`, or `name @ address/name-version-tags.whl`; local versions cut."
    lines = re.findall(r"^([\w.-]+)(?:==| @ \S*/[\w.]+?-)(\d[^\s+%-]*)", freeze, re.M)
    return {canonicalize_name(n): v for n, v in lines}


def unsatisfied(freeze, wanted, complete=True):
    "The requirements that a freeze breaks; where it is `complete`, also those that it lacks."
    pinned = pins(freeze)
    return [str(r) for r in wanted if (v := pinned.get(canonicalize_name(r.name))) is None and complete or v is not None and v not in r.specifier]


def floor():
    "The lowest versions that the package's own requirements allow, as constraints."
    lowest = {r.name: next((s.version for s in r.specifier if s.operator == ">="), None) for r in requirements()}
    return "".join(f"{name}=={version}.*\n" for name, version in lowest.items() if version)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--pins", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.floor: return print(floor(), end="")
    if args.pins: return print("".join(f"{n}=={v}\n" for n, v in pins(args.pins.read_text()).items()), end="")
    if args.check:
        freeze = args.check.read_text()
        broken, pinned = unsatisfied(freeze, requirements(), complete=False), pins(freeze)
        for r in requirements(): print(f"{'BROKEN' if str(r) in broken else 'ok' if canonicalize_name(r.name) in pinned else 'to install':10s} {r}  {pinned.get(canonicalize_name(r.name), '')}")
        return 1 if broken or "torch" not in pinned else 0  # a file without torch is not what we think it is
    (ROOT / "constraints.txt").write_text(HEADER + "".join(f"{n}=={v}\n" for n, v in installed().items()))
    print(f"constraints.txt: {len(installed())} packages")


if __name__ == "__main__":
    sys.exit(main())
