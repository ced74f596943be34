"""The runner notices failures, hangs and families that outgrow their share; the mutation check notices weak asserts."""
import ast
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from conftest import ROOT, tool

suite, mutate = tool("test"), tool("mutate")


def item(code, **kwargs): return suite.run(suite.Item("x", "core", [sys.executable, "-c", code], **kwargs))


def test_an_item_passes_or_fails():
    assert item("").counts == Counter(passed=1)
    failed = item("print('why'); raise SystemExit(3)")
    assert failed.counts == Counter(failed=1) and "why" in failed.output and "exit code 3" in failed.output
    assert item("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").counts["failed"] == 1


def test_a_hanging_item_is_stopped_with_its_children(tmp_path):
    code = f"import os, time; pid = os.fork()\nif not pid: time.sleep(3); open({str(tmp_path / 'orphan')!r}, 'w')\ntime.sleep(60)"
    start = time.perf_counter()
    stopped = item(code, timeout=1)
    assert stopped.counts == Counter(failed=1) and "stopped after 1 s" in stopped.output and time.perf_counter() - start < 3
    time.sleep(3)
    assert not (tmp_path / "orphan").exists()


def test_work_is_that_of_the_processor_and_of_children():
    busy = item("import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', 'import time\\nwhile time.process_time() < 0.5: pass'])\ntime.sleep(1)")
    assert busy.counts["passed"] and busy.seconds > 1.5 and 0.5 < busy.work < busy.seconds


def test_pytest_cases_are_counted_one_by_one(tmp_path):
    (tmp_path / "test_three.py").write_text("import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no')\n")
    report = tmp_path / "three.xml"
    command = [sys.executable, "-m", "pytest", str(tmp_path), f"--junitxml={report}", "-c", "/dev/null", "-p", "no:cacheprovider"]
    three = suite.run(suite.Item("three", "core", command, report=report))
    assert three.counts == Counter(passed=1, failed=1, skipped=1) and len(three.parts) == 3


def test_families():
    of = lambda p: suite.family_of(Path(p))
    assert of("nbs/core/01_checks.ipynb") == "core" and of("nbs/clustering/01_kmeans.ipynb") == "clustering"
    assert of("nbs/studies/clustering_digits.ipynb") == "clustering" and of("nbs/tour.ipynb") == "house"
    assert of("tests/test_ledger.py") == of("tests/test_checks.py") == "core" and of("tests/test_kv_budget.py") == "kv"
    assert of("nbs/core/30_kernels.ipynb") == of("tests/test_operators.py") == of("tests/test_aggregate_triton.py") == "kernels" != of("tests/test_aggregate.py")
    assert of("tests/test_site.py") == "site" and of("tests/test_house.py") == "house"


def test_report(capsys):
    ok = suite.Item("a", "core", [], seconds=1000, work=10, counts=Counter(passed=3, skipped=1))
    assert suite.report([ok], limits=True) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 passed, 0 failed, 1 skipped"
    slow = suite.Item("b", "kv", [], seconds=1, work=suite.SHARE["kv"] + 1, counts=Counter(passed=1))
    assert suite.report([ok, slow], limits=True) == 1
    out = capsys.readouterr().out
    assert "OUTGREW" in out and out.splitlines()[-1] == "4 passed, 1 failed, 1 skipped"
    assert suite.report([ok, slow], limits=False) == 0


CELL = '''def clip(x, low=0):
    "Not below `low`: 0 < 1."
    if x < low: raise ValueError(f"{x - 1} is too small")
    return -max(x, low) if not x else x + 1
'''


def test_mutants_of_a_cell():
    found = mutate.cell_mutants(CELL)
    bodies = {(m.before, m.after) for m in found}
    assert ("if x < low:", "if x <= low:") in bodies
    after = " ".join(m.after for m in found)
    for piece in ("-min(x, low)", "if x else", "x - 1", "x + 0", "return max(x, low)", "low=1"): assert piece in after, piece
    assert len(found) == 7  # nothing in the docstring, nothing in the message
    for m in found: ast.parse(m.source)
    (one,) = mutate.choose(found)
    assert one == mutate.choose(found)[0] and "def " not in one.before


def test_a_weak_assert_is_found_out(tmp_path):
    def nb(test): return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [
        {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "id": str(i), "source": s} for i, s in enumerate(
            ["#| default_exp x", "#| exports\ndef total(a, b):\n    return a + b", test])]}
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / "nbs" / "weak.ipynb").write_text(json.dumps(nb("assert total(1, 1) >= 0")))
    (tmp_path / "nbs" / "strong.ipynb").write_text(json.dumps(nb("assert total(1, 2) == 3")))
    (tmp_path / "nbs" / "broken.ipynb").write_text(json.dumps(nb("assert total(1, 2) == 4")))
    script = ("import importlib.util, json, sys, pathlib\n"
              f"spec = importlib.util.spec_from_file_location('mutate', {str(ROOT / 'tools/mutate.py')!r})\n"
              "m = importlib.util.module_from_spec(spec); sys.modules['mutate'] = m; spec.loader.exec_module(m)\n"
              "checked = [m.check(pathlib.Path(sys.argv[1]), pathlib.Path(m.ROOT, 'nbs', f'{n}.ipynb'), True, 2) for n in ('weak', 'strong', 'broken')]\n"
              "print(json.dumps([e or [[x.after, end] for x, end in r] for _, r, e in checked]))")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weak, strong, broken = json.loads(done.stdout)
    assert weak == [["return a - b", "survived"]] and strong == [["return a - b", "failed"]]
    assert "fails as it stands" in broken
