"""The house keeps its own rules: imports, generated files, names and addresses in one place."""
import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import FunctionType

import pytest
import yaml
from packaging.requirements import Requirement

from conftest import NOTEBOOKS, ROOT, settings, text, tool, tracked

PACKAGES = ["deepclustering", *(f"deepclustering.{p.parent.name}" for p in sorted((ROOT / "deepclustering").glob("*/__init__.py")))]
GENERATED = {"README.md", "CONTRIBUTING.md", "deepclustering/_modidx.py"}


def symbols(package):
    "Public `(name, module)` pairs that nbdev's index knows directly inside a package."
    from deepclustering._modidx import d
    return [(symbol.rpartition(".")[2], module) for module, found in d["syms"].items() if module.rpartition(".")[0] == package
            for symbol in found if symbol.rpartition(".")[0] == module and not symbol.rpartition(".")[2].startswith("_")]


def modules(package): return {m.name for m in iter_modules([str(ROOT / package.replace(".", "/"))]) if not m.name.startswith("_")}


# --- importing ----------------------------------------------------------------------------------------------------------

def test_import_is_light():
    code = ("import sys, time, torch; before = set(sys.modules); start = time.process_time(); import deepclustering;"
            "import deepclustering.core, deepclustering.clustering, deepclustering.pooling, deepclustering.moe, deepclustering.kv, deepclustering.parallelism; print(time.process_time() - start, *(set(sys.modules) - before))")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split() for _ in range(2)]
    assert min(float(r[0]) for r in runs) < 0.3
    heavy = {"triton", "transformers", "sklearn", "scipy", "matplotlib", "matplotlib.pyplot", "networkx", "faiss"}
    assert not heavy & set(runs[0][1:])


@pytest.mark.parametrize("package", PACKAGES)
def test_lazy_names(package):
    loaded = importlib.import_module(package)
    indexed, public = modules(package) | {n for n, _ in symbols(package)}, {n for n in dir(loaded) if not n.startswith("_")}
    exported = Counter(name for m in modules(package) for name in getattr(importlib.import_module(f"{package}.{m}"), "__all__", ()))
    assert public == indexed | {name for name in public if exported[name] == 1 and not isinstance(getattr(loaded, name), (type, FunctionType))}   # constants that `attach` is told of
    for name in public - indexed: assert any(getattr(importlib.import_module(f"{package}.{m}"), name, None) is getattr(loaded, name) for m in modules(package) if name in getattr(importlib.import_module(f"{package}.{m}"), "__all__", ()))
    for name, module in symbols(package):
        assert getattr(importlib.import_module(package), name) is getattr(importlib.import_module(module), name)
    for name in modules(package): assert find_spec(f"{package}.{name}")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_means_one_thing(package):
    names = [n for n, _ in symbols(package)]
    assert not set(names) & modules(package), "a symbol is called like a sibling module"
    assert not [n for n, times in Counter(names).items() if times > 1], "two modules of a package export the same name"


# --- what is generated is current -----------------------------------------------------------------------------------------

def test_modules_are_what_the_notebooks_export(tmp_path):
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for init in (ROOT / "deepclustering").rglob("__init__.py"):
        target = tmp_path / init.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(init, target)
    subprocess.run([sys.executable, "-c", "from nbdev.export import *; from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"],
                   cwd=tmp_path, check=True, capture_output=True)
    fresh = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "deepclustering").rglob("*.py")}
    kept = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "deepclustering").rglob("*.py")}
    assert sorted(fresh) == sorted(kept), "a module without a notebook, or one that was never exported: make export"
    stale = [str(p) for p in fresh if fresh[p] != kept[p]]
    assert not stale, f"make export: {stale}"


def test_readme_and_contributing_are_current():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_readme_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.M))
    assert {"tour", "test", "test-deep", "run", "site", "readme", "oracles", "gpu-check"} <= targets
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"^make ([a-z-]+)", text(page), re.M)) | set(re.findall(r"`make ([a-z-]+)", text(page)))
        assert named <= targets, f"{page} names {named - targets}"
    assert {"make tour", "make test"} <= set(re.findall(r"make [a-z]+", text("README.md")))


# --- packaging ------------------------------------------------------------------------------------------------------------

def test_setup_sets_what_pyproject_leaves_to_it():
    import tomllib
    argument = {"readme": "long_description", "authors": "author", "urls": "project_urls", "requires-python": "python_requires",
                "dependencies": "install_requires", "optional-dependencies": "extras_require", "entry-points": "entry_points", "scripts": "entry_points"}
    project = tomllib.loads(text("pyproject.toml"))["project"]
    call = next(n for n in ast.walk(ast.parse(text("setup.py"))) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    passed = {k.arg for k in call.keywords}
    assert {argument.get(f, f) for f in project["dynamic"]} <= passed
    assert project["name"] == settings()["lib_name"]
    installed = {(e.group, e.name, e.value) for e in metadata.distribution(project["name"]).entry_points}
    assert installed == {("console_scripts", "deepclustering", "deepclustering.core.cli:main"), ("nbdev", "deepclustering", "deepclustering._modidx:d")}


def test_constraints_satisfy_the_requirements():
    lock, pinned = tool("lock"), text("constraints.txt")
    assert not re.findall(r"^\S+\+\S+$", pinned, re.M), "a local version cannot be installed elsewhere: make lock"
    assert not lock.unsatisfied(pinned, lock.requirements("requirements", "dev_requirements", "peers_requirements", "docs_requirements"))


def test_a_freeze_that_breaks_a_requirement_is_noticed():
    lock, wanted = tool("lock"), [Requirement("torch>=2.9"), Requirement("numpy>=1.26")]
    assert lock.unsatisfied("torch==2.8.0+cu126\n", wanted) == ["torch>=2.9", "numpy>=1.26"]
    assert lock.unsatisfied("torch==2.9.0+cu126\n", wanted, complete=False) == []
    assert lock.pins("torch @ https://example.org/cu118/torch-2.1.0%2Bcu118-cp310-linux_x86_64.whl#sha256=1\nx @ file:///x\n") == {"torch": "2.1.0"}
    assert "torch==2.9.*" in lock.floor().splitlines()


def test_citation_agrees_with_settings():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert (citation["title"], citation["version"]) == (settings()["title"], settings()["version"])
    assert f"## {settings()['version']}" in text("CHANGELOG.md") or "## Unreleased" in text("CHANGELOG.md")


def test_requirements_stand_in_settings_alone():
    "No workflow, script or notebook installs a requirement by itself: a second list would drift."
    named = {Requirement(l).name for l in settings()["requirements"].split()} - {"torch"}
    for path in tracked():
        if path.parts[0] in (".github", ".ci") or path.name == "Makefile":
            installs = re.findall(r"pip install ([^\n]*)", text(path))
            assert not named & {w for i in installs for w in re.split(r"[\s\"'=<>\[]+", i)}, path


# --- what must not stand in a file ----------------------------------------------------------------------------------------

def where(pattern, files, flags=0, generated="\0"):
    "`path:line` of every match outside the text that is generated."
    found = {p: text(p).replace(generated, "") for p in files}
    return [f"{p}:{t[:m.start()].count(chr(10)) + 1}: {m.group()}" for p, t in found.items() for m in re.finditer(pattern, t, flags)]


def test_no_path_of_a_machine():
    files = [p for p in tracked() if p != Path("tests/test_house.py")]
    assert not where(r"(?<![\w.:/}$-])/(root|work|home|Users|mnt|opt)/[\w.-]+", files)


def test_no_address_of_a_package_index():
    files = [p for p in tracked() if p != Path("tests/test_house.py")]
    hosts = r"files\.pythonhosted\.org|download\.pytorch\.org|pypi\.org/simple|https?://[\w.-]*(artifactory|nexus|mirror|registry)[\w.-]*|https?://(?!127\.)\d+\.\d+\.\d+\.\d+"
    assert not where(hosts, files)


def test_owner_and_site_stand_in_settings_alone():
    files = [p for p in tracked() if str(p) not in GENERATED | {"settings.ini"}]
    cfg = settings()
    assert not where("|".join(re.escape(a) for a in (cfg["git_url"], f"{cfg['user']}/{cfg['repo']}", f"{cfg['user']}.github.io", cfg["author_email"])), files,
                     generated=next(line for line in json.dumps(tool("colab").cell()).split("\\n") if "git+" in line))


def test_nobody_is_told_to_install_another_project():
    "On PyPI the name `deepclustering` belongs to someone else."
    assert not where(r"pip3? install (-\S+ )*deepclustering\b(?!-book)", [p for p in tracked() if p != Path("tests/test_house.py")])


def test_no_pickle_is_read():
    files = [p for p in tracked() if p.suffix in (".py", ".ipynb") and p.parts[0] in ("deepclustering", "nbs", "tools", "benchmarks")]
    assert not where(r"\bpickle\.loads?\(|\bpickle\.Unpickler\(|torch\.load\((?!io\.BytesIO)|np\.load\([^)\n]*allow_pickle\s*=\s*True|joblib\.load\(|read_pickle\(", files)


def test_files_are_small_and_text():
    for path in tracked():
        assert (ROOT / path).stat().st_size < 2_000_000, path
        assert path.suffix not in (".pt", ".pkl", ".npy", ".npz", ".whl"), path


# --- layout ---------------------------------------------------------------------------------------------------------------

def test_quarto_config_is_one_file():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"


def test_sidebar_holds_every_notebook_once():
    def leaves(node):
        if isinstance(node, str): yield node
        elif isinstance(node, list):
            for n in node: yield from leaves(n)
        else: yield from leaves(node.get("contents", node.get("href", [])))
    listed = Counter(leaves(yaml.safe_load(text("nbs/sidebar.yml"))["website"]["sidebar"]))
    there = Counter(p.relative_to("nbs").as_posix() for p in NOTEBOOKS)
    assert listed == there, f"only in the sidebar: {sorted(listed - there)}, missing in it: {sorted(there - listed)}"


def test_ci_files():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")): assert yaml.safe_load(path.read_text())["jobs"]


def test_arrows_go_one_way():
    "core knows no family, and a family knows core and itself; where a paper joins two, the module stands in the list."
    joins = set()
    may = {"tool": {"clustering"}}  # the command line: it offers the clusterers by name
    for path in tracked():
        if path.parts[0] != "deepclustering" or path.suffix != ".py" or len(path.parts) < 3: continue
        others = set(re.findall(r"deepclustering\.(\w+)|from \.\.(\w+)", "\n".join(l for l in text(path).splitlines() if re.match(r"\s*(from|import) ", l))))
        assert set(map("".join, others)) - {"core", "_modidx", path.parts[1]} <= may.get(path.parts[1], set()) or str(path) in joins, path
