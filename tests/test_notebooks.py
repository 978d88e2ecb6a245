"Each notebook is one test: nbdev's own runner, in a process of its own, with the flags that settings.ini skips."
import os
import sys
from pathlib import Path

import forks
import pytest
from helpers import ENVIRONMENT
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
    words = [sys.executable, "-c", RUN, str(notebook), CONFIG.tst_flags, flags, str(ROOT)]
    # With flags a notebook may want the user's own models; without, there are none, so that it needs none.
    run = forks.run(words, notebook.parent, {**(os.environ if flags else ENVIRONMENT), "IN_TEST": "1"}, 1800 if flags else 600)
    assert run.returncode == 0, f"{notebook.name} failed\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
