"""Operators and kernels where no reader needs to look: second GPU, log lines, the child process, every kernel module of the house."""
import os

os.environ["TRITON_INTERPRET"] = "1"

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import ROOT

pytest.importorskip("triton")
from deepclustering.core import kernels  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)
MODULES = sorted((ROOT / "deepclustering").rglob("*_triton.py"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 256), (3, 257), (7, 0)])
def test_row_logsumexp(shape, dtype):
    x = torch.randn(shape, generator=GENERATOR).to(dtype)
    torch.testing.assert_close(kernels.row_logsumexp(x), x.float().logsumexp(1), rtol=1e-6, atol=1e-6)


def test_row_logsumexp_of_extremes():
    x = torch.tensor([[1e30, -1e30, 0], [-torch.inf, 5, -torch.inf], [-torch.inf] * 3, [torch.nan, 0, 0]])
    torch.testing.assert_close(kernels.row_logsumexp(x), x.logsumexp(1), equal_nan=True)


def test_an_offset_past_2_31():
    "Three rows 2**30 numbers apart: the storage is reserved, not touched."
    x = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    for row in x: row.copy_(torch.randn(64, generator=GENERATOR))
    torch.testing.assert_close(kernels.row_logsumexp(x), x.float().logsumexp(1), rtol=1e-6, atol=1e-6)


def test_the_assembler_reports_spills():
    small, large = (kernels.compile_ahead("deepclustering.core.kernels", capabilities=(90,))[i] for i in (0, 2))
    assert small["spills"] == 0 < large["spills"] and small["registers"] < large["registers"] == 255
    assert small["constants"] == {"ROWS": 4, "COLUMNS": 256, "num_warps": 4} and small["types"] == "*fp32 *fp32" and small["kernel"] == "_row_logsumexp"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_only_cuda_imports_a_kernel_module(path):
    "No other module of the package imports it at the top, but for another of kernels: without a GPU, and without Triton, the package works."
    for other in (ROOT / "deepclustering").rglob("*.py"):
        if other in MODULES: continue
        imported = [n for n in ast.walk(ast.parse(other.read_text())) if isinstance(n, ast.ImportFrom) and n.module and n.module.split(".")[-1] == path.stem]
        assert not imported, other


def test_operators_name_launchers_that_exist():
    import re
    named = {m for p in (ROOT / "deepclustering").rglob("*.py") for m in re.findall(r'cuda="(deepclustering[\w.]+):(\w+)"', p.read_text())}
    for module, function in named:
        tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, (module, function)


def test_the_package_imports_without_triton(tmp_path):
    import subprocess
    import sys
    (tmp_path / "triton.py").write_text("raise ImportError('not here')\n")
    code = "import deepclustering.core.aggregate, deepclustering.core.lloyd, deepclustering.core.transport, deepclustering.core.operators, sys; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_fake_cuda_tensor_reaches_the_operator():
    from deepclustering.core.operators import Operator
    class Plain:
        __name__, __module__, __doc__ = "plain", "test", None
        def __call__(self, x): return x + 1
    op = Operator(Plain(), "(Tensor x) -> Tensor", "nowhere:f")
    op.fake(lambda x: x.new_empty(7))
    with FakeTensorMode():
        assert op(torch.empty(2, device="cuda")).shape == (7,) and op(torch.empty(2)).shape == (2,)
