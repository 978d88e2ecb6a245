"""Find notebooks that are not fit to commit: `python tools/check_notebooks.py`, exit code 1 if there are any.

Not clean, too large, without a title and an opening paragraph, with an error or a warning in an output, with nothing
where a figure, a table or a value belongs, with lines that the page cannot show, or with a definition whose source it
would not show. A numbered notebook also has one `#| heart`, early, and at most 80 cells. Without arguments all
notebooks are checked, and whether `sidebar.yml` lists them.
"""
import ast
import copy
import json
import re
import sys
from pathlib import Path

from execnb.nbio import dict2nb, nb2dict
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK_BYTES, FIGURE_BYTES = 300_000, 50_000
MOST_CELLS, LATEST_HEART, WIDEST = 80, 0.4, 100  # of a numbered notebook; its share of the cells; characters a line
UNSEEN = re.compile(r"^#\| *(hide|export|exporti|default_exp|echo: *false|include: *false)(?![\w:])", re.M)
SKIPPED = re.compile(r"^#\| *(hide\b|exports?\b|exporti\b|default_exp\b|eval: *false|slow\b|gpu\b|notest\b)", re.M)
DRAWS = re.compile(r"\bplt\.(?:subplots|figure|plot|imshow)\(|\bplot_\w+\(|\.imshow\(")


def wants_output(source):
    "What belongs below this cell: a figure, a value, or nothing."
    if DRAWS.search(source) and "plt.close" not in source and not re.search(r"^def ", source, re.M): return "figure"
    try: body = ast.parse(source).body
    except SyntaxError: return None
    if not body or not isinstance(body[-1], ast.Expr) or source.rstrip().endswith(";"): return None
    value = body[-1].value
    if not isinstance(value, ast.Call): return None if isinstance(value, ast.Constant) and value.value is ... else "value"
    name = value.func.id if isinstance(value.func, ast.Name) else getattr(value.func, "attr", "")
    return "value" if name in ("print", "Markdown", "DataFrame", "HTML") else None


def is_clean(notebook):
    "Does `nbdev_clean` leave this notebook as it is?"
    cleaned = dict2nb(copy.deepcopy(notebook))
    clean_nb(cleaned)
    cleaned = nb2dict(cleaned)
    same = cleaned["metadata"] == notebook["metadata"] and len(cleaned["cells"]) == len(notebook["cells"])
    return same and all(
        a["metadata"] == b["metadata"] and a.get("execution_count") == b.get("execution_count")
        and [o.get("execution_count") for o in a.get("outputs", [])] == [o.get("execution_count") for o in b.get("outputs", [])]
        for a, b in zip(cleaned["cells"], notebook["cells"]))


def opens_with_prose(cell):
    "Is this a paragraph? Badges, headings and lists alone are none."
    text = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?|^(#|>|[-*] |\||```).*", "", "".join(cell["source"]), flags=re.M)
    return cell["cell_type"] == "markdown" and len(re.findall(r"[A-Za-z]+", text)) >= 8


def wide_lines(cell):
    "The lines of a cell that a page shows as code and that are too wide for it."
    source = "".join(cell["source"])
    if cell["cell_type"] == "code": lines = [] if UNSEEN.search(source) else source.splitlines()
    else: lines = [line for block in re.findall(r"^```.*?\n(.*?)^```", source, re.M | re.S) for line in block.splitlines()]
    return [line for line in lines if len(line) > WIDEST and not re.match(r"#\||.*#\| *hide_line *$", line)]


def layout_problems(path, cells):
    "What keeps a reader from the first sentence, the heart or the source."
    problems, sources = [], ["".join(cell["source"]) for cell in cells]
    if len(cells) < 2 or not opens_with_prose(cells[1]): problems.append("cell 1 is not an opening paragraph")
    for i, (cell, source) in enumerate(zip(cells, sources)):
        problems += [f"cell {i}: {len(line)} characters, more than {WIDEST}: {line.strip()[:50]}" for line in wide_lines(cell)]
        if cell["cell_type"] != "code": continue
        if re.search(r"^#\| *exporti?\b(?!s)", source, re.M) and re.search(r"^(async def|def|class) ", source, re.M):
            problems.append(f"cell {i}: a definition under `#| export`, whose source the page does not show: `#| exports`")
        if re.search(r"^#\| *exports\b", source, re.M) and re.search(r"^#\| *(code-fold|hide\b|echo: *false|include: *false)", source, re.M):
            problems.append(f"cell {i}: an exported source that is folded or hidden by hand")
    if not re.match(r"\d", Path(path).name): return problems
    hearts = [i for i, source in enumerate(sources) if re.search(r"^#\| *heart\b", source, re.M)]
    if len(cells) > MOST_CELLS: problems.append(f"{len(cells)} cells, more than {MOST_CELLS}")
    if len(hearts) != 1: problems.append(f"{len(hearts)} cells are marked `#| heart`, not one")
    elif hearts[0] > LATEST_HEART * len(cells): problems.append(f"the heart is cell {hearts[0]} of {len(cells)}, behind the first {LATEST_HEART:.0%}")
    return problems


def sidebar_problems(folder):
    "Notebooks that `sidebar.yml` does not list, and entries without a notebook."
    listed = re.findall(r"^ *- (\S+\.ipynb)$", (folder / "sidebar.yml").read_text(encoding="utf-8"), re.M)
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    return [f"sidebar.yml: no notebook {name}" for name in listed if name not in there] + [
        f"sidebar.yml: {name} is listed {listed.count(name)} times" for name in sorted(there) if listed.count(name) != 1]


def check(path):
    "All problems of one notebook."
    text = Path(path).read_text(encoding="utf-8")
    notebook, problems = json.loads(text), []
    if len(text.encode()) > NOTEBOOK_BYTES: problems.append(f"{len(text.encode()):,} bytes, more than {NOTEBOOK_BYTES:,}")
    if not is_clean(notebook): problems.append("not clean: run nbdev_clean")
    first = "".join(notebook["cells"][0]["source"]) if notebook["cells"] else ""
    if not re.match(r"# \S.*\n+> \S", first): problems.append("the first cell is not a title with a > summary")
    elif re.sub(r"^# .*\n+(> .*\n?)+", "", first).strip(): problems.append("nbdev shows nothing of the first cell behind its summary")
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code": continue
        source, outputs = "".join(cell["source"]), cell["outputs"]
        if any(o["output_type"] == "error" for o in outputs): problems.append(f"cell {i}: an error in the output")
        if any(o.get("name") == "stderr" for o in outputs): problems.append(f"cell {i}: a warning in the output")
        figures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
        if any(len("".join(f)) * 3 / 4 > FIGURE_BYTES for f in figures): problems.append(f"cell {i}: a figure over {FIGURE_BYTES:,} bytes")
        if SKIPPED.search(source): continue
        wanted = wants_output(source)
        if wanted == "figure" and not figures or wanted == "value" and not outputs:
            problems.append(f"cell {i}: no {wanted} where one belongs: {source.strip().splitlines()[-1][:60]}")
    return problems + layout_problems(path, notebook["cells"])


if __name__ == "__main__":
    paths = [Path(p) for p in sys.argv[1:]] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    found = [f"{p.name}: {problem}" for p in paths if ".ipynb_checkpoints" not in p.parts for problem in check(p)]
    if not sys.argv[1:]: found += sidebar_problems(ROOT / "nbs")
    print("\n".join(found) or f"{len(paths)} notebooks are fit to commit")
    sys.exit(bool(found))
