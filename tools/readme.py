"""README.md and CONTRIBUTING.md from their notebooks: `make readme`; `--check` only says whether they are current.

What is kept in the notebooks is shown; nothing runs. Links to notebooks become addresses of the documentation, which settings.ini knows,
and `{{git_url}}` and the like stand for its lines. Figures go to README_files/.
"""
import argparse
import base64
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path
from posixpath import dirname, join, normpath

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"nbs/index.ipynb": "README.md", "nbs/contributing.ipynb": "CONTRIBUTING.md"}
FIGURES = {"image/svg+xml": "svg", "image/png": "png"}


def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def fill_in(text):
    "Replace `{{name}}` by that line of settings.ini."
    return re.sub(r"\{\{(\w+)\}\}", lambda m: settings()[m[1]], text)


def page_address(notebook):
    "Where the documentation shows a notebook, given relative to nbs/: nbdev leaves the number out of the name."
    stem = re.sub(r"\b\d+[a-z]?_", "", notebook.removesuffix(".ipynb"))
    return f"{settings()['doc_host']}{settings()['doc_baseurl']}/{stem}.html"


def absolute(text, folder):
    "Links to notebooks lead to the documentation."
    return re.sub(r"\]\((?!\w+:)([\w./-]+\.ipynb)(#[\w.-]+)?\)", lambda m: f"]({page_address(normpath(join(folder, m[1])))}{m[2] or ''})", text)


def options(source):
    "A cell's `#|` lines as a dict, and the code without them."
    lines = source.splitlines()
    given = [m for line in lines if (m := re.match(r"#\|\s*([\w-]+):?\s*(.*)", line))]
    return {m[1]: m[2].strip().strip('"') for m in given}, "\n".join(l for l in lines if not l.startswith("#|")).strip()


def show(output, name, figures, alt):
    "One output as Markdown; pictures are put into `figures`."
    if output["output_type"] == "stream": return f"```\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    for kind, suffix in FIGURES.items():
        if kind in data:
            content = "".join(data[kind])
            path = f"README_files/{name}.{suffix}"
            figures[path] = content.encode() if suffix == "svg" else base64.b64decode(content)
            return f"![{alt}]({path})"
    if "text/markdown" in data: return "".join(data["text/markdown"])
    return f"```\n{''.join(data['text/plain'])}\n```" if "text/plain" in data else ""


def render(notebook):
    "The Markdown of a page, and its figures as path -> bytes."
    parts, figures = [f"<!-- made from {notebook} by `make readme` -->"], {}
    for cell in json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(absolute(source, dirname(notebook.removeprefix("nbs/"))))
        if cell["cell_type"] != "code": continue
        option, code = options(source)
        if "hide" in option or option.get("include") == "false": continue
        if code and option.get("echo") != "false": parts.append(f"```python\n{code}\n```")
        if option.get("output") != "false":
            parts += [show(o, option.get("label", f"figure-{len(figures)}"), figures, option.get("fig-alt", "")) for o in cell["outputs"]]
            if "fig-cap" in option: parts.append(f"*{option['fig-cap']}*")
    return fill_in("\n\n".join(p.strip() for p in parts if p.strip())) + "\n", figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a file is not what the notebooks give")
    args = parser.parse_args()
    files = {}
    for notebook, page in PAGES.items():
        text, figures = render(notebook)
        files |= {page: text.encode(), **figures}
    there = {str(p.relative_to(ROOT)) for p in ROOT.glob("README_files/*")}
    stale = [f for f, content in files.items() if not (ROOT / f).exists() or (ROOT / f).read_bytes() != content] + sorted(there - files.keys())
    if args.check:
        if stale: print("not current, run `make readme`: " + ", ".join(stale))
        return 1 if stale else 0
    for name in there - files.keys(): (ROOT / name).unlink()
    for name, content in files.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(content)
    print("\n".join(stale) or "README.md and CONTRIBUTING.md were current")


if __name__ == "__main__":
    sys.exit(main())
