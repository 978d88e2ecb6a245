"Each notebook is one test: nbdev's own runner, in a fresh process, with the flags that settings.ini skips."
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parents[1]
CONFIG = get_config(path=ROOT)
NOTEBOOKS = sorted(Path(p).resolve() for p in nbglob(CONFIG.nbs_path, as_path=True))
RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
notebook, skip, force, root = sys.argv[1:]
passed, seconds = test_nb(Path(notebook), skip_flags=skip.split(), force_flags=force.split(), basepath=root)
sys.exit(0 if passed else 1)
"""


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 5, NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[p.relative_to(CONFIG.nbs_path).with_suffix("").as_posix() for p in NOTEBOOKS])
def test_notebook(notebook, pytestconfig):
    flags = pytestconfig.getoption("--nb-flags")
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(notebook), CONFIG.tst_flags, flags, str(ROOT)],
        cwd=notebook.parent, capture_output=True, text=True, timeout=1800 if flags else 600,
        env={**os.environ, "IN_TEST": "1"},
    )
    assert run.returncode == 0, f"{notebook.name} failed\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
