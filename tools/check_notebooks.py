"""Find notebooks that are not fit to commit: `python tools/check_notebooks.py`, exit code 1 if there are any.

Not clean, too large, without a title, with an error or a warning in an output, or with nothing where a figure,
a table or a value belongs.
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
    return problems


if __name__ == "__main__":
    paths = [Path(p) for p in sys.argv[1:]] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    found = [f"{p.name}: {problem}" for p in paths if ".ipynb_checkpoints" not in p.parts for problem in check(p)]
    print("\n".join(found) or f"{len(paths)} notebooks are fit to commit")
    sys.exit(bool(found))
