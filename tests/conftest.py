"""What several test files need: the root, its tracked files, the notebooks, and the scripts in tools/ as modules."""
import importlib.util
import json
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def tool(name):
    "The script tools/<name>.py as a module; `tools` stays off sys.path because tools/test.py would hide the standard library's `test`."
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def settings():
    "settings.ini as nbdev and setup.py read it."
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


@cache
def tracked():
    "The files that a commit would hold, relative to the root."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split("\0") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if ".venv" not in p.parts]
    return sorted({Path(f) for f in files if f and (ROOT / f).is_file()})


@cache
def text(path):
    "A tracked file's text, empty if it is binary."
    try: return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError: return ""


@cache
def notebook(path):
    "A notebook as JSON, its sources and outputs joined."
    nb = json.loads(text(path))
    for cell in nb["cells"]: cell["source"] = "".join(cell["source"])
    return nb


NOTEBOOKS = tool("test").notebooks()
