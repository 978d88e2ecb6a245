"""How long a command takes to start, against the import of the three libraries that a prediction needs.

    python benchmarks/startup.py

Every measurement is a process of its own: the libraries' import first, then each command in turn, as often as
`--repeats` says. The checkpoint is that of a short run on the embedded pair, made for this and removed.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import command_line, describe_machine, write_json

LIBRARIES = "import torch, torchvision, transformers"
MAIN = "import sys; from _dinov3_nb_command import main; sys.exit(main())"  # what `dinov3-nb` runs
TRAIN = "train --dataset digits --model_name tiny --epochs 1 --no_tracking"
COMMANDS = {"predict, one picture": "predict --checkpoint checkpoints_dinov3 picture.png",
            "train, features kept before": f"{TRAIN} --overwrite",
            "models": "models", "features list": "features list"}


def seconds(code, words, folder):
    "Wall-clock seconds of a Python process."
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DINOV3_NB_CACHE": str(Path(folder) / "kept")}
    began = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code, *words.split()], cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode: raise SystemExit(f"{words or code} failed:\n{run.stderr[-3000:]}")
    return time.perf_counter() - began


def main():
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    from dinov3_nb.sources import load_digits_dataset
    found = {"libraries": [], **{name: [] for name in COMMANDS}}
    with tempfile.TemporaryDirectory() as folder:
        load_digits_dataset()["validation"][0]["image"].save(Path(folder) / "picture.png")
        seconds(MAIN, TRAIN, folder)
        for _ in range(given.repeats):
            found["libraries"].append(seconds(LIBRARIES, "", folder))
            for name, words in COMMANDS.items(): found[name].append(seconds(MAIN, words, folder))
    middle = {name: statistics.median(values) for name, values in found.items()}
    for name, value in middle.items(): print(f"{name:<28}{value:6.2f} s{value / middle['libraries']:7.2f} of the libraries' import")
    write_json(given.json, {"benchmark": "startup", "machine": describe_machine(), "arguments": {"repeats": given.repeats},
                            "seconds": found, "ratio": middle["predict, one picture"] / middle["libraries"]})
    return 0


if __name__ == "__main__": sys.exit(main())
