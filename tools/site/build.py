"""The site from nbdev's processed notebooks, by Quarto where it is on the PATH, else by pandoc: `python tools/site/build.py`.

Pages were executed before (`make run`); here nbdev runs only the imports and definitions that it needs for signatures.
"""
import base64, functools, hashlib, json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import jinja2, pypandoc, yaml
from nbdev.config import get_config

sys.path.insert(0, str(Path(__file__).parent.parent))
from readme import fill_in

HERE, CFG = Path(__file__).parent, get_config()
CACHE, SITE = CFG.config_path / ".cache/site", CFG.doc_host + CFG.doc_baseurl
OPTIONS = {"label", "fig-cap", "fig-alt", "tbl-cap", "include", "echo", "output", "eval", "code-fold", "code-summary"}  # of a cell
MIME = ("image/svg+xml", "image/png", "text/markdown", "text/html", "text/plain")  # the first that an output has is shown


def stop(message): sys.exit(f"site: {message}")


def digest(*parts): return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


bytes_of = functools.cache(lambda *paths: digest(*map(Path.read_bytes, paths)))  # once for all pages: the index alone has half a megabyte


def cached(make, *parts):
    "The text that `make()` returned for these parts, now or in an earlier build."
    path = CACHE / digest(*parts)
    if not path.exists(): path.write_text(make())
    return path.read_text()


def process(source):
    "What nbdev_proc_nbs (which would try to install Quarto) makes of one notebook. Code runs for signatures, once for the same code."
    notebook, made_by = CFG.nbs_path / source, bytes_of(CFG.config_file, CFG.lib_path / "_modidx.py")
    text = notebook.read_text() if notebook.exists() else stop(f"sidebar.yml lists {source}, which does not exist")
    def run(*skipped):
        from execnb import nbio
        from nbdev import process, processors
        procs = [proc for proc in processors.FilterDefaults().procs() if proc.__name__ not in skipped]
        process.NBProcessor(nb=(nb := nbio.read_nb(notebook)), procs=procs).process()
        return nbio.nb2str(nb)
    code = [c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    page, executed = json.loads(cached(lambda: run("exec_show_docs"), text, made_by)), json.loads(cached(run, code, made_by))
    signatures = ([c for c in nb["cells"] if re.search(r"^show_doc\(", "".join(c["source"]), re.M)] for nb in (page, executed))
    for cell, shown in zip(*signatures): cell["outputs"] = shown["outputs"]
    return page


def block(text, classes):
    "Fenced text, without terminal colours and without what a progress bar overwrote."
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|^.*\r(?!\n)", "", "".join(text), flags=re.M).rstrip()
    return f"````````{{{classes}}}\n{text}\n````````"


class Page:
    "A notebook of the sidebar, as nbdev processed it, on its way to HTML."
    def __init__(self, source, trail, notebook):
        front, *self.cells = notebook["cells"]
        matter = yaml.safe_load("".join(front["source"]).strip("-\n"))
        self.source, self.trail, self.files = source, trail, {}
        self.title, self.description = matter["title"], matter.get("description", "")
        self.out = join(dirname(source), matter.get("output-file", Path(source).stem + ".html"))
        self.ran = notebook["metadata"].get("provenance") or stop(f"{source} was never executed: make run NB=nbs/{source}")

    def to(self, target):
        "The address of another file of the site, as seen from this page."
        return relpath(target, dirname(self.out) or ".")

    def origin(self):
        "Under the title: open it in Colab, what it ran on, edit it. Every address comes from settings.ini."
        path, colab = f"{CFG.branch}/{CFG.nbs_path.name}/{self.source}", CFG.git_url.replace("github.com", "colab.research.google.com/github")
        ran = "Ran on {date} at commit {commit} in {seconds} s: {device}, Python {python}, torch {torch}.".format_map(self.ran)
        return (f"::: {{.origin data-pagefind-ignore=''}}\n[![Open in Colab]({self.to('colab.svg')})]({colab}/blob/{path}) {ran} "
                f"[Edit this page]({CFG.git_url}/edit/{path})\n:::")

    def figure(self, kind, content, options):
        "Markdown of a picture, which becomes a file beside the page."
        alt = options.get("fig-alt") or stop(f"{self.source}: the figure {options.get('label', 'without label')} has no fig-alt")
        content = content.encode() if "svg" in kind else base64.b64decode(content)
        name = f"figures/{Path(self.out).stem}-{digest(content)[:10]}.{kind[6:9]}"
        self.files[join(dirname(self.out), name)] = content
        return f'![]({name}){{alt="{escape(alt)}"}}'

    def output(self, out, options):
        "Markdown of one output of a cell; show_doc's is Markdown already."
        if "data" not in out: return block(out.get("text") or f"{out['ename']}: {out['evalue']}", f".result .{out['output_type']}")
        content = "".join(out["data"][kind := next(kind for kind in MIME if kind in out["data"])])
        if kind.startswith("image"): return self.figure(kind, content, options)
        return {"text/markdown": fill_in(re.sub(r"(?m)(?<=# )(.*)\[(`[^`]+`)\]\(http[^)]*\)", r"\1\2", content)), "text/html": block(fill_in(content), "=html"), "text/plain": block(content, ".result")}[kind]

    def cell(self, cell):
        "Markdown of one cell, by Quarto's directives: what is shown and folded, the label and the caption."
        source = "".join(cell["source"])
        if cell["cell_type"] != "code": return fill_in(source)
        options = {key: yaml.safe_load(value) for key, value in re.findall(r"^#\| *([\w-]+): *(.+)$", source, re.M)}
        if unknown := options.keys() - OPTIONS: stop(f"{self.source}: nothing here reads the option {', '.join(sorted(unknown))}")
        if options.get("include") is False: return ""
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
        parts = [block(code, "." + cell["metadata"].get("language", "python"))] if code and options.get("echo") is not False else []
        if parts and (fold := options.get("code-fold")):
            summary = f"<summary>{options.get('code-summary', 'Code')}</summary>"
            parts = [f'<details class="fold"{" open" * (fold == "show")}>{summary}', *parts, "</details>"]
        outputs = [self.output(out, options) for out in cell["outputs"] if options.get("output") is not False]
        caption = options.get("fig-cap") or options.get("tbl-cap")
        if caption and "label" in options: outputs = [f"::: {{#{options['label']}}}", *outputs, caption, ":::"]
        if code.startswith("show_doc(") and outputs: outputs = [block('<section class="api">', "=html"), outputs[0][3:], block("</section>", "=html")]
        return "\n\n".join(parts + outputs)

    def convert(self, bibliography):
        "Table of contents and body, by pandoc; its warnings are errors."
        markdown = "\n\n".join([self.origin(), *map(self.cell, self.cells)])
        command = [pypandoc.get_pandoc_path(), "-f", "markdown-yaml_metadata_block-pandoc_title_block-example_lists+table_attributes", "-t", "html5",
                   "--mathml", "--toc", "--wrap=preserve", "--syntax-highlighting=none", f"--lua-filter={HERE / 'quarto.lua'}", "--citeproc",
                   f"--bibliography={bibliography}", f"--template={HERE / 'body.html'}", "-M", "link-citations",
                   "-M", "reference-section-title=References", "-M", "title=page"]
        def make():
            run = subprocess.run(command, input=markdown, capture_output=True, text=True)
            if run.stderr or run.returncode or "{{&lt;" in run.stdout: stop(f"{self.source}: {run.stderr or 'a shortcode, which only Quarto reads'}")
            return slim(run.stdout)
        self.toc, self.body = cached(make, markdown, bytes_of(Path(__file__), HERE / "quarto.lua", HERE / "body.html", bibliography)).split("<!-- body -->")

    def linked(self, pages):
        "The body with links to notebooks and to nbdev's API made relative; a symbol without a heading is found at its class or page."
        def notebook(match):
            source = normpath(join(dirname(self.source), match[1]))
            return f'href="{self.to(pages[source].out)}' if source in pages else stop(f"{self.source} links to {source}, which is not in sidebar.yml")
        def symbol(match):
            known = next((page.body for page in pages.values() if page.out == match[1]), "")
            anchor = next((name for name in (match[2], match[2].split(".")[0]) if f'id="{name}"' in known), "")
            return f'href="{"" if anchor and match[1] == self.out else self.to(match[1] or "index.html")}#{anchor}"'.replace('#"', '"')
        return re.sub(rf'href="{re.escape(SITE)}/([^"#]*)#?([^"]*)"', symbol, re.sub(r'href="(?!\w+:)([^"#]+\.ipynb)', notebook, self.body))


def slim(html):
    "Without what no browser shows: end tags and attributes that change nothing, TeX inside MathML, a signature that the source below repeats; one H1."
    noise = (r' xmlns="[^"]*"| display="inline"|<semantics>|<annotation.*?</semantics>|<colgroup>.*?</colgroup>\n| class="(?:odd|even|header)"| style="text-align: left;"'
             r'|</(?:li|td|th|tr|thead|tbody)>| (?=/>)| target="_blank" style="float:right; font-size:smaller"| data-cites="[^"]*"| id="toc-[^"]*"')
    pairs = [(noise, ""), (r"(<math[^>]*>)<mrow>(.*?)</mrow></math>", r"\1\2</math>"), ("></mspace>", "/>"), (r' form="\w+">([][(){}])<', r">\1<"),
             (r' mathvariant="normal">(\w\w+)<', r">\1<"), (r'(<table[^>]*) style="width: *\d+%;?"', r"\1"), (r"(</?)h1\b", r"\1h2"),
             (r'(</h3>)\s*<pre(?:(?!</pre>).)*</pre>(?=(?:(?!</?section).)*</section>\s*<details class="fold" open>)', r"\1")]
    for pattern, replacement in pairs: html = re.sub(pattern, replacement, html, flags=re.S)
    return re.sub(r">[^<]+<", lambda text: text[0].replace("&quot;", '"').replace("&#39;", "'"), html)


def walk(contents, trail=()):
    "The pages of a sidebar in reading order, each with the sections that lead to it."
    for item in contents:
        if isinstance(item, str): yield item, trail
        else: yield from walk(item["contents"], (*trail, item["section"]))


def with_pandoc(out):
    "Every page of the sidebar, the site map, the page for a wrong address and the search index."
    settings, sidebar = (yaml.safe_load((CFG.nbs_path / name).read_text()) for name in ("_quarto.yml", "sidebar.yml"))
    contents = sidebar["website"]["sidebar"]["contents"]
    pages = {source: Page(source, trail, process(source)) for source, trail in walk(contents)}
    with ThreadPoolExecutor() as pool: list(pool.map(lambda page: page.convert(CFG.nbs_path / settings["bibliography"]), pages.values()))
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters["code"] = lambda text: jinja2.utils.markupsafe.Markup(re.sub("`(.+?)`", r"<code>\1</code>", escape(text)))
    env.globals.update(cfg=CFG, site=SITE, pages=pages, contents=contents)
    shell, order = env.get_template("page.html").render, [None, *pages.values(), None]
    files = {"sitemap.xml": env.get_template("sitemap.xml").render(), "404.html": shell(page={"title": "Page not found", "to": (CFG.doc_baseurl + "/{}").format})}
    for before, page, after in zip(order, order[1:], order[2:]):
        files |= page.files | {page.out: shell(page=page, before=before, after=after, toc=page.toc, body=page.linked(pages))}
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(CFG.nbs_path, out, ignore=shutil.ignore_patterns("*.ipynb", "*.yml", "*.bib", ".*"))
    shutil.copytree(HERE / "static", out, dirs_exist_ok=True)
    for name, content in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    subprocess.run([sys.executable, "-m", "pagefind", "--site", out, "--force-language", "en", "--silent"], check=True)


def with_quarto(out):
    "nbdev's folder, with the line under each title, rendered by Quarto itself."
    from nbdev import quarto, serve
    quarto.refresh_quarto_yml()
    shutil.copy(HERE / "static/colab.svg", folder := serve.proc_nbs(CFG.nbs_path, n_workers=0, force=True))
    for path, notebook in ((path, json.loads(path.read_text())) for path in folder.rglob("*.ipynb")):
        for cell, part in ((c, part) for c in notebook["cells"] for part in (c, *(o.get("data", {}) for o in c.get("outputs", ())))):
            part |= {k: fill_in("".join(part[k])) for k in ("source",) * (cell["cell_type"] == "markdown") + ("text/markdown", "text/html") if k in part}
        origin = Page(path.relative_to(folder).as_posix(), (), notebook).origin()
        notebook["cells"].insert(1, {"cell_type": "markdown", "metadata": {}, "source": origin})
        path.write_text(json.dumps(notebook))
    subprocess.run(["quarto", "render", "--no-cache"], cwd=folder, check=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(folder / out.name, out)


if __name__ == "__main__":
    CACHE.mkdir(parents=True, exist_ok=True)
    (with_quarto if shutil.which("quarto") else with_pandoc)(CFG.doc_path)
    print(f"{sum(os.times()[:4]):.1f} s of CPU. To read it: python -m http.server -d {CFG.doc_path.name}")
