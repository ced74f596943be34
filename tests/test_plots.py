"""Plots: colours against another model of colour-blindness and another colour space, drawings against hand-made ones, words against the data."""
import itertools
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from conftest import ROOT, notebook, text
from deepclustering.core import plots as p

RGB_TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
# What the notebook does not use: Viénot, Brettel and Mollon 1999 (cones after Smith and Pokorny), and CIELAB.
RGB_TO_LMS = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
LOST_CONE = {"protanopia": [[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]], "deuteranopia": [[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "Default settings, no figure left, and nobody shows anything."
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("a helper called plt.show"))
    with matplotlib.rc_context(): yield
    plt.close("all")


def linear(colour):
    v = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def cielab(light):
    t = RGB_TO_XYZ @ np.clip(light, 0, 1) / RGB_TO_XYZ.sum(1)
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def visions():
    "Name and matrix on linear RGB: normal, the notebook's three at full and at half strength, and the other model's two."
    yield "normal", np.eye(3)
    for name, matrix in p.VISION.items():
        yield name, np.array(matrix)
        yield f"half {name}", (np.eye(3) + np.array(matrix)) / 2
    for name, lost in LOST_CONE.items(): yield f"Viénot {name}", np.linalg.inv(RGB_TO_LMS) @ lost @ RGB_TO_LMS


eyes = pytest.mark.parametrize("vision, matrix", list(visions()), ids=[name for name, _ in visions()])


# --- colours --------------------------------------------------------------------------------------------------------------

def test_the_grounds_are_the_sites():
    ground = re.search(r"--ground: light-dark\((#\w+), (#\w+)\)", text("tools/site/static/style.css")).groups()
    assert tuple(map(to_hex, ground)) == p.GROUNDS


def test_every_colour_stands_out_from_both_grounds():
    for colour, ground in itertools.product(p.PALETTE, p.GROUNDS):
        a, b = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (colour, ground)))
        assert (b + 0.05) / (a + 0.05) == pytest.approx(p.contrast(colour, ground)) and p.contrast(colour, ground) >= 3
    worst = lambda c: min(p.contrast(c, g) for g in p.GROUNDS)
    assert worst(p.INK) == max(worst(f"#{v:02x}{v:02x}{v:02x}") for v in range(256)) > 4.2  # 4.5 on both is impossible: 4.24 squared is all there is
    assert p.contrast(*p.GROUNDS) ** 0.5 < 4.5


@eyes
def test_the_colours_differ_for_everybody(vision, matrix):
    "CIELAB: 2.3 is just noticed `[unverified]`; 20 is told apart without looking twice. The set of Okabe and Ito falls to 16."
    closest = lambda colours: min(np.linalg.norm(cielab(matrix @ linear(a)) - cielab(matrix @ linear(b))) for a, b in itertools.combinations(colours, 2))
    assert closest(p.PALETTE) > 20
    if vision in p.VISION: assert closest(p.PALETTE) > closest(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))


@eyes
def test_values_rise_in_lightness_for_everybody(vision, matrix):
    colours = p.sequential()(np.linspace(0, 1, 256))[:, :3]
    assert np.all(np.diff([cielab(matrix @ linear(c))[0] for c in colours]) > 0)
    assert min(p.contrast(to_hex(c), g) for c in colours for g in p.GROUNDS) >= 1.5


@pytest.mark.parametrize("vision", p.VISION)
def test_a_dichromat_has_two_dimensions(vision):
    "The matrices have rank two but for rounding and the clipping of the authors' fit: one direction of colour nearly vanishes."
    sigma = np.linalg.svd(np.array(p.VISION[vision]))[1]
    assert sigma[2] < 0.12 * sigma[0]
    assert p.seen_by(p.seen_by("#808080", vision), vision) == "#808080"


def test_styles_are_unique_until_they_say_so():
    ax = p.embedding_map(np.arange(96).reshape(48, 2), range(48))
    seen = {(to_hex(c), d.get_paths()[0].vertices.tobytes()) for d in ax.collections for c in d.get_facecolors()}
    assert len(seen) == 48
    again = p.embedding_map(np.arange(98).reshape(49, 2), range(49))
    assert [t.get_text() for t in again.texts] == [str(i) for i in range(49)]


# --- manners ----------------------------------------------------------------------------------------------------------------

CALLS = {
    "embedding_map": lambda f, **kw: p.embedding_map(f(rng_points()), f(np.arange(20) % 3 - 1), f(rng_points()[:3]),
                                                     images=f(rng_points()[:, :4].reshape(20, 2, 2)), **kw),
    "confusion": lambda f, **kw: p.confusion(f(np.arange(20) % 3), f(np.arange(20) % 4 - 1), **kw),
    "curve": lambda f, **kw: p.curve(f(np.arange(4.)), {"a": f(rng_points()[:, :4]), "b": f(rng_points()[3, :4])}, **kw),
    "heatmap": lambda f, **kw: p.heatmap(f(rng_points()), unit="bits", **kw),
    "timeline": lambda f, **kw: p.timeline([f([[0., 1, 0], [2, 1, 1]]).tolist(), []], **kw),
    "image_grid": lambda f, **kw: p.image_grid(f(rng_points()[:, :4].reshape(20, 2, 2)), **kw)}


def rng_points(): return np.random.default_rng(1).normal(size=(20, 5))


@pytest.mark.parametrize("name", CALLS)
def test_manners(name):
    "Axes in, axes out; nothing global; the caller's words; tensors, arrays and lists are drawn alike."
    before = dict(plt.rcParams)
    ax = CALLS[name](np.asarray)
    assert isinstance(ax, matplotlib.axes.Axes) and len(ax.alt) > 20 and p.alt_text(ax.figure) == ax.alt
    mine = plt.subplots(1, 2)[1][1]
    figures = plt.get_fignums()
    assert CALLS[name](np.asarray, ax=mine) is mine and plt.get_fignums() == figures and mine.alt == ax.alt
    assert CALLS[name](np.asarray, alt="Mine.").alt == "Mine." and CALLS[name](np.asarray, alt="").alt == ""
    assert dict(plt.rcParams) == before
    pixels = []
    for kind in (np.asarray, torch.as_tensor, lambda a: torch.as_tensor(a).tolist() if name != "timeline" else torch.as_tensor(a)):
        fig = CALLS[name](kind, ax=plt.subplots(figsize=(2, 1.5), dpi=50)[1]).figure
        fig.canvas.draw()
        pixels.append(np.asarray(fig.canvas.buffer_rgba()))
    assert all(np.array_equal(pixels[0], other) for other in pixels[1:])


def test_inputs_are_not_changed():
    arrays = [rng_points(), np.arange(20) % 3 - 1]
    copies = [a.copy() for a in arrays]
    p.embedding_map(*arrays), p.heatmap(arrays[0]), p.curve(range(5), arrays[0]), p.confusion(arrays[1], arrays[1])
    assert all(np.array_equal(a, b) for a, b in zip(arrays, copies))


def test_a_script_stays_a_script():
    "Importing the module imports no matplotlib, and the style starts no IPython."
    code = ("import sys, deepclustering.core.plots as p; assert 'matplotlib' not in sys.modules; plt = p.use_style(); assert plt.rcParams['image.cmap'] == 'deepclustering';"
            "p.use_style(); print('IPython' in sys.modules, len(p.figure_html(p.curve([1, 2], [3, 4]))) > 1000)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ, MPLBACKEND="Agg"))
    assert done.stdout.split() == ["False", "True"] and not done.stderr


# --- words --------------------------------------------------------------------------------------------------------------------

def test_words_travel_with_the_notebooks_figures():
    "What the helpers said stands in the SVG that the notebook kept."
    cells = [c for c in notebook("nbs/core/02_plots.ipynb")["cells"] if re.search(rf"^ax = ({'|'.join(CALLS)})\(", c["source"], re.M)]
    found = [re.search(r'<svg role="img" aria-label="([^"]*)"', "".join(o["data"]["image/svg+xml"]))
             for c in cells for o in c.get("outputs", []) if "image/svg+xml" in o.get("data", {})]
    assert len(found) >= 6 and all(f and len(f[1]) > 20 for f in found)


def test_html_is_one_element_that_asks_nothing_of_a_network():
    ax = p.curve([1, 2], {"<b>&\"": [[1, 2], [2, 4]]}, alt='Rises; "<script>" & more.')
    html = p.figure_html(ax.figure)
    element = ET.fromstring(html)
    assert element.tag == "{http://www.w3.org/2000/svg}svg" and element.attrib["role"] == "img" and element.attrib["aria-label"] == ax.alt
    assert set(re.findall(r'(?:href|src)="(?!#|data:)([^"]*)"|url\((?!#)', html)) == set() and "<!DOCTYPE" not in html and "<script" not in html
    assert set(re.findall(r"https?://[^\"\s<>]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert html == p.figure_html(ax)


def test_two_figures_on_a_page_share_no_identifier():
    pages = [p.figure_html(p.heatmap(rng_points() + i)) for i in range(2)]
    first, second = (set(re.findall(r'\sid="([^"]+)"', page)) for page in pages)
    assert first and second and not first & second
    for page, ids in zip(pages, (first, second)): assert {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)} <= ids


def test_ink_in_a_page_is_readable_text():
    light, dark = re.search(r"light-dark\((#\w{6}), (#\w{6})\)", _styled_page()).groups()
    assert p.contrast(light, p.GROUNDS[0]) >= 4.5 and p.contrast(dark, p.GROUNDS[1]) >= 4.5


def _styled_page():
    p.use_style()
    return p.figure_html(p.curve([1, 2], {"line": [1, 2]}))


def test_ink_follows_the_page_in_a_browser(chromium):
    page = chromium.new_page()
    for scheme, colour in (("light", "rgb(87, 96, 106)"), ("dark", "rgb(154, 165, 177)")):
        page.set_content(f'<!doctype html><html style="color-scheme: {scheme}"><body>{_styled_page()}</body></html>')
        assert page.evaluate("[...new Set([...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill))]") == [colour]
    assert page.get_by_role("img", name="line goes from 1 at 1 to 2 at 2.").count() == 1


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None: pytest.skip("no Chromium here")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


# --- what is drawn --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, d", [(1, 1), (1, 4), (2, 3), (30, 2), (30, 7), (5, 40)])
def test_map_is_the_principal_plane(n, d):
    x, labels = np.random.default_rng(n + d).normal(size=(n, d)), np.arange(n) % 3
    ax = p.embedding_map(x, labels, centers=x[:1])
    drawn = ax.collections[0].get_offsets()
    if d == 1: expected = np.c_[x, 0 * x]
    elif d == 2: expected = x
    elif n == 1: expected = np.zeros((1, 2))
    else:
        expected = (x - x.mean(0)) @ np.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))[1][:, :-3:-1]
        expected = expected * np.where((expected * drawn).sum(0) < 0, -1, 1)
    np.testing.assert_allclose(drawn, expected, atol=1e-9)
    np.testing.assert_allclose(ax.collections[-1].get_offsets()[0], drawn[0], atol=1e-9)
    assert [to_hex(c) for c in ax.collections[0].get_facecolors()] == [p.PALETTE[i] for i in labels]


def test_map_has_one_sign():
    x = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]
    drawn = [p.embedding_map(points).collections[0].get_offsets() for points in (x, x[::-1])]
    np.testing.assert_allclose(drawn[0], drawn[1][::-1], atol=1e-9)  # another order of the points mirrors nothing


def test_neighbours_by_brute_force():
    g = np.random.default_rng(3)
    for n in (2, 3, 50):
        z, labels = g.normal(size=(n, 2)), g.integers(2, size=n)
        far = np.linalg.norm(z[:, None] - z, axis=2) + np.diag([np.inf] * n)
        own = (labels[far.argmin(1)] == labels).mean()
        assert f"{own:.0%} have a point of their own group" in p.embedding_map(z, labels).alt


@pytest.mark.parametrize("seed", range(4))
def test_confusion_by_brute_force(seed):
    g = np.random.default_rng(seed)
    classes, clusters = int(g.integers(1, 5)), int(g.integers(1, 5))
    t, c = g.integers(classes, size=30) * 3, g.integers(-1, clusters, size=30) * 2
    c[c < 0] = -1
    ax = p.confusion(t, c)
    rows, columns = ([x.get_text() for x in axis] for axis in (ax.get_yticklabels(), ax.get_xticklabels()))
    cells = {x.get_position(): x.get_text() for x in ax.texts}
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        count = int(((t == int(row)) & (c == (-1 if column == "noise" else int(column)))).sum())
        assert cells[j, i] == (str(count) if count else "")
        assert ax.images[0].get_array()[i, j] == pytest.approx(count / (t == int(row)).sum())
    names, real = sorted(set(t)), sorted(set(c) - {-1})
    k = max(len(names), len(real))
    best = max(sum(((t == a) & (c == b)).sum() for a, b in zip(order, real + [None] * k) if a is not None and b is not None)
               for order in itertools.permutations(names + [None] * (k - len(names))))
    assert sum(int(cells[i, i] or 0) for i in range(min(len(names), len(real)))) == best and f"{best / 30:.0%} on the diagonal" in ax.alt
    assert sorted(map(int, rows)) == names


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_interval_is_scipys(level):
    from scipy import stats
    runs = np.random.default_rng(0).normal(size=(6, 5))
    runs[:4, 2] = np.nan
    ax = p.curve(range(5), runs, interval=level)
    edge = ax.collections[0].get_paths()[0].vertices
    for t in range(5):
        y = runs[:, t][np.isfinite(runs[:, t])]
        low, high = stats.t.interval(level, len(y) - 1, loc=y.mean(), scale=stats.sem(y))
        assert (edge[edge[:, 0] == t, 1].min(), edge[edge[:, 0] == t, 1].max()) == pytest.approx((low, high))
        assert ax.lines[0].get_ydata()[t] == pytest.approx(y.mean())
    assert f"{level:.0%} t-interval of the mean" in ax.alt


def test_a_wide_interval_covers_the_mean_as_often_as_it_says():
    g, covered = np.random.default_rng(0), 0
    for _ in range(400):
        low, high = p._interval(g.normal(size=(4, 1)), 0.8)[1:]
        covered += low[0] <= 0 <= high[0]
    assert abs(covered / 400 - 0.8) < 0.06  # three standard errors


def test_heat_map_cells_have_the_colour_of_their_value():
    v = np.array([[0., 1, np.nan], [5, 2.5, 10]])
    image = p.heatmap(v, limits=(0, 10)).images[0]
    drawn = image.to_rgba(image.get_array())
    for i, j in np.ndindex(v.shape):
        if np.isnan(v[i, j]): assert drawn[i, j, 3] == 0
        else: np.testing.assert_allclose(drawn[i, j], p.sequential()(v[i, j] / 10))


@pytest.mark.parametrize("seed", range(5))
def test_timeline_by_ticks(seed):
    g = np.random.default_rng(seed)
    rows = []
    for _ in range(int(g.integers(1, 5))):
        steps, at, row = g.integers(0, 4, size=12), int(g.integers(0, 4)), []
        for i, length in enumerate(steps):
            if g.random() < 0.6: row.append((at, int(length), f"{'FBW'[i % 3]}{i}"))
            at += int(length)
        rows.append(row)
    if not any(rows): return
    ax = p.timeline(rows)
    begin, end = min(b[0] for r in rows for b in r), max(b[0] + b[1] for r in rows for b in r)
    busy = np.array([[any(b[0] <= tick < b[0] + b[1] for b in row) for tick in range(begin, end)] for row in rows]).reshape(len(rows), end - begin)
    containers = {c.get_label(): c for c in ax.containers}
    idle = np.zeros_like(busy)
    for bar in containers.pop("idle", []):
        idle[round(bar.get_y() + 0.4), int(bar.get_x()) - begin:int(bar.get_x() + bar.get_width()) - begin] = True
    assert np.array_equal(idle, ~busy)
    drawn = sorted((round(r.get_y() + 0.4), r.get_x(), r.get_width(), kind) for kind, c in containers.items() for r in c)
    assert drawn == sorted((i, b[0], b[1], b[2][0]) for i, row in enumerate(rows) for b in row)
    if end > begin: assert ("nobody waits" if busy.all() else f"{(~busy).mean():.0%} of the time is idle") in ax.alt


def test_pictures_are_on_one_scale():
    ax = p.image_grid(np.stack([np.zeros((3, 3)), np.full((3, 3), 9.)]), ["dark", "bright"])
    drawn = ax.images[0].to_rgba(ax.images[0].get_array())
    colours = {to_hex(c) for c in drawn[drawn[..., 3] > 0]}
    assert colours == {to_hex(p.sequential()(0.)), to_hex(p.sequential()(1.))}
    assert drawn[:, 3, 3].max() == 0  # the ground shows between them
