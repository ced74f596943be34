"""Files of estimators with a network: every class that writes them, arrays and tensors; nothing of a file runs; modes of modules come back."""
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import make_blobs
from torch import nn

from deepclustering.clustering.autoencoder import AutoencoderKMeans
from deepclustering.clustering.dec import DCN, DEC, IDEC
from deepclustering.clustering.depict import DEPICT
from deepclustering.clustering.divclust import DivClust
from deepclustering.clustering.heads import SCANHead
from deepclustering.clustering.jule import JULE
from deepclustering.clustering.partial_transport import SP2OT
from deepclustering.clustering.tell import TELL
from deepclustering.clustering.vade import VaDE
from deepclustering.core.estimators import evaluating, load_estimator, save_estimator
from deepclustering.core.models import MLPAutoencoder

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X = make_blobs(60, 5, centers=3, random_state=0)[0].astype(np.float32)
DEEP = dict(widths=(6, 2), pretrain_epochs=2, batch_size=32, n_init=2, device="cpu", random_state=0, progress=False)
LOOP = dict(update_interval=2, max_iter=4)


def network(seed=0, width=2):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return MLPAutoencoder(5, (6, width))


MAKE = {"TELL": lambda: TELL(3, max_iter=2, device="cpu", random_state=0, progress=False), "TELL with a network": lambda: TELL(3, encoder=network(), max_iter=2, device="cpu", random_state=0, progress=False),
        "AutoencoderKMeans": lambda: AutoencoderKMeans(3, **DEEP), "DEC": lambda: DEC(3, **DEEP, **LOOP), "IDEC": lambda: IDEC(3, **DEEP, **LOOP),
        "DCN": lambda: DCN(3, **{**DEEP, "encoder": network(), "pretrain": "none"}, **LOOP),
        "DEPICT": lambda: DEPICT(3, **DEEP, **LOOP, start_epochs=1), "VaDE": lambda: VaDE(3, **DEEP, epochs=2), "SP2OT": lambda: SP2OT(3, **DEEP, **LOOP),
        "JULE": lambda: JULE(3, widths=(4,), code=3, epochs=1, device="cpu", random_state=0, progress=False),
        **{kind.__name__: lambda kind=kind: kind(3, n_heads=2, max_iter=2, n_neighbors=5, batch_size=32, device="cpu", random_state=0, progress=False) for kind in (SCANHead, DivClust)}}
KINDS_OF_ROWS = {"array": X, "tensor": torch.tensor(X)}


class Frame:
    "What a data frame is to us: something that NumPy can make an array of."
    def __init__(self, values): self.values = values
    def __array__(self, dtype=None, copy=None): return np.asarray(self.values, dtype)


def same(a, b):
    "Equal, and of one type; modules by their weights and their mode."
    if type(a) is not type(b): return False
    if isinstance(a, nn.Module): return a.training == b.training and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray): return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
@pytest.mark.parametrize("rows", KINDS_OF_ROWS)
@pytest.mark.parametrize("name", MAKE)
def test_all_that_is_fitted_comes_back(name, rows, tmp_path):
    "Every attribute by name, none more and none less; and whoever saves what was loaded writes the same bytes."
    rows, model = KINDS_OF_ROWS[rows], MAKE[name]()
    model.fit(rows)
    model.feature_names_in_ = np.array(list("abcde"), dtype=object)                                 # as a data frame sets them
    if model.encoder_ is not None: model.encoder_.eval()                                            # as `load` gives it
    model.save(tmp_path / "a.safetensors")
    back = type(model).load(tmp_path / "a.safetensors")
    given, got = vars(model), vars(back)
    assert set(given) == set(got)
    assert [k for k in given if k not in ("encoder", "device") and not same(given[k], got[k])] == []
    assert (getattr(back, "encoder", None) is None) == (getattr(model, "encoder", None) is None) and str(model.device) == back.device
    assert (np.asarray(back.predict(rows)) == np.asarray(model.predict(rows))).all()
    back.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("name", MAKE)
def test_a_file_is_numbers_and_json(name, tmp_path):
    MAKE[name]().fit(X).save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file: meta, tensors = file.metadata(), list(file.keys())
    assert list(meta) == ["tree"] and dict(json.loads(meta["tree"]))["class"] == name.split()[0] and tensors
    for other in {MAKE[n]().__class__ for n in MAKE} - {type(MAKE[name]())}:
        with pytest.raises(ValueError, match=f"path must name a file that {other.__name__}.save wrote, and .* holds {name.split()[0]}"): other.load(tmp_path / "m.safetensors")


def test_centres_that_were_given_come_back_as_centres(tmp_path):
    "An array stays an array, a tensor a tensor, a frame becomes an array; fitting again gives the same model."
    for init, kind in ((X[:3], np.ndarray), (torch.tensor(X[:3]), torch.Tensor), (Frame(X[:3]), np.ndarray), (X[:3].tolist(), list)):
        model = TELL(3, init=init, max_iter=2, device="cpu", random_state=0, progress=False).fit(X)
        save_estimator(tmp_path / "t.safetensors", model)
        back = load_estimator(TELL, tmp_path / "t.safetensors")
        assert type(back.init) is kind and np.array_equal(np.asarray(back.init, np.float32), X[:3])
        assert np.array_equal(back.fit(X).cluster_centers_, model.cluster_centers_)


@pytest.mark.parametrize("state, kept", [(3, 3), (np.int64(3), 3), (None, None), (np.random.RandomState(0), None), (torch.Generator().manual_seed(0), None)])
def test_a_seed_is_kept_and_a_generator_is_not(state, kept, tmp_path):
    model = AutoencoderKMeans(3, **{**DEEP, "random_state": state}).fit(X)
    model.save(tmp_path / "m.safetensors")
    back = AutoencoderKMeans.load(tmp_path / "m.safetensors")
    assert back.random_state == kept and type(back.random_state) is type(kept)


def test_a_file_that_exists_survives_what_cannot_be_written(tmp_path):
    path = tmp_path / "m.safetensors"
    model = AutoencoderKMeans(3, **DEEP).fit(X)
    model.save(path)
    before = path.read_bytes()
    model.extra_ = abs
    with pytest.raises(ValueError, match="fitted/extra_ must be a tensor"): model.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    path.write_bytes(before[:-7])
    with pytest.raises(ValueError, match="is not a whole safetensors file"): AutoencoderKMeans.load(path)


def test_a_foreign_encoder_is_copied_not_taken(tmp_path):
    class Mine(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.Linear(5, 2)
        def encode(self, x): return self.layer(x)
    mine, fresh = Mine(), Mine()
    model = AutoencoderKMeans(3, **{**DEEP, "encoder": mine, "pretrain": "none"}).fit(X)
    model.save(tmp_path / "m.safetensors")
    drawn = fresh.layer.weight.detach().clone()
    back = AutoencoderKMeans.load(tmp_path / "m.safetensors", fresh)
    assert torch.equal(fresh.layer.weight, drawn) and torch.equal(back.encoder_.layer.weight, mine.layer.weight) and (back.predict(X) == model.labels_).all()


# --- evaluation mode ----------------------------------------------------------------------------------------------------------

def test_modes_come_back_part_by_part():
    "Nested parts, one that is held twice, one inside the other, and after an error."
    shared = nn.Dropout()
    net = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2), shared), shared, nn.Linear(2, 2))
    net[0].eval(); shared.train()
    modes = lambda: [m.training for m in net.modules()]
    before = modes()
    assert len(set(before)) == 2
    with evaluating(net) as same_net:
        assert same_net is net and not any(modes())
        with evaluating(net[0]): assert not any(modes())
        assert not any(modes())
    assert modes() == before
    with pytest.raises(KeyboardInterrupt), evaluating(net): raise KeyboardInterrupt
    assert modes() == before
