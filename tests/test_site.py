"The documentation site, built and opened in a browser that sees only this machine."
import functools
import http.server
import re
import sys
import threading
from pathlib import Path

import forks
import pytest
from helpers import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import check_site


# What `python tools/build_docs.py --strict` does, in one process: each further one would import everything again.
BUILD = """
import sys
sys.path.insert(0, "tools")
import build_docs
build_docs.process.__defaults__ = (0,)
sys.argv = ["build_docs.py", "--strict"]
sys.exit(build_docs.main())
"""


@pytest.fixture(scope="session")
def site():
    done = forks.run([sys.executable, "-c", BUILD], ROOT, ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "_docs"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments): pass


def serve(folder):
    "A web server for a folder on loopback; returns it and its address."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


def open_page(browser, address, **options):
    "A page, and the list in which its errors and its requests to other machines are collected."
    page, problems = browser.new_page(**options), []
    page.on("console", lambda message: problems.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("request", lambda request: problems.append(f"leaves the machine: {request.url}")
            if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")) else None)
    page.on("response", lambda answer: problems.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
    page.goto(address, wait_until="load")
    page.wait_for_timeout(300)
    return page, problems


@pytest.fixture(scope="session")
def address(site):
    server, address = serve(site)
    yield address
    server.shutdown()


def test_the_site_is_sound(site):
    assert check_site.check(site, check_site.public_symbols()) == []


def test_first_page(browser, address):
    page, problems = open_page(browser, address + "/index.html")
    assert page.locator("h1").first.inner_text() == "dinov3_nb"
    figure = page.locator("main img[src*='figure'], main .cell-output-display img, main img[src^='data:']").first
    figure.scroll_into_view_if_needed()
    assert figure.is_visible() and figure.evaluate("e => e.complete && e.naturalWidth") > 100
    assert problems == []


def test_search_finds_the_classifier(browser, address):
    page, problems = open_page(browser, address + "/index.html")
    page.locator("#quarto-search input").fill("DinoV3Linear")
    hit = page.locator(".smalldocs-search-results a[href*='model.html']").first
    hit.wait_for(state="visible", timeout=10_000)
    hit.click()
    page.wait_for_url("**/model.html*")
    assert page.locator("h3#dinov3linear, h3#DinoV3Linear").count() == 1
    assert problems == []


def test_dark_mode_toggles(browser, address):
    page, problems = open_page(browser, address + "/model.html", color_scheme="light")
    background = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = background()
    page.locator(".quarto-color-scheme-toggle").first.click()
    page.wait_for_timeout(300)
    assert sum(map(int, re.findall(r"\d+", background())[:3])) < sum(map(int, re.findall(r"\d+", light)[:3])) - 300
    assert problems == []


SQUEEZED = """[...document.querySelectorAll('main td')].filter(e => e.innerText.length > 12 && e.clientWidth < 80)
    .map(e => e.innerText.slice(0, 30))"""


@pytest.fixture(scope="session")
def every_page(browser, address, site):
    "Each page, opened once and looked at in two widths: {width: [(name, wider than the window, squeezed cells)]}, and problems."
    page, problems = open_page(browser, address + "/index.html", viewport={"width": 1280, "height": 900})
    found, bad = {1280: [], 390: []}, []
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        page.goto(f"{address}/{name}", wait_until="load")
        for width in found:
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(150)
            found[width].append((name, page.evaluate("document.documentElement.scrollWidth") > width + 1, page.evaluate(SQUEEZED)))
        bad += [(name, problem) for problem in problems]
        problems.clear()
    page.close()
    return found, bad


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_window(every_page, width):
    "Wide tables and long code scroll inside themselves, and no table column is squeezed to a few letters."
    found, problems = every_page
    assert len(found[width]) > 20 and problems == []
    assert [name for name, wide, _ in found[width] if wide] == [] == [(name, cells) for name, _, cells in found[width] if cells]


def test_planted_faults_are_noticed(browser, tmp_path):
    (tmp_path / "index.html").write_text("<title>t</title><img src='gone.png'><img src='http://elsewhere.invalid/x.png'><script>throw Error('planted')</script>"
                                        "<main><table style='width: 120px'><tr><td style='width: 40px'>some words in a narrow column<td>b</table></main>")
    server, address = serve(tmp_path)
    page, problems = open_page(browser, address + "/index.html")
    assert page.evaluate(SQUEEZED) == ["some words in a narrow column"]
    server.shutdown()
    for part in ("404", "leaves the machine: http://elsewhere.invalid", "error: planted"):
        assert any(part in problem for problem in problems), (part, problems)
