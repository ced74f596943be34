"""Data: every way a file can be absent, damaged or hostile, and the same sets read by somebody else's code."""
import configparser
import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclustering.core import data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def need():
    "Load a set, or skip visibly where there is neither a mirror nor a network."
    def load(name):
        try: return data.load(name)
        except FileNotFoundError as e: pytest.skip(str(e))
    return load


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A set of two files served on this machine, a mirror folder and an empty cache."
    pooch = pytest.importorskip("pooch")
    served, content = tmp_path / "served", {"a.txt": b"plain", "b.bin.gz": b"packed" * 1000}
    served.mkdir()
    (served / "a.txt").write_bytes(content["a.txt"])
    (served / "b.bin.gz").write_bytes(gzip.compress(content["b.bin.gz"], mtime=1))
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_GET(self): requests.append(self.path); super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    table = tuple((name, hashlib.sha256(c).hexdigest()) for name, c in content.items())
    monkeypatch.setitem(data.DATASETS, "toy", data.Source("toy", f"http://127.0.0.1:{server.server_port}/", table))
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(data.VARIABLE, raising=False)
    yield type("Toy", (), {"served": served, "content": content, "requests": requests, "mirror": tmp_path / "mirror", "cache": tmp_path / "cache"})
    server.shutdown(); server.server_close()


def test_download_once_then_cache(toy):
    assert data.fetch("toy") == toy.content
    assert data.fetch("toy") == toy.content
    assert toy.requests == ["/a.txt", "/b.bin.gz"]
    assert sorted(p.name for p in toy.cache.rglob("*") if p.is_file()) == ["a.txt", "b.bin"]  # unpacked, so that pooch checks the content


def test_another_gzip_wrapper_is_the_same_file(toy):
    (toy.served / "b.bin.gz").write_bytes(gzip.compress(toy.content["b.bin.gz"], compresslevel=1, mtime=99))
    assert data.fetch("toy") == toy.content


def test_server_that_unpacks_on_the_way(toy):
    (toy.served / "b.bin.gz").write_bytes(toy.content["b.bin.gz"])
    assert data.fetch("toy") == toy.content


@pytest.mark.parametrize("wrong", [b"", b"plainer", b"\x1f\x8b broken wrapper", gzip.compress(b"other")])
@pytest.mark.parametrize("file", ["a.txt", "b.bin.gz"])
def test_damaged_download_is_not_kept(toy, file, wrong):
    (toy.served / file).write_bytes(wrong)
    with pytest.raises(ValueError, match="no longer holds the expected file") as error: data.fetch("toy")
    assert f"toy: http://127.0.0.1" in str(error.value) and file in str(error.value) and data.VARIABLE in str(error.value)
    assert not [p for p in toy.cache.rglob("*") if p.is_file() and p.name == file.removesuffix(".gz")]


def test_damaged_cache_is_downloaded_again(toy):
    data.fetch("toy")
    next(toy.cache.rglob("a.txt")).write_bytes(b"rotten")
    assert data.fetch("toy") == toy.content
    assert toy.requests.count("/a.txt") == 2


def test_mirror_is_first_read_in_place_and_checked(toy, monkeypatch):
    folder = toy.mirror / "toy"
    folder.mkdir(parents=True)
    for name in toy.content: (folder / name).write_bytes((toy.served / name).read_bytes())
    monkeypatch.setenv(data.VARIABLE, str(toy.mirror))
    assert data.fetch("toy") == toy.content
    assert toy.requests == [] and not toy.cache.exists()
    (folder / "b.bin.gz").write_bytes((folder / "b.bin.gz").read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged or another file and is not used") as error: data.fetch("toy")
    assert "toy" in str(error.value) and data.VARIABLE in str(error.value) and "http://127.0.0.1" in str(error.value)
    assert toy.requests == []
    with pytest.raises(ValueError): data.available("toy")  # damaged is not the same as absent
    (folder / "b.bin.gz").unlink()
    assert data.fetch("toy") == toy.content and toy.requests == ["/b.bin.gz"]  # what the mirror lacks comes from the network


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://nobody.invalid/"])
def test_offline_says_what_to_do(toy, monkeypatch, url):
    source = data.DATASETS["toy"]
    monkeypatch.setitem(data.DATASETS, "toy", data.Source("toy", url, source.sha256))
    with pytest.raises(FileNotFoundError) as error: data.fetch("toy")
    for words in ("toy: a.txt", data.VARIABLE, f"{url}a.txt", "store it as <folder>/toy/a.txt"): assert words in str(error.value)
    with pytest.warns(UserWarning, match="skipped: toy: a.txt"): assert data.available("toy") is False


def test_missing_on_the_server(toy):
    (toy.served / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match="HTTPError"): data.fetch("toy")


def test_cache_that_cannot_be_written(toy):
    toy.cache.write_text("a file where a folder should be")
    with pytest.raises(FileNotFoundError, match="could not be downloaded"): data.fetch("toy")


def test_cache_is_named_after_the_distribution():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert settings["DEFAULT"]["lib_name"] == data.CACHE


def test_pooch_is_imported_only_to_download():
    source = (ROOT / "deepclustering" / "core" / "data.py").read_text(encoding="utf-8")
    assert "\nimport pooch" not in source and "    import pooch" in source


# --- pickles ------------------------------------------------------------------------------------------------------------

class Call:
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function, args", [(os.system, ("false",)), (eval, ("1",)), (exec, ("1",)), (getattr, ("x", "lower")), (open, ("x", "w")),
                                            (np.load, ("x",)), (np.ndarray.tofile, ()), (pickle.loads, (b"",)), (type, ("T", (), {}))])
def test_unpickle_refuses(function, args, protocol):
    with pytest.raises(pickle.UnpicklingError, match="refused"): data.unpickle(pickle.dumps(Call(function, *args), protocol))


@pytest.mark.parametrize("program", [
    b"cnumpy\nndarray.tofile\n.", b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", b"cnumpy\nlib\n.", b"c__builtin__\nlist.append\n.",
    b"cposix\nsystem\n(S'false'\ntR.", b"(iposix\nsystem\n.", b"ccopyreg\n_reconstructor\n.", b"cnumpy.core.multiarray\nscalar\n."])
def test_unpickle_refuses_by_hand(program):
    with pytest.raises(pickle.UnpicklingError, match="refused"): data.unpickle(program)


def test_unpickle_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    with pytest.raises(pickle.UnpicklingError): data.unpickle(pickle.dumps(Call(os.system, f"touch {mark}")))
    assert not mark.exists()


@pytest.mark.parametrize("program", [b"", b".", b"\x80\x02", b"Pid\n.", b"garbage"])
def test_unpickle_of_garbage_raises(program):
    with pytest.raises(Exception): data.unpickle(program)


# --- readers ------------------------------------------------------------------------------------------------------------

def test_nothing_allows_pickle():
    source = (ROOT / "deepclustering" / "core" / "data.py").read_text(encoding="utf-8")
    assert "allow_pickle=True" not in source and "pickle.load" not in source and "torch.load" not in source


@pytest.mark.parametrize("shape", [(0, 3), (4,), (3, 1, 2), (2, 3, 4, 5)])
def test_parse_idx(shape):
    entries = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    header = struct.pack(">BBBB", 0, 0, 8, len(shape)) + b"".join(struct.pack(">i", s) for s in shape)
    np.testing.assert_array_equal(data.parse_idx(header + entries.tobytes()), entries)


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_set_loads_by_name(need, name):
    loaded = need(name)
    if isinstance(loaded, str): return
    if isinstance(loaded, data.Graphs):
        x, edge_index, y, batch = loaded
        assert (x.dtype, edge_index.dtype, y.dtype, batch.dtype) == (torch.float32, torch.int64, torch.int64, torch.int64)
        assert len(x) == len(batch) and (batch.diff() >= 0).all() and len(y) in (len(x), int(batch.max()) + 1)
        assert edge_index.is_contiguous() and edge_index.min() >= 0 and edge_index.max() < len(x)
        assert torch.equal(data.both_ways(edge_index.T), edge_index) and not (edge_index[0] == edge_index[1]).any()
        return
    X, y = loaded
    assert len(X) == len(y) and y.dtype == np.int64 and set(y.tolist()) == set(range(len(loaded.classes)))
    if not isinstance(X, list): assert X.dtype == np.float32 and X.flags.c_contiguous and X.flags.writeable and np.isfinite(X).all()
    else: assert all(isinstance(t, str) and t == t.strip() and t for t in X)


def test_loads_are_independent(need):
    a, b = need("digits"), need("digits")
    a.X[:] = 0
    assert b.X.any()


def test_usps_by_another_reader(need):
    usps = need("usps")
    table = np.concatenate([np.loadtxt(io.BytesIO(c), max_rows=50) for c in data.fetch("usps").values()])
    np.testing.assert_array_equal(np.r_[usps.X[:50], usps.X[7291:7341]], table[:, 1:].astype(np.float32))
    np.testing.assert_array_equal(np.r_[usps.y[:50], usps.y[7291:7341]], table[:, 0])


@pytest.mark.parametrize("chain", [[], [(0, 0)], [(3, 1), (1, 3)], [(5, 0), (0, 2), (2, 0), (0, 2)]])
def test_both_ways_as_a_set(chain):
    assert list(map(tuple, data.both_ways(chain).T.tolist())) == sorted({p for i, j in chain for p in ((i, j), (j, i))})


@pytest.mark.peers
def test_cora_equals_pytorch_geometric(need, tmp_path):
    pyg = pytest.importorskip("torch_geometric.io")
    cora = need("cora")
    for file, content in data.fetch("cora").items(): (tmp_path / file).write_bytes(content)
    theirs = pyg.read_planetoid_data(str(tmp_path), "cora")
    for ours, other in ((cora.x, theirs.x), (cora.edge_index, data.both_ways(theirs.edge_index.T)), (cora.y, theirs.y),
                        *zip(cora.split, (theirs.train_mask, theirs.val_mask, theirs.test_mask))):
        assert torch.equal(ours, other)
    assert torch.equal(cora.edge_index.flip(0), theirs.edge_index)  # theirs is sorted by the second row, a graph in both directions either way


@pytest.mark.peers
def test_graphs_batch_as_pytorch_geometric(need):
    pyg = pytest.importorskip("torch_geometric.data")
    x, edge_index, y, batch = need("mutag")
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), batch.bincount().cumsum(0)])
    parts = [pyg.Data(x=x[a:b], edge_index=edge_index[:, batch[edge_index[0]] == g] - a, y=y[g:g + 1]) for g, (a, b) in enumerate(zip(starts, starts[1:]))]
    theirs = pyg.Batch.from_data_list(parts)
    assert torch.equal(theirs.x, x) and torch.equal(theirs.edge_index, edge_index) and torch.equal(theirs.y, y) and torch.equal(theirs.batch, batch)


# --- your own vectors ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "u1", "<i8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_load_vectors(tmp_path, dtype, order):
    X = np.array([[0, 1], [1, 0], [1, 1]], dtype=dtype, order=order)
    np.save(tmp_path / "x.npy", X)
    loaded = data.load_vectors(tmp_path / "x.npy")
    assert isinstance(loaded, np.memmap) and loaded.dtype == X.dtype
    np.testing.assert_array_equal(loaded, X)
    with pytest.raises(ValueError): loaded[0] = 1  # read-only


@pytest.mark.parametrize("bad", [np.array([None]), np.array(["a"]), np.array([1j]), np.array([(1, 2)], dtype=[("a", int), ("b", int)]), np.array(["2020"], "M8[Y]")])
def test_load_vectors_refuses_dtypes(tmp_path, bad):
    np.save(tmp_path / "x.npy", bad)
    with pytest.raises(ValueError, match="^path must name"): data.load_vectors(tmp_path / "x.npy")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"0,1\n2,3\n", b"PK\x03\x04broken", pickle.dumps([1, 2])])
def test_load_vectors_refuses_files(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match="^path must name"): data.load_vectors(tmp_path / "x.npy")


def test_load_vectors_keys(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.ones(2))
    np.savez(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="^key must be one of a, b, got None"): data.load_vectors(tmp_path / "two.npz")
    assert data.load_vectors(str(tmp_path / "two.npz"), key="b").tolist() == [1, 1]
    with pytest.raises(ValueError, match="^key must be one of"): data.load_vectors(tmp_path / "none.npz")
    for path in (tmp_path, tmp_path / "absent.npy"):
        with pytest.raises(ValueError, match="^path must name a .npy or .npz file, and .* is no file"): data.load_vectors(path)
