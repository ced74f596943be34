"""Execute notebooks from a clean start and keep their outputs: `python tools/run.py nbs/tour.ipynb [-p name=value]`.

papermill runs the notebook in a fresh kernel, nbdev cleans it, and the notebook's metadata says what it ran on.
"""
import argparse
import hashlib
import importlib.metadata as md
import json
import os
import platform
import re
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_digest(nb):
    "SHA-256 over the code cells' sources: a page whose digest differs was changed after it was executed."
    code = [re.sub(r"^#\|.*\n?", "", "".join(c["source"]), flags=re.M) for c in nb["cells"] if c["cell_type"] == "code"]  # a directive shows or hides, it computes nothing
    code = [source for source in code if not source.startswith("# For Colab, by tools/colab.py")]  # generated, with the release in it
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def provenance(nb, seconds):
    "What a page says about how it was made."
    from deepclustering.core.ledger import device_name, git_commit
    return {"commit": git_commit(ROOT), "date": str(date.today()), "device": device_name(), "python": platform.python_version(),
            "torch": md.version("torch"), "seconds": round(seconds, 1), "code": code_digest(nb)}


def execute(path, parameters=None, output=None, progress=True, timeout=3600):
    "Execute one notebook with papermill; returns the executed notebook and the seconds it took."
    import papermill as pm
    output = Path(output or path)
    start = time.perf_counter()
    nb = pm.execute_notebook(str(path), str(output), parameters=parameters or {}, cwd=str(Path(path).parent),
                             kernel_name="python3", language="python", progress_bar=progress, request_save_on_cell_execute=False,
                             autosave_cell_every=0, execution_timeout=timeout,
                             extra_arguments=["--IPKernelApp.log_level=40"])  # not its remarks on transport
    return nb, time.perf_counter() - start


def run_in_place(path):
    "Execute, clean and write back, outputs and provenance included. A notebook that fails is left as it was."
    from execnb.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same bits on every machine, and no waiting for busy cores
    path = Path(path)
    scratch = ROOT / ".cache" / "run" / path.name
    scratch.parent.mkdir(parents=True, exist_ok=True)
    _, seconds = execute(path, output=scratch)
    nb = read_nb(scratch)
    nb.metadata["provenance"] = provenance(json.loads(scratch.read_text()), seconds)
    for cell in nb.cells:  # what belongs to a notebook alone: the line on Colab's machine, an estimator's HTML (60 KB of style sheet)
        if "# For Colab, by tools/colab.py" in cell.source: cell.outputs = []
        for out in cell.get("outputs", []):
            if "sk-global" in "".join(out.get("data", {}).get("text/html", "")): del out["data"]["text/html"]
    clean_nb(nb, allowed_metadata_keys=["provenance"], allowed_cell_metadata_keys=["tags"], clean_ids=True)
    write_nb(nb, path)
    print(f"{path}: {seconds:.1f} s")


def parse(value):
    "A parameter from the command line: JSON where it is JSON (`3`, `true`, `[1, 2]`), else the text itself."
    try: return json.loads(value)
    except json.JSONDecodeError: return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+")
    parser.add_argument("-p", "--parameter", action="append", default=[], help="name=value; the result goes to _out/ and not back")
    args = parser.parse_args()
    parameters = {k: parse(v) for k, _, v in (p.partition("=") for p in args.parameter)}
    for nb in args.notebooks:
        if not parameters: run_in_place(nb); continue
        out = ROOT / "_out" / Path(nb).name
        out.parent.mkdir(exist_ok=True)
        execute(nb, parameters, out)
        print(out)
