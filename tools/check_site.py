"""Find what is broken in a built site: `python tools/check_site.py _docs`, exit code 1 if anything is.

Broken links and anchors, missing images, pages without a title, public names in backticks that did not become
links, directives and TeX printed as text, flags whose two hyphens became a dash, source links to lines that do not
exist, and whatever a page would fetch from another machine. And exported definitions whose source is not on their
page, stands there without an anchor or in hiding, or whose signature stands there twice.
"""
import ast
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SOURCE = re.compile(r"https://(?:github\.com|colab\.research\.google\.com/github)/dinov3-nb/dinov3_nb/(?:blob|tree)/main/([^#]*)(?:#L(\d+))?")
LONGEST_OPEN = 40  # lines; see _dinov3_nb_docs.py
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    "What a page links to, shows, and calls itself."
    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.links, self.images, self.fetched, self.ids = [], [], [], set()
        self.unread, self.codes, self.text, self.open, self.title, self.heading, self.code = [], [], [], [], "", "", ""
        self.blocks, self.folded = [], []  # the text of each block of code, and whether one has to open it
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID: self.open.append(tag)
        if "id" in attributes: self.ids.add(attributes["id"])
        if tag == "a" and attributes.get("href"): self.links.append(attributes["href"])
        if tag == "img": self.images.append(attributes.get("src") or "")
        if tag in ("script", "img", "iframe", "source") and attributes.get("src"): self.fetched.append(attributes["src"])
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon"): self.fetched.append(attributes.get("href") or "")
        if tag == "code": self.code = ""
        if tag == "pre":
            self.blocks.append("")
            self.folded.append("details" in self.open)

    def handle_endtag(self, tag):
        if tag == "code" and not {"a", "pre", "h1", "h2", "h3", "h4"} & set(self.open): self.codes.append(self.code)
        while self.open and self.open.pop() != tag: pass

    def handle_data(self, data):
        if "title" in self.open and "svg" not in self.open: self.title += data
        if "h1" in self.open: self.heading += data
        if "math" in self.open and "\\" in data: self.unread.append(data.strip())
        if "pre" in self.open: self.blocks[-1] += data
        if "code" in self.open: self.code += data
        elif not {"script", "style", "pre", "math"} & set(self.open): self.text.append(data)


def file_problem(site, page, link, pages):
    "Why a relative link leads nowhere, or nothing."
    parts = urlsplit(link)
    target = (site / parts.path.lstrip("/")) if parts.path.startswith("/") else page.parent / unquote(parts.path)
    target = (page if not parts.path else target).resolve()
    if target.is_dir(): target = target / "index.html"
    if not target.exists(): return f"broken link {link}"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids: return f"broken anchor {link}"


def source_problem(link, root):
    "Why a link into the repository leads nowhere, or nothing."
    match = SOURCE.match(link)
    if not match: return None
    path = root / unquote(match[1])
    if not path.exists(): return f"broken source link {link}"
    if match[2] and int(match[2]) > len(path.read_text(encoding="utf-8").splitlines()): return f"source link beyond the file's end {link}"


def page_of(path, folder):
    "Where a site has a notebook: `nbs/02_data.ipynb` becomes `data.html`."
    place = path.relative_to(folder)
    return place.with_name(re.sub(r"^\d+[a-z]?_", "", place.stem) + ".html").as_posix()


def shown_sources(cells):
    "What a page shows as code: cells without directives, and what stands between fences."
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": yield from re.findall(r"^```.*?\n(.*?)^```", source, re.M | re.S)
        elif not re.search(r"^#\| *(?:hide|exporti?|default_exp|echo: *false|include: *false)(?![\w:])", source, re.M):
            yield re.sub(r"^(#\|.*\n?)+", "", source.lstrip())
        for output in cell.get("outputs", []): yield "".join(output.get("text", []) or output.get("data", {}).get("text/plain", []))


def exported_problems(page, cells):
    "Exported definitions that a page hides, shows without an anchor, or shows with one signature too many."
    squeeze = lambda text: "".join(text.split())
    blocks, problems = [squeeze(block) for block in page.blocks], []
    shown, printed = "\n".join(shown_sources(cells)), "\n".join(page.blocks)
    if printed.count("](http") > shown.count("](http"): problems.append("raw link in a block of code")
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or not re.search(r"^#\| *exports\b", source, re.M): continue
        body = re.sub(r"^(#\|.*\n?)+", "", source.lstrip())
        for statement in ast.parse(body).body:
            start = min([statement.lineno, *[d.lineno for d in getattr(statement, "decorator_list", [])]]) - 1
            lines, name = body.splitlines()[start:statement.end_lineno], getattr(statement, "name", "")
            found = [i for i, block in enumerate(blocks) if squeeze("\n".join(lines)) in block]
            what, long = name or lines[0], len(lines) > LONGEST_OPEN
            if not found: problems.append(f"source not shown: {what}")
            elif long and not all(page.folded[i] for i in found): problems.append(f"long source open: {what}")
            elif all(page.folded[i] and len(page.blocks[i].strip().splitlines()) <= LONGEST_OPEN for i in found):
                problems.append(f"short source folded: {what}")
            if not name: continue
            definition = re.compile(rf"^(?:async def|def|class) {name}\b", re.M)
            if len(definition.findall(printed)) > len(definition.findall(shown)): problems.append(f"signature printed once more: {name}")
            if name.lower() not in {i.lower() for i in page.ids}: problems.append(f"no anchor for {name}")
    return problems


def source_problems(site, pages, folder):
    "For each notebook: is its page there, and does it show what the notebook exports?"
    for path in sorted(folder.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        name = page_of(path, folder)
        if site / name not in pages: yield f"{name}: no page for {path.name}"
        else:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            yield from (f"{name}: {problem}" for problem in exported_problems(pages[site / name], cells))


def check(site, symbols=(), root=ROOT, notebooks=None):
    "All problems of a built site, each as `page: problem`; with a folder of notebooks, what is missing from their pages too."
    site = Path(site).resolve()
    pages, found = {path: Page(path) for path in sorted(site.rglob("*.html"))}, []
    if not pages: return [f"{site.name}: no pages"]
    for path, page in pages.items():
        name, problems = path.relative_to(site).as_posix(), []
        if not page.title.strip() or not page.heading.strip(): problems.append("page without a title")
        for link in page.links:
            if re.match(r"[a-z]+:|//", link): problems.append(source_problem(link, root))
            else: problems.append(file_problem(site, path, link, pages))
        for image in page.images:
            if image.startswith("data:"): continue
            if re.match(r"[a-z]+:|//", image) or not (path.parent / unquote(urlsplit(image).path)).exists(): problems.append(f"missing image {image!r}")
        problems += [f"fetches {url} from another machine" for url in page.fetched if re.match(r"https?:|//", url)]
        problems += [f"unresolved symbol link {code}" for code in page.codes if code.removesuffix("()") in symbols]
        problems += [f"formula not rendered {part}" for part in page.unread]
        problems += [f"raw link in code {code}" for code in page.codes if re.search(r"\]\(https?:", code)]
        text = "".join(page.text)
        problems += [f"raw directive {match!r}" for match in re.findall(r":::+ ?\{?\S*|^#\| ?\w+:?.*$|@(?:fig|tbl|eq)-\w+", text, flags=re.M)]
        problems += [f"flag printed with a dash {match!r}" for match in re.findall(r"(?<!\S)[–—][a-z]\w+", text)]
        found += [f"{name}: {problem}" for problem in problems if problem]
    return found + list(source_problems(site, pages, notebooks) if notebooks else [])


def public_symbols():
    "Every public name that nbdev's index knows, so that backticks around it should have become a link."
    import _dinov3_nb_command  # nbdev imports the package: this leaves PyTorch out
    from nbdev.config import get_config
    from dinov3_nb._modidx import d
    lib = get_config(path=ROOT).lib_path.name
    names = {full.removeprefix(f"{module}.") for module, entries in d["syms"].items() for full in entries}
    assert lib and names
    return {name for name in names if "." not in name and not name.startswith("_")}


if __name__ == "__main__":
    problems = check(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs", public_symbols(), notebooks=ROOT / "nbs")
    print("\n".join(problems) or "the site is sound")
    sys.exit(bool(problems))
