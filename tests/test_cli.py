"""`deepclustering` as a user has it: installed from a wheel, started from nowhere in particular, in a terminal of 80 columns."""
import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import ROOT, settings
from deepclustering.core.cli import COMMANDS

CALL = "import sys; from deepclustering.core.cli import main; sys.exit(main(sys.argv[1:]))"


def call(*words, **kwargs):
    return subprocess.run([sys.executable, "-c", CALL, *words], **{"capture_output": True, "text": True, "cwd": ROOT, **kwargs})


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A function that runs the command of a wheel, built and installed without the network, in which P001 has links."
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77: pytest.skip("pyproject.toml asks for setuptools 77")
    source, target, elsewhere = (tmp_path_factory.mktemp(n) for n in ("source", "target", "elsewhere"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "deepclustering", source / "deepclustering", ignore=shutil.ignore_patterns("__pycache__"))
    first, *rest = (source / "deepclustering/papers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    links = {"year": 2017, "notebook": "nbs/clustering/01_kmeans.ipynb", "symbols": ["clustering.KMeans"], "tests": ["tests/test_kmeans.py::test_x"]}
    (source / "deepclustering/papers.jsonl").write_text(json.dumps(json.loads(first) | links) + "\n" + "".join(rest), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir",
                    "--disable-pip-version-check", "--target", str(target), str(source)], check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COLUMNS", "PYTHON"))} | {"PYTHONPATH": str(target)}
    def run(*words): return subprocess.run([sys.executable, str(target / "bin/deepclustering"), *words], cwd=elsewhere, env=env, capture_output=True, text=True)
    run.target = target
    return run


def test_an_installed_package_holds_the_catalogue_and_the_command(installed):
    assert (installed.target / "deepclustering/papers.jsonl").exists()
    version = installed("--version")
    assert (version.returncode, version.stdout.strip()) == (0, f"deepclustering {settings()['version']}")
    listed = installed("papers")
    assert listed.returncode == 0 and len(listed.stdout.splitlines()) == len((ROOT / "deepclustering/papers.jsonl").read_text(encoding="utf-8").splitlines())


def test_without_a_ledger_the_verdict_is_unknown_and_nothing_fails(installed):
    listed = installed("papers", "--family", "clustering")
    assert listed.stdout.startswith("P001  unknown  clustering   ") and "unknown: the verdicts stand in the ledger" in listed.stderr
    one = installed("papers", "P001")
    assert one.returncode == 0 and not one.stderr
    assert "clustering, core: unknown" in one.stdout and "symbol: deepclustering.clustering.KMeans" in one.stdout
    assert "P001" not in installed("papers", "--todo").stdout


def test_bad_input_is_one_line_and_exit_code_2(installed):
    for words in (["papers", "--family", "x"], ["papers", "P999"], ["papers", "--nothing"], ["nothing"]):
        run = installed(*words)
        assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (2, "", 1) and run.stderr.startswith("deepclustering"), run.stderr


def test_it_starts_in_half_a_second_and_without_torch():
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = call("papers", "--todo")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run.returncode == 0
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert min(seconds() for _ in range(3)) < 0.5
    loaded = subprocess.run([sys.executable, "-X", "importtime", "-c", CALL, "papers"], capture_output=True, text=True, cwd=ROOT).stderr
    assert not re.findall(r"\| +(torch|numpy|scipy|sklearn|matplotlib|pandas)$", loaded, re.M)


def test_a_terminal_of_80_columns_and_a_pipe():
    main, terminal = pty.openpty()
    run = call("papers", "--family", "kv", capture_output=False, stdout=terminal, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "80"})
    os.close(terminal)
    shown = os.read(main, 100_000).decode().splitlines()
    os.close(main)
    piped = call("papers", "--family", "kv").stdout.splitlines()
    assert run.returncode == 0 and len(shown) == len(piped) and max(map(len, shown)) == 80 < max(map(len, piped))
    assert all(p.startswith(s.removesuffix("…")) for s, p in zip(shown, piped))
    for words in (["papers", "P001"], ["--help"], ["papers", "--help"]):
        assert max(map(len, call(*words, env={**os.environ, "COLUMNS": "80"}).stdout.splitlines())) <= 80


def test_head_gets_its_lines_and_no_traceback():
    command = f'"{sys.executable}" -c "{CALL}" papers | head -2'
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert len(run.stdout.splitlines()) == 2 and "Traceback" not in run.stderr and "rror" not in run.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_subcommand_exists_and_explains_its_arguments(name):
    from fastcore.docments import docments
    module, _, function = COMMANDS[name][0].partition(":")
    function = getattr(import_module(module), function)
    assert function.__doc__ and COMMANDS[name][1]
    helps = docments(function, full=True, returns=False)
    assert all(h.docment or getattr(h.anno, "help", None) for h in helps.values()), helps
    assert call(name, "--help").stdout.startswith(f"usage: deepclustering {name}")
