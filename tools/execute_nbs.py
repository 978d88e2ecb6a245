"""Run notebooks in place and keep their outputs: `python tools/execute_nbs.py nbs/02_data.ipynb ...`

Cells that `nbdev_test` would skip keep what they show. Progress bars are off, and figures are stored small.
"""
import base64
import io
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in stored outputs
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DINOV3_NB_CACHE", tempfile.mkdtemp())  # outputs do not depend on earlier runs

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor
from PIL import Image, ImageChops, ImageStat


def faithful(image, reduced, tolerance=0.4):
    "Does a palette image look like the original? The mean difference of a channel, of 255; a plot loses less, a gradient more."
    return max(ImageStat.Stat(ImageChops.difference(image, reduced.convert("RGB"))).mean) <= tolerance


def candidates(image):
    "Ways to store an image, the smallest first: few colours where that changes nothing, all of them, 256 mixed by dithering."
    for colours in (64, 128, 256):
        reduced = image.quantize(colours, dither=Image.Dither.NONE)
        if faithful(image, reduced): yield reduced
    yield image
    yield image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG)


def small_png(image, limit=50_000):
    "A PNG within the limit, in bytes: at most 900 pixels wide, and narrower only if nothing else helps."
    for width in (900, 800, 700, 600, 500, 400, 300):
        thumbnail = image.copy()
        thumbnail.thumbnail((width, 2000), Image.Resampling.LANCZOS)
        for candidate in candidates(thumbnail):
            small = io.BytesIO()
            candidate.save(small, "png", optimize=True)
            if small.tell() <= limit: return small.getvalue()
    raise ValueError(f"no way to store a figure of {image.size} pixels in {limit:,} bytes")


def shrink_figures(notebook):
    "Store each PNG small."
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" not in data: continue
            text = data["image/png"]
            image = Image.open(io.BytesIO(base64.b64decode(text if isinstance(text, str) else "".join(text))))
            data["image/png"] = base64.b64encode(small_png(image.convert("RGB"))).decode()


def execute(path, flags=()):
    "Run one notebook top to bottom and save it, cleaned."
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # its line depends on the machine
    path = Path(path).absolute()
    skipped = set(get_config().tst_flags.split()) - set(flags)
    notebook = read_nb(path)
    directives = {c.idx_: c.directives_ for c in NBProcessor(path).nb.cells if c.cell_type == "code"}

    def left_out(cell):
        own = directives.get(cell.idx_, {}) or {}
        evaluates = own.get("eval:", [""])[0].lower() != "false"
        return cell.cell_type != "code" or "nbdev_export(" in cell.source or not evaluates or bool(skipped & own.keys())

    for cell in notebook.cells:
        if cell.cell_type == "code" and not left_out(cell): cell.outputs = []  # a cell that shows nothing now shows nothing
    shell, folder = CaptureShell(path), os.getcwd()
    os.chdir(path.parent)
    try: shell.run_all(notebook, exc_stop=True, preproc=left_out)
    finally: os.chdir(folder)
    shrink_figures(notebook)
    clean_nb(notebook)
    write_nb(notebook, path)


if __name__ == "__main__":
    names = [a for a in sys.argv[1:] if not a.startswith("--")]
    flags = [a for a in sys.argv[1:] if a.startswith("--flag=")]
    if len(names) == 1: print(names[0], flush=True); execute(names[0], [flag.removeprefix("--flag=") for flag in flags])
    else:  # a process each: what one notebook sets, the next must not inherit
        for name in names: subprocess.run([sys.executable, __file__, *flags, name], check=True)
