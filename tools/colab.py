"""Notebooks that open in Colab: a hidden first code cell that installs the package where it is missing, and what Colab has installed.

    python tools/colab.py                   write the cell into every notebook; their other cells stay as they are
    python tools/colab.py --check           only say which notebooks lack it, or have an older one
    python tools/colab.py --versions CLONE  tests/colab.txt, from a clone of Colab's published list (googlecolab/backend-info)
"""
import argparse
import hashlib
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import requires as requires_of
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.append(str(Path(__file__).parent))
from lock import ROOT, pins, requirements, settings

VERSIONS = ROOT / "tests/colab.txt"
MARK = "# For Colab, by tools/colab.py: the package at its release where it is missing, and what this runs on."


def cell():
    "The source of the cell; owner, repository and release stand in settings.ini. Only a kernel runs it: not nbdev's tests, not its pages."
    address = "git+{git_url}@v{version}".format_map(dict(settings()))
    return f"""#| hide
#| eval: false
{MARK}
try: import torch, deepclustering.core
except ImportError:
    get_ipython().run_line_magic("pip", "install -q {address}")
    import torch, deepclustering.core
"a GPU" if torch.cuda.is_available() else "the CPU; Runtime > Change runtime type offers GPUs\""""


def is_ours(cell): return MARK in "".join(cell["source"])


def insert(nb):
    "The notebook with the current cell after its title; the same notebook if it has it, or no code that would need it."
    ours, cells = ([c for c in nb["cells"] if is_ours(c) is mine] for mine in (True, False))
    if [("".join(c["source"])) for c in ours] == [cell()] or not ours and not any(c["cell_type"] == "code" for c in cells): return nb
    first = next(i for i, c in enumerate(cells) if c["cell_type"] == "markdown") + 1
    new = {"cell_type": "code", "execution_count": None, "id": hashlib.sha256(MARK.encode()).hexdigest()[:8], "metadata": {"tags": []}, "outputs": [],
           "source": cell().splitlines(keepends=True)}
    return {**nb, "cells": [*cells[:first], new, *cells[first:]]}


def notebooks(): return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts))


def stale():
    "The notebooks without the current cell."
    return [p for p in notebooks() if (nb := json.loads(p.read_text(encoding="utf-8"))) is not insert(nb)]


def needed(wanted):
    "The canonical names of what these requirements bring, by the metadata of what is installed here."
    found, todo = set(), [r.name for r in wanted]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found: continue
        found.add(name)
        try: lines = requires_of(name) or []
        except PackageNotFoundError: continue
        todo += [r.name for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def versions(clone):
    "What tests/colab.txt holds: of Colab's published list, the packages that ours need."
    git = lambda *args: subprocess.run(["git", "-C", clone, *args], capture_output=True, text=True, check=True).stdout.strip()
    pinned, names = pins(git("show", "HEAD:pip-freeze.gpu.txt")), needed(requirements())
    if VERSIONS.exists(): names |= pins(VERSIONS.read_text()).keys()  # where little is installed, `needed` sees little
    python = re.search(r"Python ([\d.]+)", git("show", "HEAD:os-info.txt"))[1]
    head = f"# What Colab has installed, as far as this package needs it: googlecolab/backend-info, pip-freeze.gpu.txt\n# at {git('log', '-1', '--format=commit %h of %as')}; `python tools/colab.py --versions CLONE` writes this file\n"
    return head + f"python=={python}\n" + "".join(f"{n}=={v}\n" for n, v in sorted(pinned.items()) if n in names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--versions", type=Path, metavar="CLONE")
    args = parser.parse_args()
    if args.versions: return VERSIONS.write_text(versions(args.versions)) and None
    for path in (found := stale()):
        print(path.relative_to(ROOT))
        if not args.check: path.write_text(json.dumps(insert(json.loads(path.read_text(encoding="utf-8"))), ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if args.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
