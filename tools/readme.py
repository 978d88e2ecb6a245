"""Write README.md from nbs/index.ipynb: `python tools/readme.py`, or `--check` to fail when it is out of date.

This is what `nbdev_readme` does, with nbconvert in place of Quarto.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _dinov3_nb_command  # nbdev imports the package: this leaves PyTorch out
import nbformat
import yaml
from execnb.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.processors import FilterDefaults

FIGURES = "index_files"  # below nbs/


def markdown(config):
    "The README's text and its figures, {relative path: bytes}."
    notebook = read_nb(config.nbs_path / config.readme_nb)
    FilterDefaults().nb_proc(notebook).process()
    notebook = nbformat.reads(nb2str(notebook), 4)
    front = yaml.safe_load(notebook.cells.pop(0).source.strip().strip("-"))
    notebook.metadata["language_info"] = {"name": "python"}
    alternatives = []  # what figures say to those who do not see them
    for cell in notebook.cells:
        if cell.cell_type != "code": continue
        alternatives += re.findall(r"^#\| *fig-alt: *(.+)$", cell.source, flags=re.M)
        shown = not re.search(r"^#\| *echo: *false", cell.source, flags=re.M)
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M) if shown else ""
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    text, resources = exporter.from_notebook_node(notebook, resources={"output_files_dir": FIGURES})
    text = re.sub(r"^```python\n\s*```\n", "", text, flags=re.M)
    assert text.count("![png]") == len(alternatives), "each figure of the README needs a line `#| fig-alt: ...` in its cell"
    for alternative in alternatives: text = re.sub(r"\n +\n!\[png\](\(.*?\))\n +\n", rf"\n\n![{alternative}]\1\n\n", text, count=1)
    text = re.sub(r"<!-- WARNING: THIS FILE.*?-->\n*", "", text)
    text = re.sub(r"(\]\()(?!https?:|#)([^)]+)", rf"\1{config.nbs_path.name}/\2", text)
    head = f"# {front['title']}\n\n<!-- Written by tools/readme.py from nbs/index.ipynb: edit that. -->\n\n{front.get('description', '')}\n\n"
    return re.sub(r"\n{3,}", "\n\n", head + text).strip() + "\n", resources["outputs"]


def main():
    config = get_config()
    text, figures = markdown(config)
    wanted = {config.config_path / "README.md": text.encode()} | {config.nbs_path / k: v for k, v in figures.items()}
    if "--check" in sys.argv:
        stale = [str(p.relative_to(config.config_path)) for p, b in wanted.items() if not p.exists() or p.read_bytes() != b]
        return f"out of date: {', '.join(stale)}; run python tools/readme.py" if stale else 0
    for path, content in wanted.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
