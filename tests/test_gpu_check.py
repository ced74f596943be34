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
    assert {"device", "versions", "copy_gigabytes_per_second", "float32_gigaflops", "bfloat16_gigaflops"} <= result.keys()
    assert all({"commit", "date", "seconds", "ms", "repeatable"} <= c.keys() for c in result["checks"])


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


def test_some_checks_replace_their_rows_alone(monkeypatch, tmp_path, capsys):
    make = lambda generator, big: (torch.randn(5, 3, generator=generator),)
    monkeypatch.setattr(gpu, "CHECKS", [gpu.Check(name, lambda x: x.sum(0), make, 1e-6, lambda x: (1, 1), gpu.relative) for name in ("a", "b")])
    file = tmp_path / "gpu-check.json"
    assert gpu.main(["--cpu", "--out", str(file)]) == 0
    before = json.loads(file.read_text())["checks"]
    file.write_text(file.read_text().replace('"CPU"', '"a GPU"'))
    with pytest.raises(SystemExit, match="another device, a GPU"): gpu.main(["--cpu", "b", "--out", str(file)])
    file.write_text(file.read_text().replace('"a GPU"', '"CPU"'))
    monkeypatch.setattr(gpu.CHECKS[1], "tolerance", 0.5)
    assert gpu.main(["--cpu", "b", "--out", str(file)]) == 0 and "1 of 1 checks" in capsys.readouterr().out
    after = json.loads(file.read_text())["checks"]
    assert after[0] == before[0] and after[1]["tolerance"] == 0.5


def test_the_floor_is_bytes_or_operations():
    limit = {"copy": 100., torch.float32: 10., torch.bfloat16: 1000.}
    assert gpu.floor(lambda x: (50, 2), (torch.ones(1),), limit) == 500 and gpu.floor(lambda x: (50, 20), (torch.ones(1),), limit) == 2000
    assert gpu.floor(lambda x: (50, 20), (torch.ones(1).bfloat16(),), limit) == 500 and gpu.floor(lambda x: (0, 20), (torch.ones(1, dtype=torch.int64),), limit) == 2000
