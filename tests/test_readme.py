"README.md is what nbs/index.ipynb says, and its two commands are the ones CI runs."
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_readme_is_not_stale():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_stand_in_the_readme():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && dinov3-nb train --dataset digits --model_name tiny" in lines
    assert "pip install -e '.[dev]' && pytest" in lines
