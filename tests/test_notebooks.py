"""Every notebook: clean, current, executed as it stands, figures described."""
import ast
import json
import re

import pytest
from conftest import NOTEBOOKS, ROOT, notebook, settings, text, tool

FIGURE = ("image/svg+xml", "image/png", "image/jpeg")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=str)


def code(path): return [c for c in notebook(path)["cells"] if c["cell_type"] == "code" and c["source"].strip()]


def directive(cell, name):
    found = re.search(rf"^#\|\s*{name}:?\s*(.*)$", cell["source"], re.M)
    return found and found[1].strip()


def figures(cell):
    "Kind and bytes of every picture among a cell's outputs."
    for output in cell.get("outputs", []):
        for kind in FIGURE:
            if kind in output.get("data", {}): yield kind, len("".join(output["data"][kind]))


@each
def test_clean(path):
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import clean_nb
    cfg, nb = settings(), read_nb(ROOT / path)
    clean_nb(nb, False, cfg["allowed_metadata_keys"].split(), cfg["allowed_cell_metadata_keys"].split(), True)
    assert nb2str(nb) == text(path), "make export cleans it"


@each
def test_title_and_subtitle(path):
    first = notebook(path)["cells"][0]
    if first["cell_type"] == "raw": first = notebook(path)["cells"][1]
    assert first["cell_type"] == "markdown" and re.fullmatch(r"# \S.*\n+> \S.*\n*", first["source"]), "nbdev drops what else the first cell holds"
    assert not [c for c in notebook(path)["cells"] if c["cell_type"] == "markdown" and c is not first and re.search(r"^# ", re.sub(r"```.*?```", "", c["source"], flags=re.S), re.M)], "a second H1"


@each
def test_outputs_belong_to_this_code(path):
    if not code(path): return
    came_from = notebook(path)["metadata"].get("provenance", {})
    assert came_from.get("code") == tool("run").code_digest(json.loads(text(path))), f"make run NB={path}"
    assert came_from["seconds"] > 0 and came_from["device"] and came_from["torch"]


@each
def test_outputs_are_presentable(path):
    for cell in code(path):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", "an error is shown with expect_fail"
            assert output.get("name") != "stderr", f"a warning or a progress bar was kept: {''.join(output['text'])[:200]}"


@each
def test_figures(path):
    labels = []
    for cell in code(path):
        for kind, size in figures(cell):
            assert size < 150_000, f"{size / 1000:.0f} KB: {cell['source'][:80]}"
            label = directive(cell, "label") or ""
            assert label.startswith("fig-") and directive(cell, "fig-cap"), f"a figure without label or caption: {cell['source'][:80]}"
            assert len(directive(cell, "fig-alt") or "") > 20, f"{label} does not say in words what it shows"
            labels.append(label)
    assert len(set(labels)) == len(set(id(c) for c in code(path) if list(figures(c)))), "a label twice"


@each
def test_links_between_equations_and_figures(path):
    prose = "\n".join(c["source"] for c in notebook(path)["cells"] if c["cell_type"] == "markdown")
    given = set(re.findall(r"\{#((?:eq|tbl)-[\w-]+)\}", prose)) | {directive(c, "label") for c in code(path)}
    used = set(re.findall(r"(?<![\w`])@((?:eq|fig|tbl)-[\w-]*\w)", prose))
    assert used <= given, f"no target: {used - given}"


@each
def test_a_name_in_backticks_is_no_link_s_text(path):
    "nbdev makes a link of it, and a link within a link comes out as raw Markdown."
    prose = "\n".join(c["source"] for c in notebook(path)["cells"] if c["cell_type"] == "markdown")
    from deepclustering._modidx import d
    names = {symbol.rpartition(".")[2] for symbols in d["syms"].values() for symbol in symbols}
    assert not [name for name in re.findall(r"\[`([\w.]+)`\]\(", prose) if name.rpartition(".")[2] in names]


@each
def test_an_exporting_notebook_asserts(path):
    if not any(directive(c, "exports?") is not None for c in code(path)): return
    asserting = [c for c in code(path) if re.search(r"\bassert\b|\btest_\w+\(|expect_fail|assert_close", c["source"])]
    assert asserting


@each
def test_imports_stand_alone(path):
    "nbdev runs a cell that imports again when it makes the page: what else stands in it would run without what it needs."
    def imports(node): return isinstance(node, (ast.Import, ast.ImportFrom)) or isinstance(node, (ast.If, ast.With, ast.Try)) and all(map(imports, node.body))
    for cell in code(path):
        try: tree = ast.parse(cell["source"])
        except SyntaxError: continue  # a magic
        exported = any(directive(cell, name) is not None for name in ("export", "exports"))  # runs then, whatever it holds
        found = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in (tree.body if exported else ast.walk(tree)))
        if found and directive(cell, "eval") != "false": assert all(map(imports, tree.body)), cell["source"][:120]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if tool("test").is_study(p)], ids=str)
def test_a_study_has_a_scale(path):
    cells = [c for c in code(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1 and re.search(r"^SCALE\s*=", cells[0]["source"], re.M)
