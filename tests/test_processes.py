"Two processes, here forked from the tests and joined by gloo on the CPU, do what one does with twice the batch."
import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import DatasetDict
from helpers import make_image_folder

from dinov3_nb import DataArguments, ModelArguments, TrainArguments, TuneArguments, UserError, processes, run, train, training
from dinov3_nb.backbone import load_processor
from dinov3_nb.core import FeatureArguments, make_settings
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.features import extract_features
from dinov3_nb.files import read_checkpoint
from dinov3_nb.images import EpochSampler
from dinov3_nb.losses import choose_learning
from dinov3_nb.sources import load_digits_dataset
from dinov3_nb.model import build_classifier
from dinov3_nb.run import Loaded, _opening_lines, _plan_of_run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")

TRAINING, VALIDATION = 96, 70  # neither validation batches of 32 nor two of them divide 70
MODEL = dict(model_name="tiny")


def reset_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState
    for state in (AcceleratorState, GradientState, PartialState): state._reset_state()


def as_torchrun(rank, local, count, port):
    return dict(RANK=rank, LOCAL_RANK=local, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def as_accelerate(rank, local, count, port): return dict(as_torchrun(rank, local, count, port), ACCELERATE_USE_CPU="true")


def as_open_mpi(rank, local, count, port):
    return dict(OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_LOCAL_RANK=local, OMPI_COMM_WORLD_SIZE=count, OMPI_COMM_WORLD_LOCAL_SIZE=count, MASTER_PORT=port)


def as_intel_mpi(rank, local, count, port):
    return dict(PMI_RANK=rank, MPI_LOCALRANKID=local, PMI_SIZE=count, MPI_LOCALNRANKS=count, MASTER_PORT=port)


LAUNCHERS = [as_torchrun, as_accelerate, as_open_mpi, as_intel_mpi]


def work(variables, pipe, function, given):
    "What a forked process does: join the others, call the function, send what it returns."
    os.environ.update({name: str(value) for name, value in variables.items()}, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    reset_accelerate()
    try:
        pipe.send((True, function(*given)))
        torch.distributed.destroy_process_group()
    except BaseException: pipe.send((False, traceback.format_exc()))


def in_processes(function, *given, count=2, launcher=as_torchrun):
    "The results of all processes; plain values only."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, pipes, children = multiprocessing.get_context("fork"), [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(launcher(rank, rank, count, port), theirs, function, given), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours), children.append(child)
    try:
        arrived = []
        for pipe in pipes:
            assert pipe.poll(180), "a process waits for another"
            arrived.append(pipe.recv())
    finally:
        for child in children: child.join(5); child.kill()
    for fine, result in arrived: assert fine, result
    return [result for _, result in arrived]


def joined():
    accelerator = training.make_accelerator(TrainArguments(mixed_precision="no"))
    accelerator.wait_for_everyone()
    return accelerator.num_processes, accelerator.process_index, accelerator.is_main_process, accelerator.device.type


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_without_a_gpu_join(launcher):
    assert in_processes(joined, launcher=launcher) == [(2, 0, True, "cpu"), (2, 1, False, "cpu")]


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "2"}, as_torchrun(0, 0, 1, 29500)])
def test_a_process_that_was_not_launched_with_others_is_alone(variables, monkeypatch):
    for name, value in variables.items(): monkeypatch.setenv(name, str(value))
    assert not processes.join_on_cpu()


def test_a_machine_that_does_not_know_the_first_one(monkeypatch):
    for name, value in dict(PMI_RANK=1, PMI_SIZE=2, MPI_LOCALNRANKS=1).items(): monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="This is process 1 of 2, but MASTER_ADDR does not name the machine of process 0"): processes.join_on_cpu()


def quick(folder, **changes):
    return TrainArguments(**{**dict(epochs=2, batch_size=8, learning_rate=1e-3, eval_every_steps=4, mixed_precision="no", warmup_ratio=0.2,
                                    no_tracking=True, checkpoint_dir=str(folder)), **changes})


class Still:
    "No jittered positions, which each process draws for itself: then processes can be compared with one that is alone."
    def __enter__(self):
        self.build = run.build_classifier
        def still(*given):
            model = self.build(*given)
            model.backbone.config.pos_embed_rescale = model.backbone.config.pos_embed_jitter = model.backbone.config.pos_embed_shift = None
            return model
        run.build_classifier = still
    def __exit__(self, *error): run.build_classifier = self.build


def whole(tensor): return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_run(digits, folder, data={}, model={}, tune={}, kept=None, cache_features="auto", still=True, **changes):
    "A run as its user starts it: the log, the curves, and where the schedule ended."
    lines, features = [], FeatureArguments(cache_dir=str(kept or folder.parent / "kept"), cache_features=cache_features)
    with Still() if still else contextlib.nullcontext():
        state = train(DataArguments(dataset="mine", **data), ModelArguments(**MODEL, **model), training=quick(folder, **changes), dataset=digits,
                      features=features, tuning=TuneArguments(**tune), log=lines.append)
    curves = [{name: value for name, value in h.items() if name != "images_per_second" and value is not None} for h in state.history]
    weights = [whole(state.model.head.weight).tolist()]
    if tune: weights += [whole(p).tolist() for p in state.model.backbone.parameters() if p.requires_grad]
    if "freeze_backbone" in model: weights += [whole(state.model.backbone.get_parameter(name)).tolist() for name in ("norm.weight", "embeddings.cls_token")]
    return dict(lines=lines, curves=curves, step=state.step, total_steps=state.total_steps, weight=weights[0], weights=weights,
                schedule=state.scheduler.last_epoch, rate=state.scheduler.get_last_lr()[0], base=state.scheduler.base_lrs[0])


def scored(data, processor):
    "An untrained model on the validation images: its logits, and their labels."
    torch.manual_seed(0)
    model = build_classifier(ModelArguments(**MODEL), data.class_names)
    accelerator = training.make_accelerator(TrainArguments(mixed_precision="no"))
    _, loader = training.make_loaders(data, processor, DataArguments(dataset="mine", num_workers=0), TrainArguments())
    logits, labels, unread = training.collect_logits(accelerator.prepare(model), training.share_batches(loader, accelerator), accelerator)
    return logits.tolist(), labels.tolist(), unread


class Cut(Exception): pass


def cut_and_resumed(digits, folder, **given):
    "A run that stops in the validation of its second step, so after step 1 as far as its checkpoint knows, and goes on from there."
    score, calls = training.score, []
    at = 3 if given.get("tune") or given.get("model", {}).get("freeze_backbone") is False else 2  # these validate before their first step

    def stop(*parts):
        calls.append(parts)
        if len(calls) == at: raise Cut
        return score(*parts)
    training.score = stop
    try: whole_run(digits, folder, **given)
    except Cut: pass
    finally: training.score = score
    return whole_run(digits, folder, resume=True, **given)


# 96 images: in steps of 16 each process has as many; in steps of 40 the last of three has 16, 10 and 6 of them
UNEVEN = dict(batch_size=10, gradient_accumulation_steps=2, eval_every_steps=1)
LEARNS = dict(freeze_backbone=False)
LAST, ADAPTERS = dict(tune="last", last_blocks=1), dict(tune="lora", lora_rank=2)
RESUMED = {  # runs that stop in the middle of an epoch
    "kept features": {},
    "images": dict(cache_features="never"),
    "changed images": dict(data=dict(augment="crop_flip")),
    "a trained backbone": dict(model=LEARNS, still=False),
    "a trained backbone and changed images": dict(model=LEARNS, data=dict(augment="crop_flip"), still=False),
    "the last blocks": dict(tune=LAST), "adapters": dict(tune=ADAPTERS),
}
EQUAL = {  # what two processes with 8 images each do as one with 16; (images, given)
    "none left over": (96, {}), "a short batch": (90, {}), "a process without images": (82, {}), "one image": (81, {}),
    "accumulated": (96, dict(gradient_accumulation_steps=2)), "accumulated, a short batch": (90, dict(gradient_accumulation_steps=2)),
    "accumulated, one image": (65, dict(gradient_accumulation_steps=2)),
    "fewer images than processes take": (5, {}),
    "images, a short batch": (90, dict(cache_features="never")),
    "changed images, a process without": (82, dict(data=dict(augment="crop_flip"))),
    "a trained backbone": (96, dict(model=LEARNS, epochs=1)),
    "the last blocks": (90, dict(tune=LAST, epochs=1)), "adapters, one image": (65, dict(tune=ADAPTERS, epochs=1)),
    "a trained backbone, accumulated, one image": (65, dict(model=LEARNS, epochs=1, gradient_accumulation_steps=2)),
}


def with_dropout(given): return {**given, "model": {**given.get("model", {}), "dropout": 0.3}}


def first_rows(digits, count): return DatasetDict(train=digits["train"].select(range(count)), validation=digits["validation"])


def equal_runs(digits, folder, batch_size):
    "All that are to be equal; features are kept, by each group of processes for itself."
    return {name: whole_run(first_rows(digits, count), folder / name, kept=folder / "kept", batch_size=batch_size, eval_every_steps="epoch", **given)
            for name, (count, given) in EQUAL.items()}


def seeds_drawn(digits, folder):
    "What each step of a short run seeds its random numbers with."
    seeds, seed_step = [], training._seed_step
    training._seed_step = lambda seed, device: seeds.append(seed)
    try: whole_run(digits, folder, epochs=1)
    finally: training._seed_step = seed_step
    return seeds


class Shards:
    "FSDP, which accelerate itself switches on with a GPU only."
    def __enter__(self):
        self.make = run.make_accelerator
        def sharded(*given):
            accelerator = self.make(*given)
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["DINOv3ViTLayer"], cpu_ram_efficient_loading=False)
            accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            assert accelerator.is_fsdp2
            return accelerator
        run.make_accelerator = sharded
    def __exit__(self, *error): run.make_accelerator = self.make


def on_disk(folder):
    "What a checkpoint holds of the weights that `whole_run` returns, and of the optimizer's averages."
    start = read_checkpoint(folder / "last.pt")
    weights = [start["model_state_dict"][name].tolist() for name in ("head.weight", "backbone.norm.weight", "backbone.embeddings.cls_token")]
    averages = [tuple(average.shape) for state in start["optimizer_state_dict"]["state"].values() for average in state.values()]
    kinds = {type(tensor) for tensor in start["model_state_dict"].values()}
    return weights, averages, kinds == {torch.Tensor}


def in_shards(digits, folder):
    "A run whose model is in two parts, the same after an interruption, and the same with two whole models."
    given = dict(UNEVEN, model=dict(LEARNS, gradient_checkpointing=True), mixed_precision="bf16")
    with Shards():
        parts = whole_run(digits, folder / "shards", **given)
        resumed = cut_and_resumed(digits, folder / "shards cut", **given)
    copies = whole_run(digits, folder / "copies", **given)
    return parts, resumed, copies, on_disk(folder / "shards"), on_disk(folder / "copies")


def averages_in_shards(digits, folder):
    "What a run says that would average a model in parts."
    with Shards():
        try: whole_run(digits, folder, model=LEARNS, ema_decay=0.9)
        except UserError as error: return str(error)


def skipping(folder, batch_size):
    "Two epochs without the images that cannot be read: some of the first step, all of the second."
    lines, given = [], quick(folder, batch_size=batch_size, eval_every_steps="epoch")
    arguments = DataArguments(dataset=str(folder), on_bad_image="skip", num_workers=0)
    data = load_and_prepare_dataset(arguments, 42)
    torch.manual_seed(0)
    model = build_classifier(ModelArguments(**MODEL), data.class_names)
    state = training.fit(model, *training.make_loaders(data, load_processor("tiny"), arguments, given), given, log=lines.append)
    curves = [{name: value for name, value in h.items() if name != "images_per_second"} for h in state.history]
    return curves, state.model.head.weight.tolist(), sorted(line for line in lines if "skipped" in line)


LEARNING = dict(class_weights="balanced", logit_adjustment=0.5, label_smoothing=0.1, ema_decay=0.9, metric="macro_f1")


def learnt_otherwise(data, processor, batch_size, **changes):
    "A head by class weights, shortened gradients and an average of its weights: the curves, both sets of weights, how many updates."
    given = TrainArguments(epochs=2, batch_size=batch_size, learning_rate=1e-2, mixed_precision="no", eval_every_steps="epoch", **{**LEARNING, **changes})
    torch.manual_seed(0)
    model = build_classifier(ModelArguments(**MODEL), data.class_names)
    features = {name: extract_features(model.backbone, data.rows(name), processor) for name in ("train", "validation")}
    how = replace(choose_learning(given, data.labels["train"], 10), max_grad_norm=0.5)
    state = training.fit(model, *training.make_feature_loaders(data, features, "cls", given), given, log=lambda line: None, how=how)
    curves = [{name: value for name, value in h.items() if name != "images_per_second"} for h in state.history]
    sides = state.average.state_dict()
    return curves, [sides[side]["head.weight"].tolist() for side in ("mean", "weights")], sides["updates"], model.head.weight.tolist()


def everything(digits, data, processor, folder):
    "All that the tests below look at, so that two processes are started once."
    resumed = {name: (whole_run(digits, folder / f"{name} whole", **UNEVEN, **with_dropout(given)),
                      cut_and_resumed(digits, folder / f"{name} cut", **UNEVEN, **with_dropout(given))) for name, given in RESUMED.items()}
    return dict(run=whole_run(digits, folder / "two"), equal=equal_runs(digits, folder / "equal two", 8), resumed=resumed,
                seeds=seeds_drawn(digits, folder / "seeds"), auto=whole_run(digits, folder / "auto", learning_rate="auto", epochs=1),
                scored=scored(data, processor), shards=in_shards(digits, folder), skipping=skipping(folder / "pictures", 4),
                otherwise=learnt_otherwise(data, processor, 10), unaveraged=averages_in_shards(digits, folder / "no average"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    digits = load_digits_dataset()
    digits = DatasetDict(train=digits["train"].select(range(TRAINING)), validation=digits["validation"].select(range(VALIDATION)))
    data = load_and_prepare_dataset(DataArguments(dataset="mine"), 42, digits)
    folder = tmp_path_factory.mktemp("processes")
    make_image_folder(folder / "pictures", per_class=8)
    files = [sorted((folder / "pictures" / split).rglob("*.png")) for split in ("train", "val")]
    order = list(EpochSampler(len(files[0]), 42))
    for file in [files[0][row] for row in order[4:16]] + files[1][:2]: file.write_bytes(b"no picture")
    return SimpleNamespace(digits=digits, data=data, processor=load_processor("tiny"), folder=folder)


@pytest.fixture(scope="module")
def both(parts):
    return in_processes(everything, parts.digits, parts.data, parts.processor, parts.folder)


@pytest.fixture(scope="module")
def alone(parts, both):  # the processes come first: they begin with nothing kept
    reset_accelerate()
    return whole_run(parts.digits, parts.folder / "one", batch_size=16)


def largest(a, b): return (torch.tensor(a) - torch.tensor(b)).abs().max()


def close(a, b, tolerance=1e-5): return torch.allclose(torch.tensor(a), torch.tensor(b), atol=tolerance, rtol=tolerance)


def test_two_processes_make_the_steps_of_one_with_twice_the_batch(both, alone):
    for result in both:
        run = result["run"]
        assert (run["step"], run["total_steps"], run["schedule"]) == (12, 12, 12)
        assert [h["step"] for h in run["curves"]] == [h["step"] for h in alone["curves"]] == [4, 6, 8, 12]
        for two, one in zip(run["curves"], alone["curves"]):
            assert close([two[name] for name in one], [one[name] for name in one]), (two, one)
        assert close(run["weight"], alone["weight"]) and run["rate"] == alone["rate"] == 0
    assert both[0]["run"]["weight"] == both[1]["run"]["weight"]


def test_the_log_counts_all_processes(both, alone):
    steps, = (line for line in alone["lines"] if line.startswith("Total steps"))
    assert steps == "Total steps: 12 (2 epochs of 6)" and all(steps in result["run"]["lines"] for result in both)
    told = [[line for line in result["run"]["lines"] if line.startswith("[epoch")] for result in both]
    assert len(told[0]) == 4 and told[1] == []  # the curves come from the main process alone


@pytest.fixture(scope="module")
def equal_alone(parts):
    reset_accelerate()
    return equal_runs(parts.digits, parts.folder / "equal one", 16)


@pytest.mark.parametrize("name", EQUAL)
def test_a_step_is_the_mean_over_its_images_in_all_processes(name, both, equal_alone):
    "Also where the images of an epoch's end are not enough for everybody; the pass that made the features too."
    one = equal_alone[name]
    for result in both:
        two = result["equal"][name]
        assert (two["step"], two["total_steps"]) == (one["step"], one["total_steps"])
        for a, b in zip(two["curves"], one["curves"], strict=True): assert close([a[key] for key in b], [b[key] for key in b], 1e-4), (a, b)
        for a, b in zip(two["weights"], one["weights"], strict=True): assert close(a, b, 1e-4), largest(a, b)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_resume_to_the_bit(name, both):
    "In the middle of an epoch whose last step is uneven."
    for result in both:
        run, resumed = result["resumed"][name]
        assert (run["step"], run["total_steps"], run["rate"]) == (6, 6, 0)
        assert "Going on from step 1" in " ".join(resumed["lines"])
        for key in ("weights", "curves", "schedule", "rate"): assert resumed[key] == run[key], key


def resumed_by_three(digits, folder):
    return whole_run(digits, folder / "whole", model=LEARNS, **UNEVEN), cut_and_resumed(digits, folder / "cut", model=LEARNS, **UNEVEN)


def test_three_processes_resume_to_the_bit(parts, both):
    "Three numbers can be added up in three orders."
    for run, resumed in in_processes(resumed_by_three, parts.digits, parts.folder / "three", count=3):
        assert run["step"] == 4 and run["weights"] == resumed["weights"] and run["curves"] == resumed["curves"]


def test_another_number_of_processes_does_not_resume(parts, both):
    reset_accelerate()
    with pytest.raises(UserError, match="2 processes"): whole_run(parts.digits, parts.folder / "kept features cut", resume=True, **UNEVEN, **with_dropout({}))


def test_a_model_in_shards_is_trained_and_saved_as_a_whole_one(both):
    for rank, result in enumerate(both):
        parts, resumed, copies, saved, saved_copies = result["shards"]
        assert parts["step"] == 6 and parts["weights"] == resumed["weights"] and parts["curves"] == resumed["curves"]
        assert all(close(a, b, 1e-4) for a, b in zip(parts["weights"], copies["weights"], strict=True))
        assert saved[0] == parts["weights"] and saved[1:] == saved_copies[1:] and saved[2]


def test_weighed_losses_and_averages_are_those_of_one_process(parts, both):
    "96 images in steps of 20: in the last one the second process has 6, and the classes of a step fall on both."
    reset_accelerate()
    curves, sides, updates, weight = learnt_otherwise(parts.data, parts.processor, 20)
    plain = learnt_otherwise(parts.data, parts.processor, 20, class_weights="none")
    assert updates == 10 and weight == sides[0] and not close(weight, plain[3], 1e-3)
    for result in both:
        theirs, their_sides, their_updates, their_weight = result["otherwise"]
        assert their_updates == updates and their_weight == their_sides[0]
        for two, one in zip(their_sides, sides): assert close(two, one)
        for a, b in zip(theirs, curves, strict=True): assert close([a[key] for key in b], [b[key] for key in b], 1e-4), (a, b)


def test_an_average_of_a_model_in_shards_is_refused(both):
    for result in both: assert result["unaveraged"] == "--ema_decay cannot average a model in shards (FSDP): leave it out, or give each process the whole model."


def test_images_that_cannot_be_read_hold_up_nobody(parts, both):
    "One process has none in the first step, both have none in the second."
    reset_accelerate()
    curves, weight, lines = skipping(parts.folder / "pictures", 8)
    assert len(lines) == 12 + 2 + 1 and "Images skipped in all: 14" in lines
    for result in both:
        assert close(result["skipping"][1], weight) and result["skipping"][2] == lines
        for a, b in zip(result["skipping"][0], curves, strict=True): assert close([a[key] for key in b], [b[key] for key in b])


def test_torchrun_starts_one_run(tmp_path):
    "One log, one set of checkpoints."
    command = ["train", "--dataset", "digits", "--model_name", "tiny", "--train_split_ratio", "0.05", "--epochs", "1", "--no_tracking"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "dinov3_nb"]
    ran = subprocess.run([*launch, *command, "--cache_dir", "kept", "--checkpoint_dir", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": str(Path(run.__file__).parents[1])})
    assert ran.returncode == 0, ran.stderr
    for start in ("Device: cpu", "Total steps: 5 ", "[epoch 1", "Done: best accuracy"): assert len([line for line in ran.stdout.splitlines() if line.startswith(start)]) == 1, ran.stdout
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["best.pt", "last.pt"]


def test_processes_draw_different_random_numbers(both):
    "Dropout would otherwise drop the same features of different images."
    drawn = [result["seeds"] for result in both]
    assert drawn == [[training._step_seed(42, step, rank) for step in range(6)] for rank in range(2)]


def test_each_validation_image_is_scored_once_and_in_order(parts, both):
    reset_accelerate()
    logits, labels, _ = scored(parts.data, parts.processor)
    assert labels == parts.data.labels["validation"].tolist() and len(logits) == VALIDATION
    for result in both:
        theirs, their_labels, unread = result["scored"]
        assert their_labels == labels and unread == [] and len(theirs) == VALIDATION
        assert close(theirs, logits)


def test_the_rate_is_looked_for_with_the_batch_of_all_processes(parts, both):
    reset_accelerate()
    one = whole_run(parts.digits, parts.folder / "auto_one", learning_rate="auto", epochs=1, batch_size=16)
    tried = [line for line in one["lines"] if line.startswith("  1e-05: ")]
    for result in both:
        assert result["auto"]["base"] == one["base"] and [line for line in result["auto"]["lines"] if line in tried] == tried


def test_opening_lines_count_processes(parts):
    model = build_classifier(ModelArguments(**MODEL), parts.data.class_names)
    accelerator = SimpleNamespace(device="cpu", mixed_precision="no", num_processes=3)
    settings = make_settings(dataset="mine", epochs=5, batch_size=8, gradient_accumulation_steps=2, **MODEL)
    lines = [line for part in (_opening_lines, _plan_of_run) for line in part(settings, Loaded(parts.data, None, model), accelerator)]
    assert "Total steps: 10 (5 epochs of 2)" in lines  # 96 images, 48 a step
