"""`make gpu-check` is sound where no GPU is: every check passes on the CPU with small sizes, and a wrong operator does not."""
import json

import pytest
import torch

from conftest import tool

gpu = tool("gpu_check")


def test_every_check_passes_on_the_cpu(tmp_path, capsys):
    code = gpu.main(["--cpu", "--out", str(tmp_path / "gpu-check.json")])
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert not [(c["name"], c.get("reason", c.get("error"))) for c in result["checks"] if not c["ok"]]
    assert code == 0 and len(result["checks"]) == len(gpu.CHECKS) == len({c.name for c in gpu.CHECKS})
    assert {"device", "versions", "commit", "date", "seconds", "copy_gigabytes_per_second", "float32_gigaflops"} <= result.keys()


@pytest.fixture
def one(monkeypatch, tmp_path):
    "Run a single check, made here."
    def run(call, tolerance=1e-6, judge=gpu.relative):
        make = lambda generator, big: (torch.randn(5, 3, generator=generator),)
        monkeypatch.setattr(gpu, "CHECKS", [gpu.Check("x", call, make, tolerance, lambda x: (1, 1), judge)])
        code = gpu.main(["--cpu", "--out", str(tmp_path / "x.json")])
        return code, json.loads((tmp_path / "x.json").read_text())["checks"][0]
    return run


def test_a_wrong_operator_fails(one):
    assert one(lambda x: x.sum(0))[0] == 0
    code, row = one(lambda x: x.sum(0) + (x.dtype == torch.float32) * 1e-3)
    assert code == 1 and row["error"] > 1e-6
    assert one(lambda x: x.sum(0) * (float("nan") if x.dtype == torch.float32 else 1))[0] == 1
    assert one(lambda x: x.sum(0 if x.dtype == torch.float32 else 1))[0] == 1
    code, row = one(lambda x: 1 / 0)
    assert code == 1 and "ZeroDivisionError" in row["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2 and "--cpu" in capsys.readouterr().out


def test_a_plain_answer_in_place_of_the_kernel_fails(one):
    from deepclustering.core import operators
    def call(x):
        operators.logging.getLogger(operators.__name__).warning("x: no kernel (too large), plain PyTorch instead")
        return x.sum(0)
    code, row = one(call)
    assert code == 1 and "no kernel (too large)" in row["reason"] and not row["ok"]
