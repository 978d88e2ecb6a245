"The report's page: whatever names and values come, it is one sound file that asks nobody for anything."
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from dinov3_nb.core import UserError
from dinov3_nb.page import Album, as_data_uri, as_svg, render_page, write_page
from dinov3_nb.sections import SECTIONS

NAMES = [str(c) for c in range(10)]
HOSTILE = ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "' onmouseover='alert(1)", "</script><script>alert(1)//",
           "{{ 7*7 }}{% raw %}", "x" * 300, "\u202eback to front \u0627\u0644\u0639\u0631\u0628\u064a\u0629", "\U0001f98a" * 5, "two\nlines\x00\x1b", ""]
VOID = {"meta", "link", "img", "br", "input", "hr"}


def make_album(num_images, names=None):
    digits, album, random = load_digits(), Album(), np.random.default_rng(0)
    for i in range(num_images):
        label = int(digits.target[i % 1797])
        said = int(random.integers(10)) if random.random() < 0.08 else label
        picture = Image.fromarray((digits.images[i % 1797] * 15.9).astype("uint8"))
        name = names[i % len(names)] if names else f"validation/{label}/img_{i:05}.png"
        album.add(i, picture, name, label, said, float(random.uniform(0.4, 1)))
    return album


def make_figure(title="a figure"):
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axis = figure.subplots()
    x = np.linspace(0, 1, 11)
    axis.bar(x, x ** 1.3, width=0.08, color="tab:blue", edgecolor="white")
    axis.plot(x, x, color="black", linestyle=":", label="as sure as right")
    axis.set(xlabel="how sure", ylabel="share right", title=title)
    axis.legend()
    return as_svg(figure)


def make_merit(pictures, names):
    many = len(names)
    confusion, cells = np.zeros((many, many), int), {}
    for i, one in enumerate(pictures):
        confusion[one["label"], one["said"]] += 1
        cells.setdefault(f"{one['label']},{one['said']}", []).append(i)
    left_out = {key: len(found) - 8 for key, found in cells.items() if len(found) > 8}
    pairs = sorted(((confusion[t, s], t, s) for t in range(many) for s in range(many) if t != s and confusion[t, s]), reverse=True)[:6]
    right, total = int(confusion.trace()), int(confusion.sum())
    classes = [{"number": c, "name": names[c], "precision": 0.9, "recall": 0.5 + c / many / 2, "f1": math.nan if c == 1 else 0.6 + c / many / 3,
                "support": confusion[c].sum()} for c in range(many)]
    order = list(range(min(many, 40)))
    return {"accuracy": right / total, "low": 0.87, "high": 0.96, "right": right, "total": total, "macro_f1": 0.91, "balanced_accuracy": 0.92,
            "top5": 0.996, "loss": 0.21, "classes": classes, "order": order, "confusion": confusion[np.ix_(order, order)],
            "cells": {key: found[:8] for key, found in cells.items()}, "left_out": left_out,
            "pairs": [{"true": t, "said": s, "count": n} for n, t, s in pairs],
            "note": None if many <= 40 else "The 40 classes that are confused most are shown."}


def make_mistakes(pictures):
    random, found = np.random.default_rng(1), []
    for i, one in enumerate(pictures):
        if one["label"] == one["said"]: continue
        kin = [j for j, other in enumerate(pictures) if other["label"] in (one["label"], one["said"], 3)]
        near = [{"picture": int(j), "label": pictures[j]["label"], "similarity": 0.99 - k / 40} for k, j in enumerate(random.choice(kin, 5))]
        found.append({"picture": i, "true": one["label"], "said": one["said"], "sure": one["sure"], "neighbours": near})
    return {"knew": found[:5], "nobody": found[5:8], "total": len(found), "shown": len(found[:8])}


def make_points(pictures, num_points, many):
    random, points = np.random.default_rng(2), []
    centres = random.uniform(0.12, 0.88, (many, 2))
    for i in range(num_points):
        one = pictures[i % len(pictures)]
        x, y = np.clip(centres[one["label"]] + random.normal(0, 0.035, 2), 0, 1)
        scored = i < len(pictures)
        points.append({"x": x, "y": y, "label": one["label"], "said": one["said"] if scored else -1, "wrong": scored and one["said"] != one["label"],
                       "picture": i if scored else None, "name": f"train/{i}.png", "split": "validation" if scored else "train"})
    return points


def make_data(num_images=200, names=NAMES, file_names=None, num_points=600):
    "A report in which every section is filled in."
    pictures = make_album(num_images, file_names).pictures
    mistakes = make_mistakes(pictures)
    first = (mistakes["knew"] or [{"picture": 0, "neighbours": []}])[0]
    doubt = [{"picture": one["picture"], "split": "train", "label": one["true"], "suggested": one["said"], "doubt": 0.99 - k / 10,
              "neighbours": one["neighbours"]} for k, one in enumerate(mistakes["knew"][:4])]
    groups = [{"kind": kind, "pictures": [k, k + 1], "splits": ["train", "validation"], "labels": [pictures[k]["label"], pictures[k + 1]["label"]],
               "similarity": 1 - k / 1000, "labels_differ": k == 2, "leak": k > 0} for k, kind in enumerate(["exact", "near", "near"]) if num_images > 4]
    tile = as_data_uri(Image.fromarray((np.random.default_rng(0).random((16, 16, 3)) * 255).astype("uint8")).resize((160, 160)))
    tiles = [{"title": title, "src": tile, "caption": caption} for title, caption in (
        ("What belongs together", "patches with like features have like colours"), ("Attention", "where the class token looks"),
        ("Evidence", "red speaks for the class, blue against it"))]
    return {
        "title": "What digits-tiny has learned", "class_names": names, "pictures": pictures,
        "facts": [("Model", "tiny, linear head"), ("Dataset", "digits"), ("Images", "1,437 training, 360 validation"),
                  ("Made on", "26 November 2026"), ("Version", "dinov3_nb 0.9")],
        "notes": ["These figures are invented, and the page is a test."],
        "merit": make_merit(pictures, names), "mistakes": mistakes,
        "doubtful": {"rows": doubt, "asked": 1000, "total": 1437, "text": "72 labels have a doubt above one half.", "file": "labels.csv"},
        "duplicates": {"groups": groups, "counts": [{"where": "inside train", "kind": "exact", "count": 1},
                                                    {"where": "train and validation", "kind": "near", "count": 2}],
                       "text": "Near is a cosine above 0.995.", "figure": make_figure("similarity of the nearest")},
        "sure": {"text": ["The temperature gained 0.01 nats an image."], "ece_before": 0.034, "ece_after": 0.012, "temperature": 1.32, "kept": True,
                 "reliability": make_figure("reliability"), "coverage": make_figure("coverage"),
                 "sets": {"level": 0.9, "threshold": 0.21, "covered": 0.912, "low": 0.878, "high": 0.937, "mean_size": 1.14, "single": 0.88,
                          "empty": 0, "sizes": [(1, 317), (2, 35), (3, 8)]}},
        "familiar": {"text": "5 % of the training images are farther away themselves.", "threshold": 0.113, "share": 0.942,
                     "figure": make_figure("distance"), "least": [{"picture": k, "distance": 0.4 - k / 50} for k in range(min(8, num_images))]},
        "map": {"points": make_points(pictures, num_points, len(names)), "text": "t-SNE of 600 of 1,797 images."},
        "looks": {"text": ["The head is linear on the mean token."], "rows": [
            {"picture": first["picture"], "true": 3, "said": 5, "tiles": tiles}] * 2},
    }


class Structure(HTMLParser):
    "Checks that elements are closed in order, and collects what is there."
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), attributes
        if tag not in VOID: self.stack.append(tag)

    def handle_startendtag(self, tag, attributes): self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID: assert self.stack.pop() == tag, (tag, self.stack)

    def handle_data(self, text): self.texts.append(text)

    def all(self, tag): return [attributes for name, attributes in self.elements if name == tag]


def check_structure(page):
    found = Structure(page)
    known = {"html", "head", "meta", "title", "link", "style", "body", "div", "nav", "a", "main", "header", "h1", "h2", "h3", "p", "small", "i", "b",
             "span", "dl", "dt", "dd", "ul", "li", "noscript", "section", "table", "thead", "tbody", "tr", "th", "td", "button", "bdi", "figure",
             "figcaption", "img", "strong", "br", "code", "svg", "g", "path", "defs", "use", "clippath", "rect", "text", "tspan", "circle", "article",
             "footer", "script"}
    assert {tag for tag, _ in found.elements} <= known, {tag for tag, _ in found.elements} - known
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href"):
            if name in attributes and tag != "use": assert attributes[name].startswith(("#", "data:")), attributes
    assert [one.get("type") for one in found.all("script")] == ["application/json", None]
    assert all(one.get("alt") is not None for one in found.all("img"))
    names = [one["id"] for _, one in found.elements if "id" in one]
    drawn = [name for name in names if re.fullmatch(r"f[0-9a-f]{8}\w+", name)]
    own = [name for name in names if name not in drawn]
    assert len(set(own)) == len(own)
    for link in found.all("a"): assert link["href"][1:] in names
    assert not [one for one in found.all("button") if one.get("aria-controls") not in (None, "cell")]
    text = page[page.index('id="data">') + 10:]
    return found, json.loads(text[:text.index("</script>")])


CASES = {
    "full": {}, "hostile": dict(names=HOSTILE, file_names=HOSTILE), "two classes": dict(num_images=40, names=["cat", "dog"], num_points=40),
    "one image": dict(num_images=1, num_points=1), "a hundred classes": dict(names=[f"class number {c}" for c in range(100)])}


def build(case):
    values = CASES[case]
    many = len(values.get("names", NAMES))
    if many == 2: return fold(make_data(**{**values, "names": NAMES}), values["names"])
    return make_data(**values)


def fold(data, names):
    "The same with classes odd and even."
    def change(value):
        if isinstance(value, dict):
            return {key: item % 2 if key in ("label", "said", "true", "suggested") and item >= 0 else change(item) for key, item in value.items()}
        if isinstance(value, list): return [change(item) for item in value]
        return value
    folded = change(data)
    return folded | {"class_names": names, "merit": make_merit(folded["pictures"], names)}


@pytest.mark.parametrize("case", CASES)
def test_a_page_is_sound(case):
    data = build(case)
    found, shared = check_structure(render_page(data))
    assert len(shared["pictures"]) == len(data["pictures"])
    assert {one["id"] for one in found.all("section")} == set(SECTIONS)
    numbers = [int(one["data-picture"]) for one in found.all("img") if "data-picture" in one]
    assert numbers and max(numbers) < len(shared["pictures"])
    cells = {one["data-cell"] for one in found.all("button") if "data-cell" in one}
    assert set(shared["cells"]) >= {cell for cell in cells if cell in data["merit"]["cells"]} and cells
    assert len(found.all("circle")) == len(shared["points"])


def test_hostile_names_stay_names():
    found, shared = check_structure(render_page(make_data(names=HOSTILE, file_names=HOSTILE) | {"title": HOSTILE[3], "notes": HOSTILE[:5]}))
    text = "".join(found.texts)
    for name in HOSTILE[:5]: assert name in text
    assert shared["classes"][:5] == HOSTILE[:5] and shared["classes"][8] == "two\nlines\ufffd\ufffd"
    assert max(len(part) for part in found.texts if "xxxx" in part and "{" not in part) <= 200
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


def test_bytes_that_are_no_text_can_be_written(tmp_path):
    path = write_page(make_data(40, file_names=[os.fsdecode(b"caf\xe9.jpg")]), tmp_path / "new" / "report.html")
    assert "caf\ufffd.jpg" in path.read_text(encoding="utf-8")
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]


def test_an_old_page_stays_if_the_new_one_cannot_be_made(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    def full(*names): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="could not be written"): write_page(make_data(5), path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_where_nothing_was_found_the_page_says_so():
    data = make_data(30)
    for one in data["pictures"]: one["said"] = one["label"]
    data |= {"merit": make_merit(data["pictures"], NAMES), "mistakes": make_mistakes(data["pictures"])}
    data["doubtful"] |= {"rows": [], "file": None}
    data["duplicates"] |= {"groups": [], "counts": [], "figure": None}
    text = " ".join("".join(check_structure(render_page(data))[0].texts).split())
    for sentence in ("There is no mistake: every image was named rightly.", "No label looks doubtful.", "No picture was found twice.",
                     "No class was taken for another."):
        assert sentence in text


def test_every_section_may_be_missing():
    reason = "There are no <training> images."
    data = make_data(5) | {name: {"missing": reason} for name in SECTIONS}
    found, _ = check_structure(render_page(data))
    assert "".join(found.texts).count(reason) == len(SECTIONS) + 1
    bare = check_structure(render_page({"title": "t", "facts": [], "notes": [], "class_names": [], "pictures": []}))[0]
    assert "".join(bare.texts).count("This part was not made.") == len(SECTIONS) + 1


def test_a_thousand_pictures_and_their_neighbours_are_below_5_mb():
    random, album = np.random.default_rng(0), Album()
    for i in range(1500):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
        album.add(i, coarse, f"photos/{i}.jpg", i % 10, i % 10, 0.5)
    page = render_page(make_data(num_points=3000) | {"pictures": album.pictures})
    assert 1e6 < len(page.encode()) < 5e6


def test_a_figure_is_a_part_of_the_page():
    first, second = make_figure("one"), make_figure("<b>&")
    for part in (first, second):
        assert part.startswith("<svg ") and "<?xml" not in part and "<style" not in part and "#000000" not in part
        Structure(part)
        used = set(re.findall(r'(?:url\(|href=")#(\w+)', part))
        assert used == set(re.findall(r' id="(\w+)"', part)) and used
    assert "&lt;b&gt;&amp;" in second
    assert not set(re.findall(r' id="(\w+)"', first)) & set(re.findall(r' id="(\w+)"', second))


def test_an_album_has_each_picture_once():
    album = Album(side=32)
    assert [album.add(key, None, str(key), 0, -1, None) for key in ("a", ("a", 1), "a")] == [0, 1, 0]
    assert album.add("photo", Image.new("RGB", (3000, 20)), "", -1, -1, None) == 2 and len(album.pictures) == 3
    assert album.pictures[0]["src"] == album.pictures[1]["src"] != album.pictures[2]["src"]


def visit(browser, path, width, mode):
    "The page in a browser, and all that went wrong or out."
    page, problems = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=mode, reduced_motion="reduce"), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() and not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    return page, problems


@pytest.mark.parametrize("case, width, mode", [
    *(("full", width, mode) for width in (1300, 390) for mode in ("light", "dark")),
    ("hostile", 1300, "dark"), ("hostile", 390, "light"), ("a hundred classes", 1300, "light"), ("a hundred classes", 390, "dark")])
def test_in_a_browser(case, width, mode, browser, tmp_path):
    path = write_page(build(case), tmp_path / "report.html")
    page, problems = visit(browser, path, width, mode)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth)")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", paper)[0]) > 128) == (mode == "light")
    check_cell(page)
    check_map(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not problems, problems
    page.close()


def check_cell(page):
    button, panel = page.locator(".confusion [data-cell]").first, page.locator("#cell")
    assert panel.is_hidden() and button.get_attribute("aria-expanded") == "false"
    button.focus()
    page.keyboard.press("Enter")
    assert panel.is_visible() and button.get_attribute("aria-expanded") == "true"
    assert panel.locator("img").count() > 0 and panel.locator("img").first.evaluate("image => image.naturalWidth") > 0
    page.keyboard.press("Escape")
    assert panel.is_hidden() and button.evaluate("button => button === document.activeElement")
    button.click()
    page.locator(".confusion [data-cell]").nth(1).click()
    assert panel.is_visible() and page.locator("[aria-expanded=true]").count() == 1
    panel.locator(".close").click()
    assert panel.is_hidden()


def check_map(page):
    circle, tip = page.locator(".map circle").first, page.locator("#tip")
    circle.focus()
    assert tip.is_visible() and tip.inner_text()
    first = tip.inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() != first or page.locator(".map circle").count() == 1
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.locator(".map svg").scroll_into_view_if_needed()
    box = circle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible()
    if page.locator(".legend button").count():
        page.locator(".legend button").first.click()
        assert page.locator(".map g.dim").count() > 0


def test_without_the_script_the_text_is_there(browser, tmp_path):
    path = write_page(build("full"), tmp_path / "report.html")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert "Without JavaScript this page has no pictures" in page.locator("noscript").inner_html()
    assert page.get_by_text("The neighbours knew").is_visible()
    context.close()
