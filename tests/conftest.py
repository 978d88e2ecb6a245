"Options and environment shared by all tests, the server that forks their commands, and how they are spread over processes."
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

gc.disable()  # until all is imported: a fifth of that time goes into looking for garbage
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ

if IN_WORKER:  # the process that started it has set all this; only Python's path was changed on the way
    os.environ["PYTHONPATH"] = os.environ["DINOV3_NB_PYTHONPATH"]
else:
    SESSION = tempfile.mkdtemp()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")              # nothing here may need the Hub
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("OMP_NUM_THREADS", "1")             # for networks this small, threads mostly wait for each other
    os.environ.setdefault("PYTHONPATH", "")
    os.environ["DINOV3_NB_PYTHONPATH"] = os.environ["PYTHONPATH"]
    os.environ["DINOV3_NB_CACHE"] = f"{SESSION}/features"     # kept features of tests are not the user's
    os.environ["DINOV3_NB_NO_MODELS"] = f"{SESSION}/hf"       # an empty cache of models, for commands

import forks  # behind the settings, which it copies

# Files that take longest, so that no process is left with one of them at the end.
FIRST = ("test_notebooks", "test_export", "test_jupyterlab", "test_site", "test_cli", "test_data", "test_model", "test_families", "test_cache")
TOGETHER = {"test_jupyterlab": "browser", "test_site": "browser"}  # one Chromium


def pytest_addoption(parser):
    parser.addoption("--nb-flags", default="", help='nbdev test flags to run as well, such as "slow gpu"')


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    "All tests use all cores; a file or a test by name runs here, as does anything with flags of pytest-xdist or -s or --pdb."
    if IN_WORKER: return  # a worker reads the same flags, and must not start workers of its own
    everything = not config.option.keyword and all(Path(argument).is_dir() for argument in config.args)
    free = config.option.capture != "no" and not config.option.usepdb and not config.option.collectonly
    if everything and free and getattr(config.option, "numprocesses", 0) is None and config.option.dist == "no":
        config.option.numprocesses, config.option.maxprocesses = "auto", config.option.maxprocesses or 8


def pytest_configure(config):
    if IN_WORKER: return
    if forks.CAN_FORK:
        config.add_cleanup(forks.Server(forks.ENVIRONMENT).stop)
    config.add_cleanup(lambda: shutil.rmtree(SESSION, ignore_errors=True))


def group(nodeid):
    "Tests with the same group run in one process: a file's, but each notebook by itself."
    name = nodeid.split("::")[0].rpartition("/")[2].removesuffix(".py")
    return nodeid if name == "test_notebooks" else TOGETHER.get(name, name)


def pytest_collection_finish():
    gc.freeze()  # what all these imports made stays
    gc.enable()


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Tests go to processes by group, in the order of collection."
    from xdist.scheduler import LoadScopeScheduling
    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group
    return scheduler


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium; without one the tests that need it are skipped, except in CI."
    from playwright.sync_api import sync_playwright
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium and not os.environ.get("CI"): pytest.skip("there is no Chromium on this machine")
    assert chromium, "CI needs Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
