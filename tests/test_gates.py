"Each gate lets sound things pass and stops a planted fault."
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import forks
import pytest
from helpers import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import check_notebooks
import check_site

NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
SOUND = """<!doctype html><html><head><title>Model</title><link rel="stylesheet" href="styles.css"></head><body>
<h1 id="model">Model</h1><p>See <a href="other.html#part"><code>fit</code></a> and <code>x</code>.
<a href="https://github.com/dinov3-nb/dinov3_nb/blob/main/settings.ini#L1">source</a></p><img src="figure.png"></body></html>"""
SITE_FAULTS = {
    "broken link nowhere.html": SOUND.replace("other.html#part", "nowhere.html"),
    "broken anchor other.html#gone": SOUND.replace("#part", "#gone"),
    "broken source link": SOUND.replace("settings.ini#L1", "no_such_file.py"),
    "beyond the file's end": SOUND.replace("#L1", "#L99999"),
    "missing image 'gone.png'": SOUND.replace("figure.png", "gone.png"),
    "page without a title": SOUND.replace("<title>Model</title>", "<title></title>"),
    "unresolved symbol link fit": SOUND.replace('<a href="other.html#part"><code>fit</code></a>', "<code>fit</code>"),
    "raw directive": SOUND.replace("See", "::: {.callout-note}\nSee"),
    "flag printed with a dash '–use_4bit'": SOUND.replace("See", "Take –use_4bit and see"),
    "formula not rendered": SOUND.replace("See", "<math><mi>\\arg</mi></math>See"),
    "fetches https://cdn.example/a.js": SOUND.replace("</head>", '<script src="https://cdn.example/a.js"></script></head>'),
}


def make_site(folder, html):
    "A site of two pages, a style sheet and a figure."
    (folder / "index.html").write_text(html)
    (folder / "other.html").write_text('<title>Other</title><h1>Other</h1><p id="part">text</p>')
    (folder / "styles.css").touch()
    (folder / "figure.png").touch()
    return folder


def test_a_sound_site_passes(tmp_path):
    assert check_site.check(make_site(tmp_path, SOUND), {"fit"}) == []


@pytest.mark.parametrize("fault", SITE_FAULTS)
def test_a_fault_in_the_site_is_found(tmp_path, fault):
    problems = check_site.check(make_site(tmp_path, SITE_FAULTS[fault]), {"fit"})
    assert len(problems) == 1 and fault in problems[0], problems


def test_an_empty_site_is_no_sound_site(tmp_path):
    assert check_site.check(tmp_path)


def notebook(*cells):
    "A notebook with a title and these cells."
    title = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title\n", "\n", "> Summary."]}
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return {"cells": [title, *cells], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def code(source, outputs=(), **changes):
    return {"cell_type": "code", "execution_count": None, "id": "b", "metadata": {}, "outputs": list(outputs), "source": [source], **changes}


FIGURE = {"data": {"image/png": "aGVsbG8=", "text/plain": ["<Figure>"]}, "metadata": {}, "output_type": "display_data"}
VALUE = {"data": {"text/plain": ["3"]}, "execution_count": None, "metadata": {}, "output_type": "execute_result"}
GOOD = notebook(code("plt.plot([1, 2]);", [FIGURE]), code("a.shape", [VALUE]))
NOTEBOOK_FAULTS = {
    "not clean": notebook(code("a.shape", [VALUE], execution_count=7)),
    "no figure where one belongs": notebook(code("plt.plot([1, 2]);")),
    "no value where one belongs": notebook(code("a.shape")),
    "an error in the output": notebook(code("1/0", [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, VALUE])),
    "a warning in the output": notebook(code("a.shape", [VALUE, {"output_type": "stream", "name": "stderr", "text": ["careful"]}])),
    "more than 300,000": notebook(code("a = 1", [{"output_type": "stream", "name": "stdout", "text": ["x" * 300_000]}])),
    "a figure over": notebook(code("plt.plot([1]);", [{**FIGURE, "data": {"image/png": "A" * 70_000}}])),
    "not a title": {**notebook(), "cells": [code("a = 1")]},
    "nothing of the first cell behind": {**notebook(), "cells": [{**notebook()["cells"][0], "source": ["# Title\n", "\n", "> Summary.\n", "\n", "Lost."]}]},
}


def test_a_good_notebook_passes(tmp_path):
    (tmp_path / "good.ipynb").write_text(json.dumps(GOOD))
    assert check_notebooks.check(tmp_path / "good.ipynb") == []


@pytest.mark.parametrize("fault", NOTEBOOK_FAULTS)
def test_a_fault_in_a_notebook_is_found(tmp_path, fault):
    (tmp_path / "bad.ipynb").write_text(json.dumps(copy.deepcopy(NOTEBOOK_FAULTS[fault])))
    problems = check_notebooks.check(tmp_path / "bad.ipynb")
    assert len(problems) == 1 and fault in problems[0], problems


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_our_notebooks_are_fit_to_commit(path):
    assert check_notebooks.check(path) == []


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem not in ("index", "reference")], ids=lambda p: p.stem)
def test_open_in_colab(path):
    "The badge names this file; the first code cell installs only where the package is missing."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert f"/blob/main/{path.relative_to(ROOT).as_posix()})" in "".join(cells[1]["source"])
    source = "".join(next(c for c in cells if c["cell_type"] == "code")["source"])
    with patch("subprocess.run") as run:
        exec(source, {})
        run.assert_not_called()
        with patch("importlib.util.find_spec", return_value=None): exec(source, {})
    assert run.call_args.args[0][1:4] == ["-m", "pip", "install"]
    assert re.search(r"dinov3_nb\[notebooks\] @ git\+https://", run.call_args.args[0][-1])


def test_the_reference_is_not_stale():
    "Run the reference page again: every table must come out as it is stored."
    cells = [c for c in json.loads((ROOT / "nbs/reference.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    space = {}
    for cell in cells:
        source = "".join(cell["source"])
        if not source.startswith("#| echo: false"): exec(source, space)
        else: assert eval(source.split("\n", 1)[1], space).data == "".join(cell["outputs"][0]["data"]["text/markdown"]), source


@pytest.mark.parametrize("tool", ["check_site.py", "check_notebooks.py"])
def test_the_tools_exit_with_1(tool, tmp_path):
    (tmp_path / "bad.ipynb").write_text(json.dumps(NOTEBOOK_FAULTS["not clean"]))
    target = tmp_path if tool == "check_site.py" else tmp_path / "bad.ipynb"
    assert forks.run([sys.executable, f"tools/{tool}", target], ROOT, ENVIRONMENT).returncode == 1


def test_the_sync_check_notices_a_change(tmp_path):
    "A notebook that says something else than the module fails tools/check_sync.sh."
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    path = clone / "nbs/00_config.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("class UserError", "class UserErrors", 1), encoding="utf-8")
    done = subprocess.run(["bash", "tools/check_sync.sh"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 1 and "out of sync" in done.stdout, done.stdout + done.stderr
