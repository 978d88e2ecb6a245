"Curves through accelerate's trackers: one run over several sessions. trackio for real; wandb and TensorBoard, which need not be installed, by stand-ins."
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import trackio
from accelerate import tracking as accelerate_tracking
from accelerate.utils import LoggerType
from helpers import command
from trackio import sqlite_storage
from trackio.sqlite_storage import SQLiteStorage

from dinov3_nb import TrainArguments, UserError, run, train, training
from dinov3_nb.checkpoint import find_start
from dinov3_nb.tracking import choose_tracker, name_run

QUICK = dict(dataset="digits", model_name="tiny", epochs=1, batch_size=64, train_split_ratio=0.2, eval_every_steps=2, mixed_precision="no")
FIGURES = {"train_loss", "val_loss", "val_acc", "learning_rate", "images_per_second", "macro_f1", "balanced_accuracy"}


class Cut(Exception): pass


@pytest.fixture
def session(tmp_path, monkeypatch):
    "A session of one run, stopped in its validation number `stop`, if that is given. Returns the name that the checkpoint keeps."
    monkeypatch.setenv("DINOV3_NB_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")  # not the user's own
    score = training.score

    def start(stop=None, **changes):
        calls = []

        def counted(*parts):
            calls.append(parts)
            if len(calls) == stop: raise Cut
            return score(*parts)
        monkeypatch.setattr(training, "score", counted)
        try: train(**{**QUICK, "checkpoint_dir": tmp_path / "a run", "project_name": tmp_path.name, **changes}, log=lambda line: None)
        except Cut: pass
        return torch.load(tmp_path / "a run" / "last.pt", weights_only=True)["config"].get("run_name")
    start.folder = tmp_path / "a run"
    return start


@pytest.fixture
def installed(monkeypatch):
    def add(name):
        if LoggerType(name) not in accelerate_tracking._available_trackers:
            monkeypatch.setattr(accelerate_tracking, "_available_trackers", [*accelerate_tracking._available_trackers, LoggerType(name)])
    return add


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])


def test_trackio_goes_on_with_its_own_curve(session, tmp_path, capsys):
    name = session(stop=2)
    assert name.startswith("a-run-") and session(resume=True) == name
    run, = trackio.Api().runs(tmp_path.name)
    logs = SQLiteStorage.get_logs(tmp_path.name, run.name)
    assert run.name == name and [entry["step"] for entry in logs] == [2, 4, 5, 5] and FIGURES <= set(logs[0])
    assert {logs[-1][name]["_type"] for name in ("confusion", "mistakes")} == {"trackio.image"}
    assert run.config["epochs"] == 1 and run.config["dataset"] == "digits"
    assert "rackio" not in "".join(capsys.readouterr())


def test_trackio_says_nothing_until_the_process_has_ended(tmp_path):
    flags = [part for name, value in QUICK.items() for part in (f"--{name}", value)]
    done = command("train", *flags, "--checkpoint_dir", "run", cwd=tmp_path)
    assert done.returncode == 0 and "rackio" not in done.stdout + done.stderr, done.stderr
    assert list((tmp_path / "trackio").glob("dinov3*"))


def test_wandb_is_told_the_same_run_again(session, installed, monkeypatch, tmp_path):
    begun, logged, ended = [], [], []
    fake = ModuleType("wandb")
    fake.init = lambda **given: begun.append(given) or SimpleNamespace(
        log=lambda values, step: logged.append((step, set(values))), finish=lambda: ended.append(1))
    fake.Image = lambda image: image
    monkeypatch.setitem(sys.modules, "wandb", fake)
    installed("wandb")
    name = session(stop=2, report_to="wandb")
    assert session(resume=True, report_to="wandb") == name
    assert [(b["project"], b["id"], b["name"], b["resume"]) for b in begun] == [(tmp_path.name, name, name, "allow")] * 2
    assert begun[0]["config"]["batch_size"] == 64 and begun[0]["config"]["run_name"] == name
    assert logged == [(step, FIGURES) for step in (2, 4, 5)] + [(5, {"confusion"}), (5, {"mistakes"})] and len(ended) == 2


def test_tensorboard_gets_the_same_folder_again(session, installed, monkeypatch):
    class SummaryWriter:
        def __init__(self, folder): self.folder = folder; opened.append(folder)
        def add_hparams(self, values, metric_dict): settings.append(values)
        def add_scalar(self, name, value, global_step): scalars.append((name, global_step))
        def add_images(self, name, values, global_step, dataformats): drawn.append((name, values.ndim, global_step, dataformats))
        def flush(self): pass
        def close(self): closed.append(self.folder)
    opened, settings, scalars, closed, drawn = [], [], [], [], []
    fake = ModuleType("tensorboardX")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    installed("tensorboard")
    name = session(stop=2, report_to="tensorboard")
    assert session(resume=True, report_to="tensorboard") == name
    assert opened == closed == [str(session.folder / "tensorboard" / name)] * 2
    assert drawn == [("confusion", 4, 5, "NHWC"), ("mistakes", 4, 5, "NHWC")]
    assert len(settings) == 1 and settings[0]["batch_size"] == 64  # once, not once a session
    assert [step for figure, step in scalars if figure == "val_loss"] == [2, 4, 5] and {figure for figure, _ in scalars} == FIGURES


@pytest.mark.parametrize("name", ["trackio", "tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(name, missing, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_all", lambda *given: pytest.fail("loaded"))
    with pytest.raises(UserError, match=f"--report_to {name} needs a package that is not installed: pip install {name}, or give --report_to none."):
        train(**QUICK, report_to=name, checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"report_to": "none"}, {"no_tracking": True}, {"report_to": "wandb", "no_tracking": True}])
def test_no_tracker_is_needed_where_nothing_is_tracked(changes, missing, session):
    assert choose_tracker(TrainArguments(**changes)) is None
    assert session(**changes) is None and sorted(path.name for path in session.folder.iterdir()) == ["best.pt", "last.pt"]


def test_a_run_may_change_its_tracker_and_an_old_one_has_none(session, tmp_path):
    "A checkpoint without a name is that of an older version, or of a run that was not tracked; either gets one now."
    assert session(stop=2, no_tracking=True) is None
    kept = torch.load(session.folder / "last.pt", weights_only=True)["config"]
    old = {name: value for name, value in kept.items() if name not in ("report_to", "run_name")}
    arguments = TrainArguments(**{name: kept[name] for name in TrainArguments.__dataclass_fields__ if name != "resume"}, resume=True)
    assert find_start(arguments, old)["step"] == 2
    name = session(stop=2, resume=True)
    assert name and session(resume=True, report_to="none") == name  # kept, for the next time
    assert [run.name for run in trackio.Api().runs(tmp_path.name)] == [name]


@pytest.mark.parametrize("folder, start", [("birds & bees?#", "birds-bees-"), ("日本", "日本-"), ("x" * 200, "x" * 60 + "-"), (".", "")])
def test_names_that_a_file_system_and_an_address_can_take(folder, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = name_run(TrainArguments(checkpoint_dir=folder))["run_name"]
    assert name.startswith(start) and len(name) <= 69 and not set(name) & set('/\\#?%: &<>|*"')
    assert json.dumps(name)


def test_two_runs_in_folders_of_one_name_have_curves_of_their_own():
    assert name_run(TrainArguments()) != name_run(TrainArguments())
