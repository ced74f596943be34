"""The catalogue is complete, its links lead somewhere, its pages are current, and no sentence of an abstract stands in the project."""
import json
import os
import re
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT, notebook, text, tracked
from deepclustering.core import papers
from deepclustering.core.ledger import read_ledger

PAGES = [p for p in NOTEBOOKS if p.as_posix() == "nbs/papers.ipynb" or p.parent.as_posix() == "nbs/papers" or p.name == "06_papers.ipynb"]
# Where the material of the project lies beside the checkout, the catalogue is compared with it.
SHARED = [f for f in (ROOT.parent / "shared", Path(os.environ.get("DEEPCLUSTERING_DATA") or ROOT).parent) if (f / "papers.jsonl").exists()]
beside = pytest.mark.skipif(not SHARED, reason="no shared/papers.jsonl beside the checkout")


def shared(name): return [json.loads(line) for line in (SHARED[0] / name).read_text(encoding="utf-8").splitlines()]


def test_links_lead_somewhere():
    rows = read_ledger(ROOT / "results")
    wrong = {p.id: missing for p in papers.catalogue() if (missing := papers.broken_links(p, rows, ROOT))}
    assert not wrong, wrong


def test_what_was_measured_is_in_the_catalogue():
    known = {p.id for p in papers.catalogue()}
    assert not [r["paper"] for r in read_ledger(ROOT / "results") if r["paper"] not in known | {None}]


def generated(path):
    "The expressions of a page that end a cell in `HTML(...)`, and what the page shows for them."
    for cell in notebook(path)["cells"]:
        last = cell["source"].splitlines()[-1:] if cell["cell_type"] == "code" else []
        if last and (call := re.fullmatch(r"HTML\((.*)\)", last[0])): yield call[1], "".join(cell["outputs"][-1]["data"]["text/html"])


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_a_page_shows_the_catalogue_as_it_is(path):
    shown = list(generated(path))
    assert shown, "nothing on this page is generated"
    stale = [call for call, html in shown if eval(call, vars(papers).copy()) != html]
    assert not stale, f"the catalogue or the ledger changed: make run NB={path}"


def test_every_paper_stands_on_its_family_s_page_once():
    for family in papers.FAMILIES:
        html = "".join(html for _, html in generated(Path(f"nbs/papers/{family}.ipynb")))
        assert sorted(re.findall(r' id="(P\d{3})"', html)) == sorted(p.id for p in papers.find_papers(family))


def test_pages_say_that_the_texts_are_unverified():
    for path in PAGES: assert re.search(r"unverified|nobody has compared", " ".join(text(path).split()), re.I), path


def test_no_method_text_is_empty_talk():
    texts = [p.method for p in papers.catalogue()]
    assert len(set(texts)) == len(texts) and min(map(len, texts)) > 100 and max(len(papers.gist(t)) for t in texts) < 700


@beside
def test_every_core_and_adjacent_paper_is_there_once_with_its_title():
    wanted = {d["id"]: (d["title"], d["family"], d["fit"]) for d in shared("papers.jsonl") if d["fit"] != "out"}
    assert {p.id: (p.title, p.family, p.fit) for p in papers.catalogue()} == wanted
    assert len(papers.catalogue()) == len(wanted) > 300


def shingles(words, n=8): return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def words(string): return re.findall(r"[a-z0-9]+", string.lower())


def prose(path):
    "What a reader can read in a file: of a notebook the cells and their outputs, pictures left out."
    if path.suffix != ".ipynb": return text(path)
    outputs = (o.get("data", {}).get(kind, "") for c in notebook(path)["cells"] for o in c.get("outputs", []) for kind in ("text/html", "text/markdown", "text/plain"))
    return "\n".join([c["source"] for c in notebook(path)["cells"]] + ["".join(o) for o in outputs])


@beside
def test_no_sentence_of_an_abstract_stands_in_the_project():
    "No eight words in a row, titles apart."
    abstracts = set().union(*(shingles(words(d["abstract"])) for d in shared("abstracts.jsonl")))
    abstracts -= set().union(*(shingles(words(p.title)) for p in papers.catalogue()))
    assert len(abstracts) > 50_000
    copied = {f"{path}: {' '.join(s)}" for path in tracked() for s in shingles(words(prose(path))) & abstracts}
    assert not copied, sorted(copied)[:20]

