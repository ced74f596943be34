"""`deepclustering cluster` and `assign` as a user runs them: real and broken files, what is written, what a report may hold."""
import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from deepclustering.clustering import GaussianMixture, KMeans, MiniBatchKMeans
from deepclustering.core.cli import main
from PIL import Image
from sklearn.datasets import load_digits, make_blobs

CALL = [sys.executable, "-c", "import sys; from deepclustering.core.cli import main; sys.exit(main(sys.argv[1:]))"]
blobs, _ = make_blobs(120, centers=[[0, 0], [9, 0], [0, 9]], random_state=0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder to be in."
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    "A function that runs the command in this process: exit code, standard output, lines of standard error."
    def call(*words):
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()
    return call


def labels(path="labels.csv"):
    with open(path, newline="", encoding="utf-8") as file: head, *rows = csv.reader(file)
    assert head == ["id", "label"]
    return [r[0] for r in rows], np.array([int(r[1]) for r in rows])


def pictures(folder, arrays):
    folder.mkdir()
    for i, a in enumerate(arrays): Image.fromarray(a.astype(np.uint8)).save(folder / f"{i:04}.png")


def ranked(l):
    "Labels renumbered by size, by the definition."
    old = sorted(set(l.tolist()), key=lambda j: (-(l == j).sum(), j))
    return np.array([old.index(j) for j in l.tolist()])


class Page(HTMLParser):
    "Tags and attributes of a report, and its text."
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.style = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.words.append(data)


# --- what is refused ------------------------------------------------------------------------------------------------------

def array(x): return lambda p: np.save(p, x)


def content(text): return lambda p: p.write_text(text)


holed = blobs.copy(); holed[7, 1] = np.nan
endless = blobs.copy(); endless[5, 0] = -np.inf
BAD = {
    "missing.npy": (None, [], "FILE must exist, and missing.npy does not"),
    "picture.png": (content("x"), [], "FILE must be one of .npy, .npz, .csv"),
    "nan.npy": (array(holed), [], "item 7 holds NaN or infinity"),
    "inf.npy": (array(endless), [], "item 5 holds NaN or infinity"),
    "objects.npy": (array(np.array([{}, []], object)), [], "pickled objects are refused"),
    "text.npy": (array(np.array(["a", "b"])), [], "real numbers"),
    "empty.npy": (array(np.zeros((0, 3))), [], "at least one vector"),
    "cut.npy": (lambda p: (np.save(p, blobs), p.write_bytes(p.read_bytes()[:300])), [], "cannot be read"),
    "few.npy": (array(blobs[:5]), ["--k", "6"], "--k must be at most the number of items, 5, got 6"),
    "three.npy": (array(blobs[:3]), [], "--k auto needs at least 4 different items, got 3 of 3"),
    "same.npy": (array(np.ones((30, 2))), [], "all 30 are equal: there is one group"),
    "same2.npy": (array(np.ones((30, 2))), ["--k", "2"], "all 30 are equal: there is one group"),
    "two.npz": (lambda p: np.savez(p, left=blobs, right=blobs), [], "one of left, right"),
    "ragged.csv": (content("a,b\n1,2\n3\n4,5\n"), [], "ragged.csv, line 3: must have 2 cells"),
    "hole.csv": (content("a,b\n1,2\n3,\n"), [], "line 3: column 'b' must hold a finite number, got ''"),
    "infinite.csv": (content("a,b\n1,2\n3,inf\n"), [], "got 'inf'"),
    "words.csv": (content("a,b\n1,x\n3,x\n"), [], "column 'b' holds text; choose with --columns 'a', or name it too"),
    "only_id.csv": (content("id\nx\ny\n"), [], "a column of numbers beside the identifier"),
    "columns.csv": (content("a,b\n1,2\n3,4\n"), ["--columns", "a,c"], "the columns must include c, got a, b"),
    "empty.csv": (content(""), [], "is empty"),
    "zero.csv": (lambda p: p.write_bytes(b"a\0b"), [], "zero bytes"),
    "table.parquet": (content("x"), [], "can be read where the package pyarrow is installed"),
    "empty.txt": (content("\n \n"), [], "is empty"),
    "stops.txt": (content("the of\nand a\n"), [], "must hold words"),
    "none": (lambda p: p.mkdir(), [], "holds none"),
    "broken": (lambda p: (p.mkdir(), (p / "a.png").write_text("x"), (p / "b.jpg").write_text("")), [], "none of its 2 can"),
    "k0.npy": (array(blobs), ["--k", "0"], "--k must be 'auto' or a whole number from 1, got '0'"),
    "kx.npy": (array(blobs), ["--k", "three"], "--k must be 'auto'"),
    "method.npy": (array(blobs), ["--method", "dbscan"], "--method must be one of "),
    "slow.npy": (array(blobs), ["--method", "sdpkmeans"], "--k must be a number for SDPKMeans"),
    "levels.npy": (array(blobs), ["--method", "hierarchicalkmeans"], "--method must be one of "),
    "device.npy": (array(blobs), ["--device", "nonsense"], "device must be"),
    "seed.npy": (array(blobs), ["--seed", "-1"], "--seed must be between"),
    "folder.npy": (array(blobs), ["--out", "no/labels.csv"], "--out must lie in a folder that exists, and no does not"),
    "report.npy": (array(blobs), ["--report", "no/r.html"], "--report must lie in a folder that exists"),
    "itself.npy": (array(blobs), ["--out", "itself.npy"], "--out and FILE must differ"),
    "raw.npy": (array(blobs), ["--raw"], "are for tables"),
    "flag.npy": (array(blobs), ["--nothing"], "unrecognized arguments"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_exit_code_2_and_no_file(name, run, here, monkeypatch):
    make, words, message = BAD[name]
    if name == "table.parquet": monkeypatch.setitem(sys.modules, "pyarrow", None)
    if make: make(here / name)
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    code, out, err = run("cluster", name, *words)
    assert (code, out, len(err)) == (2, "", 1), err
    assert err[0].startswith("deepclustering cluster: ") and message in err[0], err[0]
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*")} == before


@pytest.mark.parametrize("method", ["kmedoids", "spectralclustering"])
def test_too_many_items_for_the_memory_is_one_line(method, run, here, monkeypatch):
    monkeypatch.setattr("deepclustering.core.checks.free_memory", lambda device: 1e5)
    np.save("blobs.npy", np.tile(blobs, (2, 1)))
    code, out, err = run("cluster", "blobs.npy", "--method", method, "--k", "3")
    assert (code, out) == (2, "") and re.search("240 points.* need 0.0 GB, and 0.0 GB are free on cpu", err[-1]) and [p.name for p in here.iterdir()] == ["blobs.npy"]


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = subprocess.run([*CALL, "cluster", "missing.csv"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "deepclustering cluster: FILE must exist, and missing.csv does not\n")


def test_help_needs_no_torch():
    code = "import sys; from deepclustering.core.cli import main; code = main(['cluster', '--help']) or main(['assign', '--help']); sys.exit(99 if 'torch' in sys.modules else code)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# --- what is written ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", [KMeans, MiniBatchKMeans, GaussianMixture])
def test_labels_are_the_estimators_by_size_and_assign_gives_predicts(method, run):
    X = load_digits().data.astype(np.float32)
    np.save("digits.npy", X[:1200]); np.save("new.npy", X[1200:])
    code, out, err = run("cluster", "digits.npy", "--method", method.__name__, "--k", "9", "--seed", "3", "--save", "model", "--report", "none")
    assert code == 0 and not out and err[-1] == "written: labels.csv, model"
    by_hand = method(9, random_state=3).fit(X[:1200])
    ids, found = labels()
    assert ids == [str(i) for i in range(1200)] and (found == ranked(by_hand.labels_)).all() and (np.diff(np.bincount(found)) <= 0).all()
    new_name = dict(zip(by_hand.labels_.tolist(), found.tolist()))
    assert run("assign", "model", "new.npy", "--out", "new.csv")[0] == 0
    assert labels("new.csv")[1].tolist() == [new_name[j] for j in by_hand.predict(X[1200:]).tolist()]
    code, out, _ = run("assign", "model", "digits.npy", "--out", "-")
    assert [int(l.split(",")[1]) for l in out.split()[1:]] == found.tolist()
    assert not [e.name for e in os.scandir(".") if e.name.startswith(".")]


@pytest.mark.parametrize("method", ["AutoencoderKMeans", "DEC"])
def test_a_deep_model_sorts_new_items(run, here, method):
    "The default network, trained on a table's columns, comes back from the file with the scaling; nearest centres of its codes by hand."
    import torch
    from deepclustering.tool.cluster import load_model
    X, y = make_blobs(90, 6, centers=3, cluster_std=.5, random_state=2)
    write = lambda name, rows: (here / name).write_text("\n".join(["a,b,c,d,e,f", *(",".join(f"{v:.6f}" for v in r) for r in rows)]) + "\n")
    write("old.csv", X[:60]); write("new.csv", X[60:])
    assert run("cluster", "old.csv", "--method", method, "--k", "3", "--save", "model", "--report", "none")[0] == 0
    found = labels()[1]
    assert len(set(zip(y[:60].tolist(), found.tolist()))) == 3                                           # one group for each blob
    code, _, err = run("assign", "model", "new.csv", "--out", "new_labels.csv")
    assert code == 0, err
    group = dict(zip(y[:60].tolist(), found.tolist()))
    assert labels("new_labels.csv")[1].tolist() == [group[c] for c in y[60:].tolist()]
    assert run("assign", "model", "old.csv", "--out", "again.csv")[0] == 0 and (labels("again.csv")[1] == found).all()
    estimator, rank, _ = load_model("model")
    scaled = (X - X[:60].mean(0)) / X[:60].std(0)
    with torch.no_grad(): z = estimator.encoder_.encode(torch.tensor(scaled * estimator.scale_, dtype=torch.float32)).numpy()
    by_hand = rank[((z[:, None] - estimator.cluster_centers_)**2).sum(2).argmin(1)]
    assert by_hand.tolist() == [*found.tolist(), *labels("new_labels.csv")[1].tolist()]


def test_every_kind_of_file_goes_through_a_model(run, here):
    "The labels of the file that a model was made from are assigned again, and so is each item alone or in another order."
    rng = np.random.default_rng(0)
    words = [["river", "water", "boat", "fish"], ["engine", "wheel", "road", "petrol"]]
    texts = [" ".join(rng.choice(words[i % 2], 3)) for i in range(40)]
    (here / "texts.txt").write_text("\n".join(texts) + "\n"); (here / "texts2.txt").write_text("\n".join(["", *texts[::-1]]) + "\n")
    table = [f"{i},{(i % 2) * 9 + rng.random():.3f},{rng.random():.3f},{'ab'[i % 2]}" for i in range(40)]
    (here / "table.csv").write_text("\n".join(["id,x,y,kind", *table]) + "\n"); (here / "table2.csv").write_text("\n".join(["id,x,y,kind", *table[::-1]]) + "\n")
    grey = rng.integers(0, 60, (40, 8, 8)) + 190 * (np.arange(40) % 2)[:, None, None]
    pictures(here / "pictures", grey); pictures(here / "pictures2", grey[::-1])
    np.save("stack.npy", grey); np.save("stack2.npy", grey[::-1])
    for first, second, words, start in (("texts.txt", "texts2.txt", [], 1), ("table.csv", "table2.csv", ["--columns", "x,y,kind"], 0), ("pictures", "pictures2", [], 0), ("stack.npy", "stack2.npy", [], 0)):
        assert run("cluster", first, "--k", "2", "--save", "model", *words)[0] == 0
        ids, found = labels()
        assert (ranked(found) == found).all() and len(set(zip(found.tolist(), (np.arange(40) % 2).tolist()))) == 2, first
        assert run("assign", "model", second, "--out", "again.csv")[0] == 0
        again, mirrored = labels("again.csv")
        assert mirrored.tolist() == found[::-1].tolist(), first
        assert again == (ids[::-1] if first == "table.csv" else [str(int(i) + start) for i in ids] if "." in first else ids)
    code, _, err = run("assign", "model", "table.csv")
    assert code == 2 and len(err) == 1 and "FILE must hold vectors as the model's file did, got table" in err[0]
    assert run("assign", "table.csv", "stack.npy")[2][0].startswith("deepclustering assign: MODEL must be a file that `cluster --save` wrote")
    assert run("assign", "model", "stack.npy", "--out", "model")[0] == 2
    np.save("wide.npy", np.zeros((3, 9, 9)))
    assert run("assign", "model", "wide.npy")[::2] == (2, ["deepclustering assign: wide.npy must hold items of shape (8, 8) as the model's file did, got (9, 9)"])


def test_parquet_is_read_as_the_same_table_in_csv(run, here):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    rng = np.random.default_rng(0)
    columns = {"id": [f"r{i}" for i in range(60)], "x": np.r_[rng.normal(0, 1, 30), rng.normal(9, 1, 30)].tolist(), "n": rng.integers(0, 5, 60).tolist(),
               "flag": (rng.random(60) < .5).tolist(), "kind": ["a", "b"] * 30}
    write = lambda name, table: parquet.write_table(pa.table(table), here / name)
    write("t.parquet", columns | {"kind": pa.array(columns["kind"]).dictionary_encode()})
    rows = zip(*({"flag": map(int, v), "x": map(repr, v)}.get(k, v) for k, v in columns.items()))
    (here / "t.csv").write_text("\n".join([",".join(columns), *(",".join(map(str, r)) for r in rows)]) + "\n")
    for words in (["--columns", "x,n,flag"], ["--columns", "x,kind"]):
        found = [(run("cluster", name, "--k", "2", *words, "--save", "model")[0], labels()) for name in ("t.parquet", "t.csv")]
        assert found[0][0] == found[1][0] == 0 and found[0][1][0] == found[1][1][0] == columns["id"] and (found[0][1][1] == found[1][1][1]).all()
    assert run("assign", "model", "t.parquet", "--out", "-")[1] == (here / "labels.csv").read_text()      # the csv's model
    for table, message in (({"x": [1., None, 3.]}, "bad.parquet: row 1: column 'x' must hold a finite number, got ''"), ({"x": pa.array([], pa.float64())}, "bad.parquet must hold rows"),
                           (pa.table([[1, 2], [3, 4]], names=["x", "x"]), "bad.parquet: column names must differ, got 'x' twice"), (None, "bad.parquet cannot be read as parquet: ")):
        if table is None: (here / "bad.parquet").write_text("x")
        else: write("bad.parquet", table) if isinstance(table, dict) else parquet.write_table(table, here / "bad.parquet")
        code, out, err = run("cluster", "bad.parquet", "--k", "2")
        assert (code, out, len(err)) == (2, "", 1) and message in err[0], err


def test_a_model_holds_no_code(run, here):
    np.save("blobs.npy", blobs)
    run("cluster", "blobs.npy", "--k", "3", "--save", "model", "--report", "none")
    data = (here / "model").read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8:8 + size])
    assert {"fitted.cluster_centers_", "rank"} <= set(head) and json.loads(head["__metadata__"]["model"])["method"] == "KMeans"
    assert len(data) - 8 - size == sum(t["data_offsets"][1] - t["data_offsets"][0] for n, t in head.items() if n != "__metadata__")
    assert "labels" not in str(head)


def test_what_cannot_be_read_is_skipped_and_counted(run, here):
    rng = np.random.default_rng(0)
    pictures(here / "thousand", rng.integers(0, 256, (1000, 4, 4)))
    (here / "thousand/0500.png").write_bytes(b"no picture")
    code, _, err = run("cluster", "thousand", "--k", "2", "--report", "none")
    assert code == 0 and "skipped: 1 that cannot be read" in err
    ids, found = labels()
    assert len(ids) == 999 and "0500.png" not in ids
    (here / "a.txt").write_text("red apple\n\ngreen apple\nred car\n  \nblue car\n")
    code, _, err = run("cluster", "a.txt", "--k", "2", "--report", "none")
    assert code == 0 and "skipped: 2 empty lines" in err and labels()[0] == ["0", "2", "3", "5"]


def test_one_column_is_clustered_and_fewer_items_than_groups_are_remarked(run, here):
    np.save("line.npy", np.r_[np.zeros(3), np.ones(2), [9.]])
    assert run("cluster", "line.npy", "--k", "3")[0] == 0 and labels()[1].tolist() == [0, 0, 0, 1, 1, 2]
    code, _, err = run("cluster", "line.npy", "--k", "5")
    assert code == 0 and any("distinct clusters (3) found smaller" in e for e in err) and (here / "report.html").read_text().count('<section class="group"') == 5
    (here / "one.csv").write_text("size\n1\n2\n30\n31\n")
    assert run("cluster", "one.csv", "--k", "2")[0] == 0 and sorted(np.bincount(labels()[1])) == [2, 2]


def test_auto_prints_choice_and_runner_up(run, here):
    np.save("blobs.npy", blobs)
    code, out, err = run("cluster", "blobs.npy")
    chosen = next(e for e in err if e.startswith("chosen: "))
    assert code == 0 and not out and re.fullmatch(r"chosen: 3 groups \(silhouette 0\.\d+, stability 1\.00\); runner-up: \d+ groups \(silhouette .*\)", chosen)
    assert len(set(labels()[1])) == 3 and "was chosen among 2 to 10" in (here / "report.html").read_text()


# --- the report -----------------------------------------------------------------------------------------------------------

EVIL = '<script>alert(1)</script>"><img src=http://evil.example/x onerror=x>'


def test_a_report_escapes_what_it_shows_and_asks_for_nothing(run, here):
    rng = np.random.default_rng(0)
    words = [["river", "water", EVIL], ["engine", "wheel", "road"]]
    (here / "<script>x.txt").write_text("\n".join(f"{' '.join(words[i % 2])} {i}" for i in range(40)) + "\n")
    pictures(here / "pics", rng.integers(0, 256, (12, 40, 40)))
    os.rename(here / "pics/0000.png", here / "pics/<script>a&b\".png")
    (here / "t.csv").write_text("id,<script>x,y\n" + "".join(f"<script>{i},{i % 3},{i}\n" for i in range(12)))
    for file in ("<script>x.txt", "pics", "t.csv"):
        assert run("cluster", file, "--k", "3")[0] == 0
        text = (here / "report.html").read_text(encoding="utf-8")
        page = Page(text)
        assert "script" not in {tag for tag, _ in page.tags} and "<script" not in text and "script>" in "".join(page.words)
        for tag, attrs in page.tags:
            assert tag not in ("iframe", "object", "embed", "link", "base", "form") and not [a for a in attrs if a.startswith("on")]
            for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert name not in attrs or attrs[name].startswith(("#", "data:image/")), (tag, attrs)
        assert not re.findall(r"url\((?!#)|@import", text) and not [t for t, _ in page.tags if t == "img" and not _["alt"]]
        sections = [a["id"] for t, a in page.tags if t == "section"]
        assert sections == ["g0", "g1", "g2"] and len(text) < 600_000
        assert [a for t, a in page.tags if t == "svg" and a.get("role") == "img" and len(a["aria-label"]) > 20]
        for part in ("How it was made", "deepclustering cluster", "Silhouette", "Stability", "torch", "seed"): assert part in "".join(page.words), part


def test_a_report_names_sizes_examples_and_what_sets_apart(run, here):
    rows = [f"r{i},{rng:.2f},{10 * (i % 4 == 0) + rng:.2f}" for i, rng in enumerate(np.random.default_rng(0).random(40))]
    (here / "t.csv").write_text("\n".join(["name,noise,signal", *rows]) + "\n")
    run("cluster", "t.csv", "--k", "2", "--raw")
    small = (here / "report.html").read_text().split('id="g1"')[1]
    assert "10 items, 25.0%" in small and re.search(r'chips"><li>signal <b>\+2\.\d', small)
    shown = re.findall(r"<th>(r\d+)</th>", small)
    ids, found = labels()
    assert len(shown) == 10 and set(shown) == {i for i, l in zip(ids, found) if l == 1}          # 8 near, 2 of 4 at the edge: all there are


# --- stopped by hand ------------------------------------------------------------------------------------------------------

SLOW = """
import signal, sys, time, deepclustering.core.lloyd as lloyd
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with Ctrl-C ignored
steps = lloyd.lloyd_steps
def slowly(*args, **kwargs):
    for step in steps(*args, **kwargs):
        print("iteration", file=sys.stderr, flush=True)
        time.sleep(0.5)
        yield step
import deepclustering.clustering.kmeans as kmeans
kmeans.lloyd_steps = slowly
from deepclustering.core.cli import main
sys.exit(main(sys.argv[1:]))
"""


def stop_at(folder, slow, mark, count, *words):
    "What a run in `folder` says on standard error after Ctrl-C at the `count`th line `mark`."
    child = subprocess.Popen([sys.executable, "-c", slow, "cluster", "x.npy", *words], cwd=folder, stderr=subprocess.PIPE, text=True)
    seen = 0
    for line in child.stderr:
        seen += line == f"{mark}\n"
        if seen == count: child.send_signal(signal.SIGINT); break
    rest = child.stderr.read()
    assert child.wait() == 130 and rest.endswith("deepclustering cluster: interrupted\n") and "Traceback" not in rest, rest
    return rest


def test_ctrl_c_writes_what_there_is(tmp_path):
    X = np.random.default_rng(0).normal(size=(3000, 8))
    np.save(tmp_path / "x.npy", X)
    assert "written: labels.csv, model, report.html" in stop_at(tmp_path, SLOW, "iteration", 2, "--k", "20", "--save", "model")
    ids, found = labels(tmp_path / "labels.csv")
    assert len(ids) == 3000 and set(found) == set(range(20)) and "Stopped by hand" in (tmp_path / "report.html").read_text()
    early = [KMeans(20, random_state=0, max_iter=m).fit(X).labels_ for m in (1, 2, 3)]
    assert any((ranked(e) == found).all() for e in early)


def test_ctrl_c_among_batches_writes_what_there_is_and_while_choosing_says_it(tmp_path):
    X = np.random.default_rng(0).normal(size=(3000, 8))
    np.save(tmp_path / "x.npy", X)
    head, tail = SLOW.split("steps = ")[0], SLOW[SLOW.index("from deepclustering.core.cli"):]
    slow = """
{owner}
whole = owner.{name}
def slowly(*args):
    print("{name}", file=sys.stderr, flush=True)
    time.sleep(0.3)
    return whole(*args)
owner.{name} = slowly
"""
    batches = head + slow.format(owner="from deepclustering.clustering.kmeans import MiniBatchKMeans as owner", name="_step") + tail
    assert "written: labels.csv, model, report.html" in stop_at(tmp_path, batches, "_step", 3, "--method", "minibatchkmeans", "--k", "20", "--save", "model")
    assert len(labels(tmp_path / "labels.csv")[0]) == 3000 and "Stopped by hand" in (tmp_path / "report.html").read_text()
    choosing = head + slow.format(owner="import deepclustering.tool.cluster as owner", name="measure") + tail
    rest = stop_at(tmp_path, choosing, "measure", 3, "--out", "early.csv", "--report", "early.html")
    assert re.search(r"stopped after k = \d of 2 to 20; the best so far: \d groups \(silhouette", rest) and not list(tmp_path.glob("early*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.csv", "model", "report.html", "x.npy"]


# --- large ----------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_million_vectors_take_less_than_a_gigabyte_beyond_the_file(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "million.npy"
    centers, file = rng.normal(size=(100, 64)).astype(np.float32), np.lib.format.open_memmap(path, "w+", np.float32, (1_000_000, 64))
    for i in range(0, len(file), 50_000): file[i:i + 50_000] = centers[rng.integers(0, 100, 50_000)] + rng.normal(size=(50_000, 64))
    file.flush()
    child = subprocess.Popen([*CALL, "cluster", "million.npy", "--k", "100"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    start, peak = time.time(), 0
    while child.poll() is None:  # pages of the file are memory that the system takes back when it needs it: only what has no file counts
        try: peak = max(peak, int(re.search(r"Anonymous: +(\d+)", open(f"/proc/{child.pid}/smaps_rollup").read())[1]) / 1024)
        except (OSError, TypeError): pass
        time.sleep(0.5)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.time() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of work, {peak:.0f} MB beyond the file")
    assert child.returncode == 0, child.stderr.read()
    assert 100 < peak < 1000
    assert len(labels(tmp_path / "labels.csv")[1]) == 1_000_000


# --- the notebooks of the book --------------------------------------------------------------------------------------------

def test_the_small_commands_exist_in_a_checkout():
    from deepclustering.tool.checkout import checkout_root
    assert checkout_root() == ROOT
