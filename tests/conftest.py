"Options and environment shared by all tests."
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")        # nothing here may need the Hub
os.environ["DINOV3_NB_CACHE"] = tempfile.mkdtemp()  # kept features of tests are not the user's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")     # for networks this small, threads mostly wait for each other


def pytest_addoption(parser):
    parser.addoption("--nb-flags", default="", help='nbdev test flags to run as well, such as "slow gpu"')


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
