"The ladder: its statistics against slow plain versions, and what becomes of rungs that fail, stop, or were there before."
import importlib.util
import json
from dataclasses import replace
from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from helpers import make_image_folder
from test_benchmarks import benchmark

from dinov3_nb import ladder as module
from dinov3_nb.core import ModelArguments, Settings, TuneArguments, UserError
from dinov3_nb.evaluation import evaluate
from dinov3_nb.files import read_checkpoint
from dinov3_nb.ladder import (
    Rung, _judge, _measure, _read_plan, _read_rungs, _rung_settings, advise, compare, correct, draw_ladder, find_power, interval,
    ladder, smallest_gain,
)
from dinov3_nb.run import train
from dinov3_nb.sources import load_digits_dataset

TINY = dict(dataset="digits", model_name="tiny", mixed_precision="no", no_tracking=True, train_split_ratio=0.1, epochs=1,
            eval_every_steps="epoch", batch_size=16)
QUIET = dict(log=lambda line: None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DINOV3_NB_CACHE", str(tmp_path_factory.getbasetemp() / "ladder_cache"))


def stand_in(settings, log, **own):
    "A head alone, with a learning rate for each rung: what `train` leaves behind, in no time."
    rung = settings.tuning.tune
    model = replace(settings.model, freeze_backbone=True, gradient_checkpointing=False)
    settings = replace(settings, tuning=TuneArguments(), model=model)
    return train(settings, log=log, learning_rate={"last": 1e-2, "lora": 2e-2, "all": 1e-6}[rung], **own)


# statistics

@pytest.mark.parametrize("right, total", [(0, 5), (7, 10), (10, 10), (812, 1000)])
def test_the_interval_holds_the_accuracies_for_which_this_is_not_odd(right, total):
    low, high = interval(right, total)
    q = np.linspace(0.00005, 0.99995, 10_000)
    inside = np.abs(right / total - q) <= 1.959964 * np.sqrt(q * (1 - q) / total)
    assert abs(q[inside].min() - low) < 2e-4 and abs(q[inside].max() - high) < 2e-4


@pytest.mark.parametrize("won, lost", [(0, 0), (1, 0), (6, 0), (3, 3), (12, 4), (4, 12)])
def test_mcnemar_is_a_sum_over_tosses(won, lost):
    right = np.array([True] * won + [False] * lost + [True, False])
    reference = np.array([False] * won + [True] * lost + [True, False])
    tosses = [comb(won + lost, heads) for heads in range(won + lost + 1)]
    plain = sum(t for t in tosses if t <= comb(won + lost, won)) / 2 ** (won + lost)
    assert compare(right, reference) == (won, lost, pytest.approx(plain))


def test_holm_steps_down():
    "A rung is clear if and only if all with a smaller p are clear, and p times the number of those left is at most the level."
    for values in product((0.001, 0.012, 0.02, 0.04, 0.3), repeat=3):
        found = correct(dict(zip("abc", values)))
        going, left = True, 3
        for name in sorted("abc", key=dict(zip("abc", values)).get):
            going = going and dict(zip("abc", values))[name] * left <= 0.05
            assert (found[name] <= 0.05) == going, values
            left -= 1
    assert correct({"a": 0.2}) == {"a": 0.2} and correct({}) == {}


def test_power_by_counting_every_case():
    images, gain, total = 12, 0.2, 0.0
    for won, lost in product(range(13), repeat=2):
        if won + lost > images: continue
        ways = comb(images, won) * comb(images - won, lost)
        chance = ways * (2 * gain) ** won * gain**lost * (1 - 3 * gain) ** (images - won - lost)
        if won > lost and compare(np.arange(won + lost) < won, np.arange(won + lost) >= won).p_value <= 0.05: total += chance
    assert find_power(images, gain) == pytest.approx(total)


def test_the_smallest_gain_is_where_the_power_is_reached():
    for images, level in ((100, 0.05), (1000, 0.05), (1000, 0.05 / 3), (20_000, 0.05)):
        gain = smallest_gain(images, level)
        assert find_power(images, gain, level) >= 0.8 > find_power(images, gain - 0.2 / images, level)
    assert smallest_gain(10) is None
    assert smallest_gain(1000, 0.05 / 3) > smallest_gain(1000) > smallest_gain(2000)


def lists(**won_and_lost):
    "rung -> right, of 200 images of which the probe names the first 150."
    probe = np.arange(200) < 150
    right = {"probe": probe}
    for name, (won, lost) in won_and_lost.items():
        right[name] = probe.copy()
        right[name][150:150 + won], right[name][:lost] = True, False
    return right


def advice(seconds=None, **won_and_lost):
    right = lists(**won_and_lost)
    return advise([_judge(name, right, seconds=(seconds or {}).get(name, 1.0)) for name in right], right)


def test_the_sentence():
    assert advice().startswith("Stop at the probe (75.00%): nothing else was run")
    assert advice(last=(5, 3), all=(6, 2)).startswith("Stop at the probe (75.00%): no rung is clearly above it")
    assert advice(last=(2, 20)).startswith("Stop at the probe")  # clearly different, and worse
    assert advice(last=(0, 0)).startswith("Stop at the probe")
    assert advice(last=(20, 1), all=(3, 3)).startswith("Take last: 84.50% where the probe has 75.00%")
    assert advice({"last": 1, "all": 9}, last=(20, 1), all=(22, 1)).startswith("Take last")  # all is no clear difference
    assert "all has 85.50%" in advice({"last": 1, "all": 9}, last=(20, 1), all=(22, 1))
    assert advice({"last": 9, "all": 1}, last=(20, 1), all=(22, 1)).startswith("Take all")
    assert advice({"last": 1, "all": 9}, last=(14, 1), all=(40, 1)).startswith("Take all")  # a clear one
    assert advice(last=(6, 0)).startswith("Take last")  # 3.1 %
    assert advice(last=(6, 0), all=(0, 0)).startswith("Stop")  # of two, 6.2 %


def test_a_rung_worse_than_the_probe_is_named():
    assert "last is clearly below it" in advice(last=(2, 20), all=(3, 3))
    assert "below" not in advice(last=(2, 4))


# settings

def test_each_rung_gets_what_is_for_it():
    plan = _read_plan((), dict(TINY, lora_rank=4, layer_decay=0.5, no_rope_rescale=True, last_blocks=1, checkpoint_dir="a"))
    rungs = {name: _rung_settings(plan, name) for name in ("last", "lora", "all")}
    for name, settings in rungs.items():
        assert settings.tuning.tune == name and settings.tuning.head_start == "probe" and not settings.model.freeze_backbone
        assert settings.training.checkpoint_dir == f"a/{name}" and settings.training.epochs == 1
    def told(field): return [getattr(settings.tuning, field) for settings in rungs.values()]
    plain = TuneArguments()
    assert told("lora_rank") == [plain.lora_rank, 4, plain.lora_rank]
    assert told("layer_decay") == [0.5, plain.layer_decay, 0.5]
    assert told("no_rope_rescale") == [False, False, True] and told("last_blocks") == [1, 2, 2]


def test_parts_and_names_together():
    plan = _read_plan((TuneArguments(lora_rank=4), ModelArguments(model_name="tiny")), dict(dataset="digits", dora=True))
    assert (plan.tuning.lora_rank, plan.tuning.dora, plan.settings.model.model_name) == (4, True, "tiny")
    plan = _read_plan((Settings(tuning=TuneArguments()),), dict(dataset="digits", tuning=TuneArguments(lora_rank=2)))
    assert plan.tuning.lora_rank == 2
    for given in (Settings(tuning=TuneArguments(tune="all")), TuneArguments(tune="last")):
        with pytest.raises(UserError, match="--tune does nothing for a ladder"): _read_plan((given,), {})
    with pytest.raises(UserError, match="--freeze_backbone does nothing for a ladder"):
        _read_plan((ModelArguments(freeze_backbone=False),), {})


def test_rungs_by_name():
    assert _read_rungs("") == ["probe"] and _read_rungs(("all", "probe", "last")) == ["probe", "last", "all"]
    with pytest.raises(UserError, match="'top' is not a rung"): _read_rungs("probe,top")


def test_patience_is_refused():
    with pytest.raises(UserError, match="--patience lets the validation images"): ladder(**TINY, patience=3)


# the whole

def test_what_is_scored_written_and_returned(tmp_path, monkeypatch):
    def with_a_wrong_best(settings, log, **own):
        state = stand_in(settings, log, **own)
        (tmp_path / "l" / settings.tuning.tune / "best.pt").write_bytes(bytes(123))
        return state
    monkeypatch.setattr(module, "train", with_a_wrong_best)
    said = []
    found = ladder(**TINY, checkpoint_dir=tmp_path / "l", log=said.append)
    assert [rung.name for rung in found.rungs] == ["probe", "last", "lora", "all"] and found.num_images == 360
    for rung in found.rungs[1:]:
        assert rung.accuracy == pytest.approx(evaluate(tmp_path / "l" / rung.name / "last.pt").scores.accuracy)
        assert rung.size == 123 and rung.trainable == 1290
    assert found.rungs[0].accuracy == pytest.approx(read_checkpoint(tmp_path / "l" / "probe" / "best.pt")["best_acc"])
    assert all(rung.seconds > 0 and rung.memory > 1e8 for rung in found.rungs)
    told = json.loads((tmp_path / "l" / "ladder.json").read_text())
    assert told["advice"] == found.advice == said[-1] and told["settings"]["epochs"] == 1 and "tune" not in told["settings"]
    assert [rung["accuracy"] for rung in told["rungs"]] == [rung.accuracy for rung in found.rungs]
    assert sorted(p.name for p in (tmp_path / "l").iterdir()) == ["all", "ladder.json", "ladder.png", "last", "lora", "probe"]
    probe, last = found.rungs[:2]
    assert round((last.accuracy - probe.accuracy) * 360) == last.won - last.lost and last.p_value <= 1


@pytest.mark.parametrize("error", [UserError("no room for this"), torch.OutOfMemoryError("no room for this\nsecond line")])
def test_a_rung_that_dies_costs_nobody_else_anything(tmp_path, monkeypatch, error):
    def dying(settings, log, **own):
        if settings.tuning.tune == "lora": raise error
        return stand_in(settings, log, **own)
    monkeypatch.setattr(module, "train", dying)
    found = ladder(**TINY, **QUIET, checkpoint_dir=tmp_path / "l")
    assert [rung.accuracy is None for rung in found.rungs] == [False, False, True, False]
    assert found.rungs[2].note == "could not be run: no room for this"
    assert "lora   could not be run: no room for this" in found.lines()
    assert "Holm's correction for 2)" in found.advice


def test_lora_without_peft_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", stand_in)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else real(name))
    found = ladder(**TINY, **QUIET, checkpoint_dir=tmp_path / "l", rungs="lora")
    assert [rung.accuracy is None for rung in found.rungs] == [False, True]
    assert "pip install 'dinov3_nb[lora]'" in found.rungs[1].note and found.advice.endswith("nothing else was run.")


def test_a_bad_image_is_right_on_no_rung(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", stand_in)
    images = make_image_folder(tmp_path / "images")
    (images / "val" / "circle" / "0.png").write_bytes(b"broken")
    given = {**TINY, "dataset": images, "train_split_ratio": 1.0}
    found = ladder(**given, **QUIET, rungs="last", on_bad_image="skip", checkpoint_dir=tmp_path / "l")
    assert found.num_images == 24 and all(rung.accuracy <= 23 / 24 for rung in found.rungs)
    with pytest.raises(UserError, match="0.png"): ladder(**given, **QUIET, checkpoint_dir=tmp_path / "m")


def test_a_dataset_of_your_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", stand_in)
    found = ladder(**{**TINY, "dataset": load_digits_dataset()}, **QUIET, rungs="last", checkpoint_dir=tmp_path / "l")
    named = ladder(**TINY, **QUIET, rungs="last", checkpoint_dir=tmp_path / "m")
    assert [rung.accuracy for rung in found.rungs] == [rung.accuracy for rung in named.rungs]


def test_a_folder_with_a_ladder_or_a_run_of_a_rung_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", stand_in)
    ladder(**TINY, **QUIET, rungs="last", checkpoint_dir=tmp_path / "l")
    before = (tmp_path / "l" / "last" / "last.pt").read_bytes()
    with pytest.raises(UserError, match="holds a ladder already"): ladder(**TINY, **QUIET, checkpoint_dir=tmp_path / "l")
    (tmp_path / "l" / "ladder.json").unlink()
    with pytest.raises(UserError, match="holds a ladder already"): ladder(**TINY, **QUIET, checkpoint_dir=tmp_path / "l")
    assert (tmp_path / "l" / "last" / "last.pt").read_bytes() == before
    again = ladder(**TINY, **QUIET, rungs="last", checkpoint_dir=tmp_path / "l", overwrite=True, seed=1)
    assert again.num_images == 360 and (tmp_path / "l" / "last" / "last.pt").read_bytes() != before


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="ladder runs in one process"): ladder(**TINY, checkpoint_dir=tmp_path / "l")


def test_memory_is_that_of_the_function_and_errors_pass(tmp_path):
    if torch.cuda.is_available(): pytest.skip("looks at the machine's memory")
    def hold(megabytes):
        kept = np.ones(megabytes * 125_000)
        module.time.sleep(0.15)
        return kept[-1]
    little, much = _measure(lambda: hold(1)), _measure(lambda: hold(300))
    assert much.memory - little.memory > 200e6 and much.seconds >= 0.15
    threads = module.threading.active_count()
    with pytest.raises(ZeroDivisionError): _measure(lambda: 1 / 0)
    assert module.threading.active_count() == threads


def test_the_figure_leaves_out_what_was_not_run():
    right = lists(last=(20, 1))
    rungs = [*(_judge(name, right, seconds=2.0) for name in right), Rung("lora", note="could not be run")]
    figure = draw_ladder(module._sum_up(rungs, right))
    assert [text.get_text() for text in figure.axes[0].texts] == ["probe", "last"]


# with the real thing

@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    "A real ladder, whole; and one that is interrupted at its last rung and goes on."
    folder = tmp_path_factory.mktemp("climbed")
    given = {**TINY, **QUIET, "cache_dir": str(folder / "cache")}
    whole = ladder(**given, checkpoint_dir=folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        def interrupted(settings, **named):
            if settings.tuning.tune == "all": raise KeyboardInterrupt
            return train(settings, **named)
        patch.setattr(module, "train", interrupted)
        with pytest.raises(KeyboardInterrupt): ladder(**given, checkpoint_dir=folder / "cut")
    before = json.loads((folder / "cut" / "ladder.json").read_text())
    resumed = ladder(**given, checkpoint_dir=folder / "cut", resume=True)
    return folder, given, whole, before, resumed


def test_rungs_learn_what_they_say(climbed):
    folder, _, whole, _, _ = climbed
    by_name = {rung.name: rung for rung in whole.rungs}
    assert all(rung.accuracy is not None for rung in whole.rungs), whole.lines()
    assert by_name["probe"].trainable < by_name["lora"].trainable < by_name["last"].trainable < by_name["all"].trainable
    assert by_name["lora"].size < by_name["last"].size < by_name["all"].size
    for name in ("last", "lora", "all"):
        first = read_checkpoint(folder / "whole" / name / "last.pt")["history"][0]
        assert first["step"] == 0 and first["val_acc"] == pytest.approx(by_name["probe"].accuracy), name


def test_an_interrupted_ladder_goes_on(climbed):
    folder, _, whole, before, resumed = climbed
    assert [rung["name"] for rung in before["rungs"]] == ["probe", "last", "lora"]
    assert [rung.accuracy for rung in resumed.rungs] == [rung.accuracy for rung in whole.rungs]
    assert [rung.seconds for rung in resumed.rungs[:3]] == [rung["seconds"] for rung in before["rungs"]]
    for name in ("last", "lora", "all"):
        kept = [read_checkpoint(folder / way / name / "last.pt")["model_state_dict"] for way in ("whole", "cut")]
        assert all(torch.equal(value, kept[1][key]) for key, value in kept[0].items()), name


def test_another_ladder_is_not_gone_on_with(climbed):
    folder, given, *_ = climbed
    with pytest.raises(UserError, match="--resume would continue another run: .*seed was 42, now 7"):
        ladder(**given, checkpoint_dir=folder / "cut", resume=True, seed=7)


@pytest.mark.parametrize("part", ["lora", "all"])
def test_the_benchmark_learns_what_a_loop_by_hand_learns(benchmark, part):
    code, result = benchmark("ladder", "--part", part, "--model", "toy", "--images", 24, "--epochs", 2, "--repeats", 1)
    assert code == 0 and result["loss_difference"] < {"lora": 0.02, "all": 1e-4}[part], result  # adapters start at random
    assert [len(runs[0]["curve"]) for runs in result["sides"].values()] == [2, 2]
