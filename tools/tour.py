"""`make tour`: execute nbs/tour.ipynb with papermill, print its table, write the page."""
from pathlib import Path

from run import ROOT, execute

OUT = ROOT / "_out"


def result_table(nb):
    "The Markdown table that the cell tagged `results` shows."
    cell = next(c for c in nb.cells if "results" in c.metadata.get("tags", []))
    return next(o.data["text/markdown"] for o in cell.outputs if "data" in o and "text/markdown" in o.data)


def write_page(nb, path):
    "The executed notebook as one HTML file with its figures inside."
    from nbconvert import HTMLExporter
    html, _ = HTMLExporter(template_name="lab", embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True,
                           mathjax_url="", require_js_url="").from_notebook_node(nb)  # the page asks nothing of the network
    path.write_text(html, encoding="utf-8")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    nb, seconds = execute(ROOT / "nbs" / "tour.ipynb", output=OUT / "tour.ipynb")
    page = OUT / "tour.html"
    write_page(nb, page)
    print(f"\n{result_table(nb)}\n\n{seconds:.0f} s. The page: {Path(page).relative_to(ROOT)}")
