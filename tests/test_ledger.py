"""Every row of the ledger obeys the schema and names a notebook that exists."""
from collections import Counter

from conftest import ROOT
from deepclustering.core.ledger import KEY, ledger_file, read_ledger


def test_ledger():
    rows = read_ledger(ROOT / "results")
    assert not [r["notebook"] for r in rows if not (ROOT / r["notebook"]).exists()]
    assert not [k for k, n in Counter(tuple(r[k] for k in KEY) for r in rows).items() if n > 1]
    assert not [r for r in rows if r["scale"] == "smoke"], "a smoke run shows that a study works; it measures nothing"
    for name in ("results/ledger.jsonl", "results/ledger-studies.jsonl"): assert {ledger_file(r["notebook"]) for r in read_ledger(ROOT / name)} == {name}
