"What a command imports: a table needs no PyTorch, a prediction no pandas; and a program called dinov3-nb is a program like others."
import json
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT

HEAVY = {"torch", "torchvision", "transformers", "datasets", "accelerate", "bitsandbytes", "matplotlib", "sklearn", "scipy", "pandas", "pyarrow"}
LATER = {"datasets", "bitsandbytes", "matplotlib", "sklearn", "pandas", "pyarrow", "trackio"}  # torchvision and transformers bring the others
RUN = """
import json, sys
import _dinov3_nb_command
from dinov3_nb.cli import main
try: code = main(json.loads(sys.argv[1]))
except SystemExit as end: code = end.code  # a parser's own help ends like that
print("LOADED" + json.dumps(sorted(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def loaded_by(*arguments, cwd):
    "The modules that a command has imported by its end, in a process of its own; and what it printed."
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps([str(a) for a in arguments])], cwd=cwd, capture_output=True,
                          text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.split("LOADED")[1])), done.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("models",), ("features", "list", "--cache_dir", "none")], ids=lambda a: a[0])
def test_light_commands(arguments, tmp_path):
    loaded, printed = loaded_by(*arguments, cwd=tmp_path)
    assert not HEAVY & loaded, HEAVY & loaded
    assert printed


@pytest.mark.parametrize("command", ["train", "probe", "ladder"])
def test_the_help_of_a_command_with_many_flags(command, tmp_path):
    "transformers' parser turns fields into flags; nothing else of transformers is imported, and no PyTorch."
    loaded, printed = loaded_by(command, "--help", cwd=tmp_path)
    assert not (HEAVY - {"transformers"}) & loaded, HEAVY & loaded
    assert not {name for name in loaded if name.startswith("transformers.models")}
    assert "--learning_rate" in printed or command == "probe"


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_help_of_a_command_with_few_flags(command, tmp_path):
    loaded, printed = loaded_by(command, "--help", cwd=tmp_path)
    assert not HEAVY & loaded and "--checkpoint" in printed, HEAVY & loaded


def test_predict_imports_what_it_needs(tmp_path):
    from dinov3_nb import ModelArguments
    from dinov3_nb.backbone import load_processor
    from dinov3_nb.sources import load_digits_dataset
    from dinov3_nb.model import build_classifier, export_classifier
    load_digits_dataset()["validation"][0]["image"].save(tmp_path / "picture.png")
    model = build_classifier(ModelArguments(model_name="tiny"), list("0123456789"))
    export_classifier(model, load_processor("tiny"), tmp_path / "classifier")
    loaded, printed = loaded_by("predict", "--checkpoint", "classifier", "picture.png", cwd=tmp_path)
    assert not LATER & loaded, LATER & loaded
    assert "picture.png" in printed and "torch" in loaded


NAMED = """
import sys
sys.argv[0] = "dinov3-nb"
import dinov3_nb
from transformers import AutoConfig, AutoModelForImageClassification
assert AutoConfig.for_model("dinov3_classifier").model_type == "dinov3_classifier"
print(dinov3_nb.train.__name__, dinov3_nb.load_classifier.__name__)
"""


def test_the_name_of_a_program_changes_nothing(tmp_path):
    "A script of your own may be called dinov3-nb: the import gives the whole package, and registers its classifiers."
    done = subprocess.run([sys.executable, "-c", NAMED], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0 and done.stdout == "train load_classifier\n", done.stderr
