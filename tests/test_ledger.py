"""Every row of results/ledger.jsonl obeys the schema and names a notebook that exists."""
from collections import Counter

from conftest import ROOT
from deepclustering.core.ledger import KEY, read_ledger


def test_ledger():
    rows = read_ledger(ROOT / "results" / "ledger.jsonl")
    assert not [r["notebook"] for r in rows if not (ROOT / r["notebook"]).exists()]
    assert not [k for k, n in Counter(tuple(r[k] for k in KEY) for r in rows).items() if n > 1]
    assert not [r for r in rows if r["scale"] == "smoke"], "a smoke run shows that a study works; it measures nothing"
