"README.md is what nbs/index.ipynb says, and every line of its code does what it promises."
import os
import re
import shlex
import sys
from pathlib import Path

import forks
import pytest
from helpers import ENVIRONMENT, make_image_folder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```\s*$", re.M | re.S)
INSTALL_AND_TRAIN = "pip install -e . && "
INSTALL_AND_TEST = "pip install -e '.[dev]' && pytest"
CLONE = "git clone https://github.com/dinov3-nb/dinov3_nb && cd dinov3_nb"


def test_readme_is_not_stale():
    done = forks.run([sys.executable, "tools/readme.py", "--check"], ROOT, ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_stand_in_the_readme():
    lines = README.splitlines()
    assert "pip install -e . && dinov3-nb train --dataset digits --model_name tiny" in lines
    assert "pip install -e '.[dev]' && pytest" in lines


def expectation(line):
    "What to run for a line of a bash block and how it must end: 'works', 'refused' (Meta's weights or the network), or None to skip."
    if line in (CLONE, INSTALL_AND_TEST): return None, None  # needs the network; what CI does, and what is running now
    if line.startswith(f"{INSTALL_AND_TRAIN}dinov3-nb train "): line = line.removeprefix(INSTALL_AND_TRAIN)
    words = shlex.split(line, comments=True)
    if words[:1] != ["dinov3-nb"] or set(line) & set("|;&<>$`"): raise ValueError(f"no rule for this line: {line}")
    if words[1:2] == ["ladder"]: words += ["--epochs", "1"]  # of five, which take minutes
    own = "--model_name tiny" in line or "--checkpoint mine" in line
    if own: return words, "works"
    if words[1:2] == ["train"]: return words, "refused"
    raise ValueError(f"no rule for this line: {line}")


def run(words, folder):
    "One command in the folder, offline, with an empty model cache, and `dinov3-nb` from this environment."
    environment = {**ENVIRONMENT, "TRACKIO_DIR": str(folder / "trackio"), "CUDA_VISIBLE_DEVICES": "",
                   "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    return forks.run(words, folder, environment)


def run_blocks(text, folder):
    "Execute the code blocks of a README in a folder; what went wrong, as (line or language, explanation)."
    problems, python, bash = [], [], []
    for language, body in FENCE.findall(text):
        if language == "python": python.append(body)
        elif language == "bash": bash += [line for line in body.replace("\\\n", " ").splitlines() if line.strip()]
        else: problems.append((language, "a block that is neither python nor bash"))
    done = run([sys.executable, "-c", "\n".join(python)], folder)
    if done.returncode: problems.append(("python", done.stderr[-2000:]))
    for line in bash:
        try: words, wanted = expectation(line)
        except ValueError as error: problems.append((line, str(error))); continue
        if wanted is None: continue
        done = run(words, folder)
        said = done.stderr.splitlines()
        if wanted == "works" and done.returncode: problems.append((line, done.stderr[-2000:]))
        if wanted == "refused" and (done.returncode != 2 or len(said) != 1 or not said[0].startswith("dinov3-nb: ")):
            problems.append((line, f"exit code {done.returncode}: {done.stderr[-2000:]}"))
    return problems


@pytest.fixture
def folder(tmp_path):
    "What the README takes for granted: a picture, and a folder of images."
    from dinov3_nb.sources import load_digits_dataset
    load_digits_dataset()["validation"][0]["image"].save(tmp_path / "picture.png")
    make_image_folder(tmp_path / "path" / "to" / "folder")
    return tmp_path


def test_every_block_of_the_readme_runs(folder):
    blocks = FENCE.findall(README)
    assert {"python", "bash"} <= {language for language, _ in blocks} and README.count("\n```") == 2 * len(blocks)
    assert run_blocks(README, folder) == []
    assert (folder / "my_run" / "best.pt").exists() and (folder / "checkpoints_dinov3" / "best.pt").exists()


PLANTED = {
    "python that raises": "```python\nfrom dinov3_nb import no_such_name\n```\n",
    "a command that fails": "```bash\ndinov3-nb predict --checkpoint checkpoints_dinov3 picture.png\n```\n",  # nothing was trained
    "a flag that is gone": "```bash\ndinov3-nb probe --dataset digits --model_name tiny --no_such_flag\n```\n",
    "a line that nobody knows": "```bash\nmake everything\n```\n",
    "a line that does more": "```bash\ndinov3-nb train --dataset digits --model_name tiny; touch more\n```\n",
    "a block in another language": "```text\nhello\n```\n",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_runner_stops_a_planted_fault(fault, folder):
    assert len(run_blocks(PLANTED[fault], folder)) == 1
