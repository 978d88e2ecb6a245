"""How a page of the documentation shows a definition: heading with anchor and link to the file, then its source, open.

`settings.ini` names these processors in `procs`, so both ways to build the site use them: `nbdev_docs` (Quarto) and
`python tools/build_docs.py`. In `skip_procs` it names what they replace: nbdev would run each notebook's imports
and exported cells to print every signature a second time, above its source. This file lies beside the package so
that an editable install finds it.
"""
import ast
import re

import _dinov3_nb_command  # nbdev imports the package: this leaves PyTorch out
from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.processors import Processor

LONGEST_OPEN = 40  # lines of source that a page shows unfolded


def exports(cell):
    "Is this the source of something exported, and shown?"
    return cell.cell_type == "code" and "exports" in (getattr(cell, "directives_", None) or {})


def source_link(module, name):
    "Address of a definition's first line in the repository."
    config = get_config()
    _, file, address = NbdevLookup()[f"{config.lib_name}.{module}.{name}"]
    tree = ast.parse((config.lib_path.parent / file).read_text(encoding="utf-8"))
    line = next(node.lineno for node in tree.body if getattr(node, "name", None) == name)
    return f"{address}#L{line}"


def definitions(source):
    "Name and first line of what a source defines, in order; a decorator or a comment right above belongs to it."
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        if not hasattr(node, "name"): continue
        first = min([node.lineno, *[decorator.lineno for decorator in node.decorator_list]]) - 1
        while first and lines[first - 1].startswith("#") and not lines[first - 1].startswith("#|"): first -= 1
        found.append((node.name, first))
    return found


def pieces(source):
    "The parts of a source, each with one public definition in it, if there is any."
    lines, cuts = source.splitlines(), [first for name, first in definitions(source) if not name.startswith("_")][1:]
    return ["\n".join(lines[a:b]).strip("\n") for a, b in zip([0, *cuts], [*cuts, len(lines)])]


def anchors(names):
    "Helpers with an underscore get no heading, but nbdev makes links of their names in the prose: those lead here."
    return mk_cell("\n".join(f'<div id="{name.lower()}"></div>' for name in names), cell_type="markdown")


class headings(Processor):
    "Write headings with anchor and link, and no signature, in front of exported sources; nbdev's own come behind them."
    def __init__(self, nb):  # comes before nbdev drops the cells with these directives
        super().__init__(nb)
        found = [cell.directives_["default_exp"][0] for cell in nb.cells if "default_exp" in (cell.directives_ or {})]
        self.module = found[0] if found else None

    def parts(self, cell):
        "An exported cell as a page shows it: for each public definition a heading and its source."
        module = (cell.directives_["exports"] or [self.module])[0]
        for source in pieces(cell.source):
            names = [name for name, _ in definitions(source)]
            for name in names:
                if name.startswith("_"): continue
                link = f'[source]({source_link(module, name)}){{.source-link target="_blank"}}'
                yield mk_cell(f"{link}\n\n### {name}", cell_type="markdown")
            helpers = [name for name in names if name.startswith("_")]
            if helpers: yield anchors(helpers)
            part = mk_cell(source)
            part.metadata, part.directives_ = cell.metadata, cell.directives_
            yield part
        part.outputs = cell.get("outputs", [])

    def begin(self):
        self.nb.cells = [part for cell in self.nb.cells if not getattr(cell, "has_sd", False)
                         for part in (self.parts(cell) if exports(cell) else [cell])]


def fold_when_long(cell):
    "Source over 40 lines is folded; shorter source is not."
    if not exports(cell): return
    lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
    if len(lines) <= LONGEST_OPEN: return
    names = ", ".join(name for name, _ in definitions(cell.source)) or "Source"
    cell.source = f'#| code-fold: true\n#| code-summary: "{names}, {len(lines)} lines"\n{cell.source}'


def no_links_in_code(cell):
    "Take back the links that nbdev makes inside of code with two backticks, where they would be printed as they are."
    def back(match): return re.sub(r"\[(`[^`]+`)\]\(https?:[^)]*\)", r"\1", match[0])
    def mended(text): return re.sub(r"(?<!`)``(?!`).+?(?<!`)``(?!`)", back, text)
    if cell.cell_type == "markdown": cell.source = mended(cell.source)
    for output in cell.get("outputs", []):
        if "text/markdown" in output.get("data", {}):
            lines = output["data"]["text/markdown"]
            output["data"]["text/markdown"] = mended(lines) if isinstance(lines, str) else [mended(line) for line in lines]
