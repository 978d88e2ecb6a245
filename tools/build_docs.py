"""Build the documentation site without Quarto and without a network: `python tools/build_docs.py`.

nbdev's own processors and those of `_dinov3_nb_docs.py` write `_proc/` (headings, sources, hidden cells, links between
pages). smalldocs then renders it to `_docs/`, from the same `nbs/_quarto.yml` that `nbdev_docs` hands to Quarto. Formulas become MathML, so a
page asks nothing of another machine. Search needs http: `python -m http.server -d _docs`.
"""
import argparse
import json
import os
import re
import shutil
import sys
from html import unescape
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _dinov3_nb_command  # nbdev imports the package: this leaves PyTorch out
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

NUMBER = r"\d+[a-z]?_"


def process(config, workers=2):
    "What `nbdev_proc_nbs` does, less its check for Quarto, which would try to install it."
    refresh_quarto_yml()
    _build_modidx()
    nbdev_sidebar.__wrapped__(file_re=r"\.(?:ipynb|qmd|html)$")
    shutil.rmtree(config.config_path / "_proc", ignore_errors=True)
    return proc_nbs(config.nbs_path, n_workers=workers, force=True)


def without_number(text):
    "Relative links to numbered notebooks, as their pages are called; absolute links stay."
    return re.sub(rf"(\]\((?!\w+:)[^)\s]*?)(?<![\w-]){NUMBER}([\w-]+\.ipynb)", r"\1\2", text)


def rename_notebooks(folder):
    "nbdev wants `02_data.ipynb` at `data.html` and says so in `output-file`, which smalldocs does not read."
    notebooks = list(folder.rglob("*.ipynb"))
    names = [p.with_name(re.sub(f"^{NUMBER}", "", p.name)) for p in notebooks]
    assert len(set(names)) == len(names), "two notebooks want the same page"
    for path, name in zip(notebooks, names):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "raw": source = re.sub(r"^output-file:.*\n", "", source, flags=re.M)
            if cell["cell_type"] == "markdown": source = without_number(source)
            cell["source"] = source
        path.unlink()
        name.write_text(json.dumps(notebook), encoding="utf-8")
    for path in folder.glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(rf"(?<![\w-]){NUMBER}([\w-]+\.ipynb)", r"\1", text), encoding="utf-8")


def mathml(html):
    "TeX to MathML: no JavaScript and no web fonts."
    def one(match):
        tex = unescape(match[2]).strip()[2:-2].strip()
        display = "block" if match[1] == "display" else "inline"
        return f'<span class="math {match[1]}">{convert(tex, display=display)}</span>'
    return re.sub(r'<span class="math (inline|display)">(.*?)</span>', one, html, flags=re.S)


def flags_broken_well(html):
    "A flag may end a line behind an underscore, and never between its hyphens and its name."
    def flag(match): return f'<span class="text-nowrap">{match[1]}</span><wbr>' + match[2].replace("_", "_<wbr>")
    def code(match): return re.sub(r"(--[A-Za-z0-9]+_?)(\w*)", flag, match[0])
    blocks = re.split(r"(<pre\b.*?</pre>)", html, flags=re.S)  # lines of a block stay as they are
    return "".join(part if part.startswith("<pre") else re.sub(r"<code>[^<]*--[^<]*</code>", code, part) for part in blocks)


def localise(site, base):
    "Links to our own published address become relative, and what a page would fetch from elsewhere is dropped."
    for path in (site / "site_libs").rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"@import url\(https?://[^)]*\);", "", text), encoding="utf-8")
    for path in site.rglob("*.html"):
        up = "../" * (len(path.relative_to(site).parts) - 1)
        head, middle, body = path.read_text(encoding="utf-8").partition("</head>")
        body = re.sub(rf'href="{re.escape(base)}/', f'href="{up}', body)
        head = re.sub(r"<(?:link|script)\b[^>]*https://cdn\.jsdelivr\.net/[^>]*>(?:</script>)?", "", head)
        path.write_text(head + middle + mathml(flags_broken_well(body)), encoding="utf-8")


def build(config):
    "Build the site and return its folder and what smalldocs warned about."
    from smalldocs.site import build as render
    processed = process(config)
    rename_notebooks(processed)
    site = render(str(processed), quiet=True)
    folder = config.config_path / config.doc_path.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(str(processed / config.doc_path.name), folder)
    localise(folder, f"{config.doc_host}{config.doc_baseurl}")
    (folder / ".nojekyll").touch()
    ignored = ("format commonmark", "format.html.grid")  # nbdev's README format; column widths, which styles.css repeats
    return folder, [str(w) for w in site.warnings if not any(part in str(w) for part in ignored)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there was a warning")
    arguments = parser.parse_args()
    folder, warnings = build(get_config())
    for warning in warnings: print("warning:", warning)
    print(f"{len(list(folder.rglob('*.html')))} pages in {folder.name}/; to read them: python -m http.server -d {folder.name}")
    return 1 if arguments.strict and warnings else 0


if __name__ == "__main__":
    sys.exit(main())
