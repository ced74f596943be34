"""Every notebook opens in Colab: its first code cell installs the release where the package is missing, into versions that Colab has."""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import requires
from pathlib import Path

import pytest
from conftest import ROOT, settings, text, tool, tracked
from packaging.requirements import Requirement

colab, lock = tool("colab"), tool("lock")


def test_every_notebook_with_code_has_the_current_cell():
    assert not colab.stale(), "python tools/colab.py"


def cell(source, kind="code", **extra): return {"cell_type": kind, "source": source, "metadata": {}, **({"outputs": [1]} if kind == "code" else {}), **extra}


def test_the_cell_stands_after_the_title_once_and_other_cells_stay():
    nb = {"cells": [cell("# T\n\n> s", "markdown"), cell(["#| default_exp x"]), cell("1 + 1")], "metadata": {"provenance": {}}}
    done = colab.insert(nb)
    assert [done["cells"][0], *done["cells"][2:]] == nb["cells"] and "".join(done["cells"][1]["source"]) == colab.cell()
    assert done["metadata"] == nb["metadata"] and colab.insert(done) is done
    older = {**done, "cells": [*done["cells"], cell(colab.cell().replace("@v", "@v0."))]}
    assert colab.insert(older) == done
    prose = {"cells": [nb["cells"][0]]}
    assert colab.insert(prose) is prose
    digest = tool("run").code_digest
    assert digest(nb) == digest(done), "the cell counts as code that must run again"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    "An environment with all but this package, and a repository with the release where the cell's address leads: `run(code) -> stdout`."
    folder = tmp_path_factory.mktemp("colab")
    for path in tracked():
        if path.parts[0] == "deepclustering" or len(path.parts) == 1:
            (folder / "release" / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / "release" / path)
    git = ["git", "-C", folder / "release", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "release"], ["tag", f"v{settings()['version']}"], ["rm", "-rqf", "deepclustering"],
                    ["commit", "-qm", "later"]): subprocess.run([*git, *command], check=True)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "rest.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")  # whose .pth files, our editable install, are not read
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{(folder / 'release').as_uri()}.insteadOf",
           "GIT_CONFIG_VALUE_0": settings()["git_url"], "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    def run(code):
        done = subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout
    return run


RUN = """
import json
from IPython.core.interactiveshell import InteractiveShell
shell, calls = InteractiveShell.instance(), []
magic = shell.run_line_magic
shell.run_line_magic = lambda name, line: (calls.append(f"%{{name}} {{line}}"), magic(name, line))
done = shell.run_cell({!r})
done.raise_error()
import deepclustering.core
print(json.dumps([calls, done.result, deepclustering.core.__file__]))
"""


def test_the_cell_installs_the_release_where_the_package_is_missing_and_only_there(elsewhere):
    assert elsewhere("from importlib.util import find_spec; print(find_spec('deepclustering'))").strip() == "None"
    first, second = (json.loads(elsewhere(RUN.format(colab.cell())).splitlines()[-1]) for _ in range(2))
    assert first[0] == [f"%pip install -q git+{settings()['git_url']}@v{settings()['version']}"] and second[0] == []
    assert first[2] == second[2] and "env" in Path(first[2]).parts
    assert second[1].startswith(("the CPU", "a GPU"))
    assert elsewhere("from importlib.metadata import version; print(version({!r}))".format(settings()["lib_name"])).strip() == settings()["version"]


def test_colab_has_what_we_require():
    "What Colab lacks would be installed beside what it has, so that must get along with it too."
    freeze, wanted = text("tests/colab.txt"), lock.requirements("requirements")
    pinned = lock.pins(freeze)
    assert pinned["python"] in Requirement(f"python>={settings()['min_python']}").specifier and "torch" in pinned
    assert not lock.unsatisfied(freeze, wanted, complete=False), "tools/lock.py --check shows which"
    lacking = [r.name for r in wanted if r.name not in pinned]
    brought = [r for name in lacking for r in map(Requirement, requires(name) or []) if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert not lock.unsatisfied(freeze, brought, complete=False), f"{lacking} would change Colab's own"


def test_a_list_that_breaks_a_requirement_is_noticed():
    assert lock.unsatisfied(text("tests/colab.txt"), [Requirement("fastcore<2")], complete=False) == ["fastcore<2"]
    assert {"torch", "sympy", "mpmath"} <= colab.needed([Requirement("torch")]) and "scikit-learn" not in colab.needed([Requirement("torch")])
