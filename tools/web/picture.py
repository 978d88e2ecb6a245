"""Draws nbs/images/web_page.png: the page of 14_web in Chromium, with a 3 of the digits.

`python tools/web/picture.py FOLDER`, where FOLDER was written by `dinov3-nb export --format web` from a run on the digits.
"""
import functools
import http.server
import io
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright
from sklearn.datasets import load_digits

OUT = Path(__file__).resolve().parents[2] / "nbs" / "images" / "web_page.png"


def draw_digit(label):
    "The last picture of a digit, as a PNG file."
    digits, buffer = load_digits(), io.BytesIO()
    pixels = digits.images[np.flatnonzero(digits.target == label)[-1]]
    Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(buffer, "PNG")
    return {"name": f"{label}.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def main(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 560}, color_scheme="light")
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.set_input_files("#file", draw_digit(3))
        page.wait_for_selector("#answer:not([hidden])")
        page.wait_for_timeout(100)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        picture.quantize(128).save(OUT, optimize=True)
        browser.close()
    server.shutdown()
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__": main(sys.argv[1])
