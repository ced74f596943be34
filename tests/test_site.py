"""The site that `make site` builds without Quarto: a page of every construct, and the book itself, in files and in a browser."""
import configparser
import functools
import http.server
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "tools/site/build.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SIDEBAR = ["index.ipynb", {"section": "Families", "contents": [{"section": "What they share", "contents": ["core/01_checks.ipynb"]}]}]
DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="60" height="60"><circle cx="30" cy="30" r="20" fill="#009E73"/></svg>'

settings = configparser.ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini")
settings = settings["DEFAULT"]
BASE = settings["doc_baseurl"] + "/"


def build(folder, path=None):
    "Build a project's site without Quarto, or with what stands for it in `path`; the process, and the CPU seconds it took."
    env = dict(os.environ, PATH=path or os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "quarto").exists()))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, BUILD], cwd=folder, env=env, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return run, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def project(folder):
    "A small project around the page of every construct."
    (folder / "nbs/core").mkdir(parents=True)
    (folder / "deepclustering").symlink_to(ROOT / "deepclustering")
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT / name, folder)
    for name in ("_quarto.yml", "references.bib", "core/01_checks.ipynb"): shutil.copy(ROOT / "nbs" / name, folder / "nbs" / name)
    shutil.copy(ROOT / "tests/site/constructs.ipynb", folder / "nbs/index.ipynb")
    (folder / "nbs/dot.svg").write_text(DOT)
    (folder / "nbs/sidebar.yml").write_text(yaml.safe_dump({"website": {"sidebar": {"contents": SIDEBAR}}}))
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    "The site of the page of every construct."
    folder = project(tmp_path_factory.mktemp("site"))
    run, _ = build(folder)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return folder / "_docs"


@pytest.fixture(scope="session")
def book():
    "The site of the book, in _docs/ of this checkout."
    run, _ = build(ROOT)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return ROOT / "_docs"


@pytest.fixture(params=["sample", "book"])
def site(request): return request.getfixturevalue(request.param)


class Reader(HTMLParser):
    "What a page links to, its identifiers, pictures and headings, and its text outside code and formulas."
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.images, self.levels, self.text, self.first, self._inside = [], [], [], [], "", None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("href", "src") if key in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "img": self.images.append(attrs)
        if re.fullmatch("h[1-6]", tag): self.levels.append(int(tag[1]))
        if tag in ("a", "button", "input") and self.first is None: self.first = attrs
        if tag in ("code", "pre", "math", "script"): self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag: self._inside.pop()

    def handle_data(self, data):
        if not self._inside: self.text += data


@functools.cache
def read(path): return Reader(path.read_text())


def pages(site): return sorted(p for p in site.rglob("*.html") if "pagefind" not in p.parts)


def test_no_broken_link_and_no_broken_anchor(site):
    for path in pages(site):
        for link in read(path).links:
            address = urlsplit(urljoin(BASE + path.relative_to(site).as_posix(), link))
            if address.scheme or address.netloc: continue  # the only absolute addresses are those a reader clicks
            target = site / unquote(address.path).removeprefix(BASE)
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.name}: {link}"
            if address.fragment and target.suffix == ".html": assert unquote(address.fragment) in read(target).ids, f"{path.name}: {link}"


def test_each_page_is_small_and_well_formed(site):
    for path in pages(site):
        page, text = read(path), path.read_text()
        assert len(text.encode()) < 60_000, f"{path.name}: the budget is 60 KB of HTML a page, see tools/site/README.md"
        assert page.first == {"class": "skip", "href": "#content"} and "content" in page.ids
        assert page.levels.count(1) == 1 and page.levels[0] == 1
        assert not [i for i, n in Counter(page.ids).items() if n > 1], path.name
        assert all(image.get("alt", "").strip() for image in page.images), path.name
        assert not [image["src"] for image in page.images if re.match(r"(\w+:)?//|data:", image["src"])], path.name
        left = re.search(r"\$\$|:::|\\[a-z]{3,}|\{#|@(fig|eq|tbl)-|^#\||^(- |\* |#+ )|\]\(", page.text, re.M)
        assert not left, f"{path.name}: raw markup in {page.text[left.start() - 40:left.end() + 40]!r}"


def test_each_page_says_what_it_ran_on_and_opens_its_notebook(site):
    sources = set()
    for path in pages(site):
        if path.name == "404.html": continue
        colab, edit = (re.search(rf'href="(https://{start}[^"]*\.ipynb)"', path.read_text())[1]
                       for start in ("colab.research.google.com", "github.com/[^/]+/[^/]+/edit"))
        source = colab.removeprefix(f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/")
        assert edit == f"https://github.com/{settings['user']}/{settings['repo']}/edit/{settings['branch']}/{source}"
        notebook = json.loads((site.parent / source).read_text())
        for value in ("date", "commit", "device", "torch", "python", "seconds"):
            assert str(notebook["metadata"]["provenance"][value]) in read(path).text, f"{path.name}: {value}"
        sources.add(source)
    assert len(sources) == len(pages(site)) - 1


def test_site_map_and_search_index(site):
    listed = re.findall("<loc>(.*?)</loc>", (site / "sitemap.xml").read_text())
    root = settings["doc_host"] + BASE
    assert sorted(listed) == sorted(root + p.relative_to(site).as_posix() for p in pages(site) if p.name != "404.html")
    assert len(list((site / "pagefind/fragment").iterdir())) == len(listed)


def test_every_construct(sample):
    text, page = (sample / "index.html").read_text(), read(sample / "index.html")
    for expected in ('id="eq-cost"', ">Equation 1</a>", '<a href="#eq-soft">2</a>', "<strong>Figure 1:</strong>",
                     "<strong>Figure 2:</strong>", "<strong>Table 1:</strong>", "<strong>Table 2:</strong>", ">Table 2</a>",
                     'alt="A blue dot &quot;left&quot; of a vermilion dot."', '<details class="callout tip">', '<details class="callout important" open>',
                     "<em>warning</em>", '<details name="tabs-1" open>', "How the data were made", "Exported source", 'href="#ref-lloyd1982"',
                     'id="fn1"', 'href="core/checks.html#as_generator"', 'href="core/checks.html#data-in-tensor-out"', 'class="api"',
                     "red and plain\n100%|####|", "An <em>index</em> of 40 works, closed", f"This is {settings['repo']}.",
                     'rel="next" href="core/checks.html"'):
        assert expected in text.replace("./core", "core").replace("\u00a0", " "), expected
    for absent in ("hidden_from_the_page", "not shown", "\x1b", " 10%|"): assert absent not in text, absent
    assert text.count("how often to halve") == 1, "the source repeats the signature"
    assert text.count("<details name=") == 3 and len(page.images) == 4
    assert re.search(r"checks\.py#L\d+", (sample / "core/checks.html").read_text()), "show_doc lost its link to the source"
    assert "Families" in (sample / "core/checks.html").read_text().split("</nav>")[1], "breadcrumbs"


@pytest.fixture(scope="session")
def builder(sample):
    "tools/site/build.py as a module, in the sample project."
    here = os.getcwd()
    os.chdir(sample.parent)
    spec = importlib.util.spec_from_file_location("site_build", BUILD)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    yield module
    os.chdir(here)


@pytest.mark.parametrize("source, message", [
    ("See @nothing.", "nothing not found"),
    ("$$ \\undefined{x} $$", "undefined"),
    ("::: {.callout-note}\nnever closed", "unclosed"),
    ("![](dot.svg)", "no alternative text"),
    ("$$ a $$ {#eq-a}\n\n$$ b $$ {#eq-a}", "eq-a is used twice"),
    ("[gone](core/99_gone.ipynb)", "core/99_gone.ipynb, which is not in sidebar.yml"),
    ("#| label: fig-a\ndraw()", "fig-a has no fig-alt"),
    ("#| fig-subcap: [a, b]\ndraw()", "nothing here reads the option fig-subcap"),
    ("::: {#fig-two layout-ncol=2}\n![](dot.svg){fig-alt='A dot.'}\n\nTwo dots.\n:::", "draw the panels in one figure"),
    ("As @eq-cost of another page says", "eq-cost not found"),
    ("{{< video https://example.org/v.mp4 >}}", "shortcode"),
])
def test_a_mistake_stops_the_build_and_names_the_page(builder, source, message):
    code = {"cell_type": "code", "metadata": {}, "outputs": [{"output_type": "display_data", "data": {"image/svg+xml": DOT}}]}
    cells = [{"cell_type": "raw", "source": "---\ntitle: T\n---"}, {**(code if "draw" in source else {"cell_type": "markdown"}), "source": source}]
    provenance = json.loads((ROOT / "tests/site/constructs.ipynb").read_text())["metadata"]["provenance"]
    page = builder.Page("core/wrong.ipynb", (), {"cells": cells, "metadata": {"provenance": provenance}})
    with pytest.raises(SystemExit) as error:
        page.convert(ROOT / "nbs/references.bib")
        page.linked({})
    assert "core/wrong.ipynb" in str(error.value) and message in str(error.value)


def test_a_page_that_is_missing_or_never_ran_fails_the_build(tmp_path):
    folder = project(tmp_path)
    path = folder / "nbs/index.ipynb"
    notebook = json.loads(path.read_text())
    del notebook["metadata"]["provenance"]
    path.write_text(json.dumps(notebook))
    assert "index.ipynb was never executed" in build(folder)[0].stderr
    path.unlink()
    assert "sidebar.yml lists index.ipynb, which does not exist" in build(folder)[0].stderr


QUARTO = """#!{}
# What stands for Quarto: it looks for what the real one would read, and copies.
import json, shutil, sys, yaml
from pathlib import Path
settings = yaml.safe_load(Path("_quarto.yml").read_text())
for name in [*settings["metadata-files"], settings["bibliography"]]: yaml.safe_load(Path(name).read_text()) if name.endswith("yml") else Path(name).stat()
for path in Path(".").rglob("*.ipynb"):
    first, *rest = json.loads(path.read_text())["cells"]
    assert first["cell_type"] == "raw" and yaml.safe_load("".join(first["source"]).strip("-\\n"))["title"], path
    assert "{{{{" not in "".join("".join(c["source"]) for c in rest), path
shutil.copytree(".", out := settings["project"]["output-dir"], ignore=shutil.ignore_patterns(out))
Path(out, "arguments").write_text(" ".join(sys.argv[1:]))
"""


def test_the_builder_is_small():
    "Lines of Python, Lua, CSS and JavaScript, less blank lines, comments and docstrings."
    lines, comment = [], {".py": "#", ".lua": "--", ".css": "/*", ".js": "//"}
    for path in sorted(p for p in (ROOT / "tools/site").rglob("*.*") if p.suffix in comment):
        text = re.sub(r'^ *"(?:""[^\0]*?""|[^"\n]*)"$', "", path.read_text(), flags=re.M)  # a string that stands alone
        lines += [line for line in text.splitlines() if line.strip() and not line.strip().startswith(comment[path.suffix])]
    assert 200 < len(lines) < 300, len(lines)


def test_quarto_gets_the_processed_pages_where_it_is_installed(tmp_path):
    folder = project(tmp_path)
    (folder / "bin").mkdir()
    (folder / "bin/quarto").write_text(QUARTO.format(sys.executable))
    (folder / "bin/quarto").chmod(0o755)
    run, _ = build(folder, path=f"{folder / 'bin'}:{os.environ['PATH']}")
    assert run.returncode == 0, run.stderr
    assert (folder / "_docs/arguments").read_text() == "render --no-cache" and not (folder / "_docs/style.css").exists()
    index = (folder / "_docs/index.ipynb").read_text()
    for expected in ("colab.research.google.com", settings["git_url"] % settings if "%" in settings["git_url"] else settings["git_url"]): assert expected in index


def test_the_workflow_publishes_what_quarto_made():
    jobs = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())["jobs"]
    steps = {step.get("uses", step.get("run")).split("@")[0]: step.get("with", {}) for job in jobs.values() for step in job["steps"]}
    assert re.fullmatch(r"\d+\.\d+\.\d+", steps["quarto-dev/quarto-actions/setup"]["version"])
    assert list(steps)[-3:] == ["make site", "actions/upload-pages-artifact", "actions/deploy-pages"]
    assert steps["actions/upload-pages-artifact"]["path"] == settings["doc_path"] and jobs["publish"]["permissions"] == {"pages": "write", "id-token": "write"}


def test_every_reference_is_cited_and_every_citation_has_its_reference():
    known = re.findall(r"^@\w+\{(\w+),", (ROOT / "nbs/references.bib").read_text(), re.M)
    cells = [cell for path in (ROOT / "nbs").rglob("*.ipynb") for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
    prose = re.sub(r"```.*?```|`[^`]*`", "", "\n".join("".join(cell["source"]) for cell in cells), flags=re.S)
    assert sorted(known) == sorted(set(known)) == sorted(set(re.findall(r"(?<![\w/.])@([a-z]+\d{4}[a-z]?)\b", prose)))


def test_every_notebook_is_in_the_sidebar_once():
    def walk(contents): return [p for item in contents for p in ([item] if isinstance(item, str) else walk(item["contents"]))]
    sidebar = walk(yaml.safe_load((ROOT / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"])
    assert sorted(sidebar) == sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def test_every_public_symbol_has_an_address_and_backticks_lead_there(book):
    from deepclustering._modidx import d
    addresses = {address for symbols in d["syms"].values() for name, (address, _) in symbols.items() if "._" not in name}
    missing = [a for a in addresses if re.split("[#.]", a)[2] not in read(book / a.split("#")[0]).ids]  # a method stands with its class
    assert not missing, missing
    links = [link for path in pages(book) for link in re.findall(r'href="([^"]*#[^"]*)"><code>', path.read_text())]
    assert len(links) >= len(pages(book)), f"only {len(links)} links from backticks: is the project installed?"


def test_one_changed_page_is_rebuilt_within_five_cpu_seconds(tmp_path, book):
    for name in ("settings.ini", "_quarto.yml", "README.md"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    (tmp_path / "deepclustering").symlink_to(ROOT / "deepclustering")
    shutil.copytree(ROOT / ".cache/site", tmp_path / ".cache/site")
    path = tmp_path / "nbs/core/11_aggregate.ipynb"  # as long a page as there is
    notebook = json.loads(path.read_text())
    [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"][1]["source"] = "A changed sentence."
    path.write_text(json.dumps(notebook))
    run, seconds = build(tmp_path)
    assert run.returncode == 0 and "A changed sentence." in (tmp_path / "_docs/core/aggregate.html").read_text()
    assert seconds < 5, seconds


# The browser

class Quiet(http.server.SimpleHTTPRequestHandler):
    "GitHub Pages in small: the site below its base address, 404.html for what does not exist."
    def log_message(self, *args): pass

    def translate_path(self, path): return super().translate_path(path.removeprefix(BASE[:-1]))

    def send_error(self, code, *args):
        body = (Path(self.directory) / "404.html").read_bytes()
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="session")
def chromium():
    "A running browser. Its absence skips these tests, never in CI."
    if not CHROMIUM:
        if os.environ.get("CI") == "true": pytest.fail("CI needs Chromium: apt-get install chromium")
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, site):
    "A page of the served site, which refuses every request that leaves it and collects what goes wrong."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.base, page.wrong, page.site = f"http://127.0.0.1:{server.server_port}{BASE}", [], site
    def guard(route):
        if route.request.url.startswith((page.base, "blob:", "data:")): return route.continue_()
        page.wrong.append(route.request.url)
        route.abort()
    context.route("**/*", guard)
    page.on("console", lambda message: page.wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    yield page
    context.close()
    server.shutdown()


CONTRAST = """() => {
  const parse = c => { const v = c.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v };
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > .5) return c } return [255, 255, 255, 1] };
  const low = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.data.trim() || !e.checkVisibility({visibilityProperty: true}) || e.closest("script, annotation")) continue;
    const [a, b] = [light(parse(style.color)), light(ground(e))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) low.add(`${e.tagName}.${e.className} ${style.color} ${ratio.toFixed(2)} ${node.data.trim().slice(0, 20)}`);
  }
  for (const [name] of CSS.highlights) for (const e of document.querySelectorAll("pre.python")) {
    const [a, b] = [light(parse(getComputedStyle(e, `::highlight(${name})`).color)), light(ground(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) low.add(`${name} in code`);
  }
  return [...low] }"""


def test_each_page_in_the_browser(visit):
    for path in pages(visit.site):
        name = path.relative_to(visit.site).as_posix()
        visit.set_viewport_size({"width": 1280, "height": 900})
        visit.goto(visit.base + name)
        visit.evaluate("document.querySelectorAll('details:not([name])').forEach(d => d.open = true)")
        for scheme in ("light", "dark"):
            visit.emulate_media(color_scheme=scheme)
            assert visit.evaluate(CONTRAST) == [], f"{name}, {scheme}"
        assert visit.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)") == [], name
        assert visit.evaluate("[...document.querySelectorAll('math')].filter(m => m.checkVisibility() && m.getBoundingClientRect().height < 4).length") == 0
        visit.set_viewport_size({"width": 390, "height": 800})
        assert visit.evaluate("document.documentElement.scrollWidth") <= 390, f"{name} overflows"
        assert not visit.wrong, f"{name}: {visit.wrong}"


@pytest.mark.parametrize("site", ["sample"], indirect=True)
def test_formulas_are_set_in_the_bundled_font(visit):
    visit.goto(visit.base)
    assert visit.evaluate("document.fonts.ready.then(fonts => [...fonts].map(f => f.family + f.status))") == ["Latin Modern Mathloaded"]
    assert visit.evaluate("document.querySelectorAll('math').length") > 8


@pytest.mark.parametrize("site", ["sample"], indirect=True)
def test_code_is_coloured_without_markup(visit):
    visit.goto(visit.base)
    kinds = visit.evaluate("Object.fromEntries([...CSS.highlights].map(([kind, ranges]) => [kind, [...ranges].map(String)]))")
    assert kinds.keys() == {"comment", "string", "name", "word", "number"}
    assert kinds["name"] == ["half", "check_int"] and {"# any number", "# how often to halve"} <= set(kinds["comment"])
    assert '"Halve a number, see `as_generator`."' in kinds["string"] and {"def", "return", "import", "assert"} <= set(kinds["word"])
    assert "2" in kinds["number"] and not [text for text in kinds["word"] if "#" in text]
    colours = visit.evaluate("[...CSS.highlights.keys(), 'none'].map(kind => getComputedStyle(document.querySelector('pre.python'), `::highlight(${kind})`).color)")
    assert len(set(colours)) == 6


@pytest.mark.parametrize("site", ["sample"], indirect=True)
def test_everything_is_reached_with_the_keyboard(visit):
    visit.goto(visit.base)
    reached = []
    for _ in range(200):
        visit.keyboard.press("Tab")
        reached.append(visit.evaluate("""() => { const e = document.activeElement, r = e.getBoundingClientRect();
            const seen = getComputedStyle(e).outlineStyle !== "none" && r.width > 0 && r.top >= 0;
            e.dataset.reached = seen; return e === document.body ? null : seen }"""))
        if reached[-1] is None: break
    assert reached[-1] is None and all(reached[:-1]), "focus is not visible somewhere"
    left = "[...document.querySelectorAll('a[href], button, summary')].filter(e => e.checkVisibility() && !e.dataset.reached).map(e => e.outerHTML)"
    assert visit.evaluate(left) == []
    visit.goto(visit.base)
    visit.keyboard.press("Tab")
    visit.keyboard.press("Enter")
    assert visit.evaluate("document.activeElement.id") == "content"


@pytest.mark.parametrize("site", ["sample"], indirect=True)
def test_search_theme_tabs_and_menu(visit):
    visit.goto(visit.base)
    visit.keyboard.press("/")
    visit.keyboard.type("softened temperature")
    visit.wait_for_selector("#hits a")
    assert "Every construct" in visit.inner_text("#hits") and not visit.wrong
    visit.keyboard.press("Escape")
    assert not visit.is_visible("#query")

    ground = "getComputedStyle(document.body).backgroundColor"
    before = visit.evaluate(ground)
    visit.click("#theme")
    after = visit.evaluate(ground)
    visit.reload()
    assert before != after == visit.evaluate(ground)

    assert visit.is_visible(".tabset math") and not visit.is_visible(".tabset pre")
    visit.click("text=PyTorch")
    assert visit.is_visible(".tabset pre") and not visit.is_visible(".tabset math")

    assert visit.is_visible("#pages") and visit.is_visible("#toc")
    visit.set_viewport_size({"width": 390, "height": 800})
    assert not visit.is_visible("#pages") and not visit.is_visible("#toc")
    visit.click("button[popovertarget=pages]")
    assert visit.is_visible("#pages a[aria-current=page]")
    visit.keyboard.press("Escape")
    assert not visit.is_visible("#pages")


@pytest.mark.parametrize("site", ["sample"], indirect=True)
def test_a_wrong_address_shows_a_page_of_the_site(visit):
    visit.goto(visit.base + "core/deep/nothing.html")
    assert visit.inner_text("h1") == "Page not found"
    visit.click("#pages summary")
    visit.click("text=Every construct")
    assert visit.inner_text("h1") == "Every construct"
