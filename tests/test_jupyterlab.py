"The quick start in a real JupyterLab: opened in a browser, run cell by cell, finished without an error."
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on loopback in an empty folder; that folder and its address."
    folder, log = tmp_path_factory.mktemp("lab"), open(tmp_path_factory.mktemp("log") / "log", "w+")
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", "--IdentityProvider.token=", "--ServerApp.password=",
               f"--ServerApp.root_dir={folder}", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # figures go into the notebook
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=subprocess.STDOUT,
                              env={**environment, "HF_HUB_OFFLINE": "1", "JUPYTER_CONFIG_DIR": str(folder / "config"), "TQDM_DISABLE": "1"})
    try:
        for _ in range(120):
            time.sleep(0.5)
            found = re.search(r"http://127\.0\.0\.1:\d+", Path(log.name).read_text())
            if found: break
        assert found, Path(log.name).read_text()
        yield folder, found[0]
    finally:
        server.terminate()
        server.wait(30)


def run_all(browser, address, path, seconds=300):
    "Open a notebook in JupyterLab, run all its cells, save it, and return its code cells."
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/lab/tree/{path.name}?reset", wait_until="load")
    page.locator(".jp-Notebook").wait_for(timeout=60_000)
    accept, idle = page.locator(".jp-Dialog .jp-mod-accept"), page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']")
    for _ in range(60):  # JupyterLab may ask which kernel; then it is the one that it proposes
        page.wait_for_timeout(1000)
        if accept.count(): accept.first.click()
        elif idle.count(): break
    page.wait_for_timeout(2000)
    if accept.count(): accept.first.click()
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells")).first.click()
    end = time.time() + seconds
    while time.time() < end:
        time.sleep(2)
        if accept.count(): accept.first.click()
        page.keyboard.press("Control+s")
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        failed = any(o["output_type"] == "error" for c in cells for o in c["outputs"])
        if failed or all(c["execution_count"] for c in cells): break
    page.close()
    return cells


def errors(cells):
    "Names of errors in the outputs, and cells that were not run."
    raised = [o["ename"] for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    return raised + ["".join(c["source"])[:40] for c in cells if not c["execution_count"] and not raised]


def test_the_quick_start_runs_in_jupyterlab(browser, lab):
    source = json.loads((ROOT / "nbs/tutorials/quickstart.ipynb").read_text(encoding="utf-8"))
    # What the flag `eval: false` marks needs Meta's weights: shown to readers, left out of a run here.
    source["cells"] = [c for c in source["cells"] if "facebook/dinov3" not in "".join(c["source"]) or c["cell_type"] != "code"]
    folder, address = lab
    path = folder / "quickstart.ipynb"
    path.write_text(json.dumps(source))
    cells = run_all(browser, address, path)
    assert errors(cells) == []
    assert any("image/png" in o.get("data", {}) for c in cells for o in c["outputs"])


def test_an_error_in_a_notebook_is_noticed(browser, lab):
    source = json.loads((ROOT / "nbs/tutorials/quickstart.ipynb").read_text(encoding="utf-8"))
    source["cells"] = [{"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": ["1 / 0"]}]
    folder, address = lab
    path = folder / "broken.ipynb"
    path.write_text(json.dumps(source))
    assert errors(run_all(browser, address, path, seconds=60)) == ["ZeroDivisionError"]
