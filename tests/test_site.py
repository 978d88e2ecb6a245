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
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

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
    assert check_site.check(site, check_site.public_symbols(), notebooks=ROOT / "nbs") == []


def processed(tmp_path, *cells):
    "The cells that both Quarto and smalldocs get of a notebook with these."
    from execnb.nbio import dict2nb, mk_cell, new_nb
    from nbdev.processors import FilterDefaults
    made = new_nb([mk_cell("# Title\n\n> Summary.", "markdown"), *[mk_cell(source) for source in cells]])
    made.path_ = tmp_path / "00_made.ipynb"
    FilterDefaults()(made)
    return [cell.source for cell in made.cells]


def test_headings_stand_above_their_source(tmp_path, monkeypatch):
    "In the order of the definitions, once each, without a signature; source over 40 lines is folded, and only that."
    import dinov3_nb  # first, or its names would be missing in the tests that follow in this process
    import _dinov3_nb_docs
    monkeypatch.setattr(_dinov3_nb_docs, "source_link", lambda module, name: f"https://source.example/{module}#{name}")
    long = "def long():\n" + "    pass\n" * 40
    found = processed(tmp_path, "#| default_exp made", "#| exports\ndef one(): pass\ndef _helper(): pass\n\n# on two\n@dataclass\nclass Two: pass",
                      "'an example'", f"#| exports core\n#| heart\n{long}", "#| exports\n" + long.replace("long", "short", 1).replace("    pass\n", "", 1))
    start = next(i for i, source in enumerate(found) if source.endswith("### one"))
    link = lambda module, name: f'[source](https://source.example/{module}#{name}){{.source-link target="_blank"}}\n\n### {name}'
    assert found[start:start + 4] == [link("made", "one"), '<div id="_helper"></div>', "def one(): pass\ndef _helper(): pass", link("made", "Two")]
    assert found[start + 4:start + 7] == ["# on two\n@dataclass\nclass Two: pass", "'an example'", link("core", "long")]
    assert found[start + 7].startswith('#| code-fold: true\n#| code-summary: "long, 41 lines"\ndef long():')
    assert found[start + 8] == link("made", "short") and found[start + 9].startswith("def short") and len(found) == start + 10


def test_code_with_two_backticks_has_no_links(tmp_path):
    "nbdev would write `[name](address)` into it."
    from execnb.nbio import mk_cell
    import dinov3_nb
    import _dinov3_nb_docs
    cell = mk_cell("See [`fit`](https://a.example/#fit) and ``say [`fit`](https://a.example/#fit) loud``.", "markdown")
    _dinov3_nb_docs.no_links_in_code(cell)
    assert cell.source == "See [`fit`](https://a.example/#fit) and ``say `fit` loud``."


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
    assert page.locator("#dinov3linear").count() == 1
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


# The longest line of each block of code that scrolls sideways, folded ones unfolded.
SCROLLING = """(() => { document.querySelectorAll('main details').forEach(e => e.open = true);
    return [...document.querySelectorAll('main pre')].filter(e => [e, e.parentElement].some(b => b.scrollWidth > b.clientWidth + 1))
        .map(e => e.innerText.split('\\n').reduce((a, b) => b.length > a.length ? b : a)) })()"""


@pytest.fixture(scope="session")
def every_page(browser, address, site):
    "Each page, opened once and looked at in two widths: {width: [(name, wider than the window, squeezed cells, wide lines)]}, and problems."
    page, problems = open_page(browser, address + "/index.html", viewport={"width": 1300, "height": 900})
    found, bad = {1300: [], 390: []}, []
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        page.goto(f"{address}/{name}", wait_until="load")
        for width in found:
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(150)
            wide = page.evaluate("document.documentElement.scrollWidth") > width + 1
            found[width].append((name, wide, page.evaluate(SQUEEZED), page.evaluate(SCROLLING)))
        bad += [(name, problem) for problem in problems]
        problems.clear()
    page.close()
    return found, bad


@pytest.mark.parametrize("width", [390, 1300])
def test_no_page_is_wider_than_the_window(every_page, width):
    "Wide tables and long code scroll inside themselves, and no table column is squeezed to a few letters."
    found, problems = every_page
    assert len(found[width]) > 20 and problems == []
    assert [name for name, wide, *_ in found[width] if wide] == [] == [(name, cells) for name, _, cells, _ in found[width] if cells]


def test_no_code_scrolls_sideways(every_page):
    "100 characters fit in a window of 1300 pixels. (On a phone, code scrolls inside its block.)"
    found, _ = every_page
    assert [f"{name}: {line}" for name, *_, lines in found[1300] for line in lines] == []


ONE_BLOCK = """line => { const pre = document.querySelector('main pre.cell-code');
    document.querySelectorAll('main pre').forEach(e => e === pre || e.remove()); pre.querySelector('code').textContent = 'a = 1\\n' + line }"""


@pytest.mark.parametrize("folded", [False, True])
def test_a_planted_wide_line_is_found(browser, address, folded):
    "On a page of ours, at its width, with its style sheet: 100 characters pass, 110 do not, also where they are folded."
    page, _ = open_page(browser, address + "/model.html", viewport={"width": 1300, "height": 900})
    for line, scrolling in (("b" * 100, []), ("c" * 110, ["c" * 110])):
        page.evaluate(ONE_BLOCK, line)
        if folded: page.evaluate("""(() => { const block = document.querySelector('main pre').closest('.cell'), fold = document.createElement('details');
            block.replaceWith(fold); fold.append(block) })()""")
        assert page.evaluate(SCROLLING) == scrolling


def test_planted_faults_are_noticed(browser, tmp_path):
    (tmp_path / "index.html").write_text("<title>t</title><img src='gone.png'><img src='http://elsewhere.invalid/x.png'><script>throw Error('planted')</script>"
                                        "<main><table style='width: 120px'><tr><td style='width: 40px'>some words in a narrow column<td>b</table></main>")
    server, address = serve(tmp_path)
    page, problems = open_page(browser, address + "/index.html")
    assert page.evaluate(SQUEEZED) == ["some words in a narrow column"]
    server.shutdown()
    for part in ("404", "leaves the machine: http://elsewhere.invalid", "error: planted"):
        assert any(part in problem for problem in problems), (part, problems)
