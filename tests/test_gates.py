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
    "raw link in code x: [fit](https:": SOUND.replace("<code>x</code>", "<code>x: [fit](https://model.example/fit)</code>"),
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


LONG = "def long():\n" + "".join(f"    a = {i}\n" for i in range(40)) + "    return a"
EXPORTED = """#| exports
#| heart
def fit(
    rate: float,  # above 0
) -> float:       # the same
    "Nothing yet."
    return rate"""
FIT, HELPER, NAIVE = EXPORTED.split("heart\n")[1], "def _helper():\n    return 1 < 2", "def fit(rate):\n    return rate"
SHOWN = f"""<title>Model</title><h1>Model</h1><pre><code>{NAIVE}</code></pre><h3 id="fit">fit</h3>
<pre><code><span>def</span> {FIT.removeprefix("def ")}</code></pre><div id="_helper"></div><pre><code>{HELPER.replace("<", "&lt;")}</code></pre>
<h3 id="long">long</h3><details class="code-fold"><summary>long</summary><pre><code>{LONG}</code></pre></details>"""
SOURCE_FAULTS = {
    "source not shown: fit": SHOWN.replace("above 0", "above 1"),
    "source not shown: _helper": SHOWN.replace("1 &lt; 2", "2"),
    "source not shown: long": SHOWN.replace("    a = 20\n", ""),
    "signature printed once more: fit": SHOWN.replace('<h3 id="fit">fit</h3>', '<h3 id="fit">fit</h3><pre>def fit(rate:float)->float:</pre>'),
    "signature printed once more: long": SHOWN.replace("<details", "<pre>def long()</pre><details"),
    "raw link in a block of code": SHOWN.replace('<h3 id="long">', '<pre>[fit](https://model.example)</pre><h3 id="long">'),
    "no anchor for fit": SHOWN.replace('id="fit"', 'id="fitted"'),
    "short source folded: fit": SHOWN.replace('<pre><code><span>', '<details><pre><code><span>', 1).replace("<pre><code>def _helper", "</details><pre><code>def _helper"),
    "long source open: long": SHOWN.replace('<details class="code-fold">', "<div>").replace("</details>", "</div>"),
}


def exported_site(folder, html):
    "A page, and the folder of the notebook that it was made from."
    (folder / "site").mkdir()
    (folder / "nbs").mkdir()
    (folder / "site/model.html").write_text(html)
    room = notebook(code("#| default_exp model"), code(NAIVE), code(EXPORTED), code(f"#| exports\n{HELPER}"), code(f"#| exports core\n{LONG}"),
                    code("#| hide\ndef fit(): pass"))
    (folder / "nbs/04_model.ipynb").write_text(json.dumps(room))
    return check_site.check(folder / "site", notebooks=folder / "nbs")


def test_a_page_that_shows_its_sources_passes(tmp_path):
    assert exported_site(tmp_path, SHOWN) == []


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_a_source_that_is_not_on_its_page_is_found(tmp_path, fault):
    problems = exported_site(tmp_path, SOURCE_FAULTS[fault])
    assert len(problems) == 1 and fault in problems[0], problems


def test_a_notebook_without_a_page_is_found(tmp_path):
    exported_site(tmp_path, SHOWN)
    (tmp_path / "nbs/05_gone.ipynb").write_text(json.dumps(GOOD))
    assert check_site.check(tmp_path / "site", notebooks=tmp_path / "nbs") == ["gone.html: no page for 05_gone.ipynb"]


def text(source):
    return {"cell_type": "markdown", "id": "a", "metadata": {}, "source": [source]}


OPENING = "Here you see in two lines what this notebook is good for."


def notebook(*cells, opening=OPENING):
    "A notebook with a title, an opening paragraph and these cells."
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    title = {**text(""), "source": ["# Title\n", "\n", "> Summary."]}
    return {"cells": [title, text(opening), *cells], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


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
    "not a title": {**notebook(), "cells": [code("a = 1"), text(OPENING)]},
    "nothing of the first cell behind": {**notebook(), "cells": [text("# Title\n\n> Summary.\n\nLost."), text(OPENING)]},
    "cell 1 is not an opening paragraph": notebook(opening="[![Open in Colab, it is free](images/colab.svg)](https://colab.example/a b c d e)"),
    "cell 2: 101 characters, more than 100": notebook(code(f"a = {'1' * 97}")),
    "cell 3: 101 characters, more than 100": notebook(code("a = 1"), code(f"#| code-fold: true\na = {'1' * 97}")),
    "cell 4: 101 characters, more than 100": notebook(code("a = 1"), code("a = 1"), text(f"So:\n```bash\necho {'1' * 96}\n```\n")),
    "whose source the page does not show": notebook(code("#| export\ndef f():\n    return 1")),
    "folded or hidden by hand": notebook(code("#| exports\n#| code-fold: true\ndef f():\n    return 1")),
}
HEART = "#| exports\n#| heart\ndef f():\n    return 1"
SOUND_ROOM = notebook(*[code("a = 1")] * 10, code(HEART), *[code("a = 1")] * 67)
ROOM_FAULTS = {
    "81 cells, more than 80": notebook(code(HEART), *[code("a = 1")] * 78),
    "0 cells are marked `#| heart`": notebook(code(HEART.replace("#| heart\n", ""))),
    "2 cells are marked `#| heart`": notebook(code(HEART), code(HEART), *[code("a = 1")] * 8),
    "the heart is cell 5 of 12, behind the first 40%": notebook(*[code("a = 1")] * 3, code(HEART), *[code("a = 1")] * 6),
}


def test_a_good_notebook_passes(tmp_path):
    (tmp_path / "good.ipynb").write_text(json.dumps(GOOD))
    assert check_notebooks.check(tmp_path / "good.ipynb") == []


@pytest.mark.parametrize("source", [f"#| hide\na = {'1' * 97}", f"#| echo: false\na = {'1' * 97}", f"#| export\nA = {'1' * 97}",
                                    f"#| fig-alt: {'1' * 97}\na = 1", f"a = {'1' * 96}"])
def test_a_wide_line_that_nobody_sees_passes(source, tmp_path):
    (tmp_path / "good.ipynb").write_text(json.dumps(notebook(code(source))))
    assert check_notebooks.check(tmp_path / "good.ipynb") == []


def test_a_sound_room_passes(tmp_path):
    (tmp_path / "00_good.ipynb").write_text(json.dumps(SOUND_ROOM))
    assert len(SOUND_ROOM["cells"]) == 80 and check_notebooks.check(tmp_path / "00_good.ipynb") == []


@pytest.mark.parametrize("fault", ROOM_FAULTS)
def test_a_fault_in_a_room_is_found(tmp_path, fault):
    (tmp_path / "00_bad.ipynb").write_text(json.dumps(ROOM_FAULTS[fault]))
    problems = check_notebooks.check(tmp_path / "00_bad.ipynb")
    assert len(problems) == 1 and fault in problems[0], problems


def test_the_sidebar_lists_every_notebook_once(tmp_path):
    (tmp_path / "guides").mkdir()
    for name in ("index", "guides/one", "guides/two"): (tmp_path / f"{name}.ipynb").touch()
    sound = "contents:\n  - index.ipynb\n  - guides/one.ipynb\n  - guides/two.ipynb\n"
    for listed, problems in ((sound, []), (sound.replace("one", "gone"), ["no notebook guides/gone", "guides/one.ipynb is listed 0 times"]),
                             (sound + "  - index.ipynb\n", ["index.ipynb is listed 2 times"])):
        (tmp_path / "sidebar.yml").write_text(listed)
        found = check_notebooks.sidebar_problems(tmp_path)
        assert len(found) == len(problems) and all(p in f for p, f in zip(problems, found)), found


def test_our_sidebar():
    assert check_notebooks.sidebar_problems(ROOT / "nbs") == []


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
    "The badge below the opening paragraph names this file; the first code cell installs only where the package is missing."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert f"/blob/main/{path.relative_to(ROOT).as_posix()})" in "".join(cells[2]["source"])
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
    path = clone / "nbs/00_core.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("class UserError", "class UserErrors", 1), encoding="utf-8")
    done = subprocess.run(["bash", "tools/check_sync.sh"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 1 and "out of sync" in done.stdout, done.stdout + done.stderr
