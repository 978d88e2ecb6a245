"Two processes of `accelerate launch`, here forked from the tests and joined by gloo on the CPU, do what one does with twice the batch."
import multiprocessing
import os
import socket
import traceback
from types import SimpleNamespace

import pytest
import torch
from datasets import DatasetDict

from dinov3_nb import DataArguments, ModelArguments, QuantizationArguments, TrainArguments, train, training
from dinov3_nb.backbone import load_processor
from dinov3_nb.core import FeatureArguments, make_settings
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.sources import load_digits_dataset
from dinov3_nb.model import build_classifier
from dinov3_nb.run import Loaded, _opening_lines

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")

TRAINING, VALIDATION = 96, 70  # neither validation batches of 32 nor two of them divide 70
MODEL = dict(model_name="tiny")


def reset_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState
    for state in (AcceleratorState, GradientState, PartialState): state._reset_state()


def work(rank, port, pipe, function, given):
    "What a forked process does: join the other, call the function, send what it returns."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    reset_accelerate()
    try:
        pipe.send((True, function(*given)))
        torch.distributed.destroy_process_group()
    except BaseException: pipe.send((False, traceback.format_exc()))


def in_two_processes(function, *given):
    "The results of both processes; plain values only."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, pipes, children = multiprocessing.get_context("fork"), [], []
    for rank in range(2):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(rank, port, theirs, function, given), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours), children.append(child)
    try:
        arrived = []
        for pipe in pipes:
            assert pipe.poll(120), "a process waits for the other"
            arrived.append(pipe.recv())
    finally:
        for child in children: child.join(5); child.kill()
    for fine, result in arrived: assert fine, result
    return [result for _, result in arrived]


def quick(folder, **changes):
    return TrainArguments(**{**dict(epochs=2, batch_size=8, learning_rate=1e-3, eval_every_steps=4, mixed_precision="no", warmup_ratio=0.2,
                                    no_tracking=True, checkpoint_dir=str(folder)), **changes})


def whole_run(digits, folder, **changes):
    "A run on kept features as its user starts it: the log, the curves, and where the schedule ended."
    lines = []
    state = train(DataArguments(dataset="mine"), ModelArguments(**MODEL), training=quick(folder, **changes), dataset=digits,
                  features=FeatureArguments(cache_dir=str(folder.parent / "kept")), log=lines.append)
    curves = [{name: value for name, value in h.items() if name != "images_per_second"} for h in state.history]
    return dict(lines=lines, curves=curves, step=state.step, total_steps=state.total_steps, weight=state.model.head.weight.tolist(),
                schedule=state.scheduler.last_epoch, rate=state.scheduler.get_last_lr()[0], base=state.scheduler.base_lrs[0])


def scored(data, processor):
    "An untrained model on the validation images: its logits, and their labels."
    torch.manual_seed(0)
    model = build_classifier(ModelArguments(**MODEL), data.class_names)
    accelerator = training.make_accelerator(TrainArguments(mixed_precision="no"))
    _, loader = training.make_loaders(data, processor, DataArguments(dataset="mine", num_workers=0), TrainArguments())
    logits, labels, unread = training.collect_logits(accelerator.prepare(model), accelerator.prepare(loader), accelerator)
    return logits.tolist(), labels.tolist(), unread


def unfrozen(data, processor, batch_size):
    "Four steps that move the backbone too."
    torch.manual_seed(0)
    model = build_classifier(ModelArguments(freeze_backbone=False, **MODEL), data.class_names)
    model.backbone.eval()
    given = TrainArguments(epochs=1, batch_size=batch_size, learning_rate=1e-3, mixed_precision="no", eval_every_steps="epoch")
    loaders = training.make_loaders(data, processor, DataArguments(dataset="mine", num_workers=0), given)
    state = training.fit(model, *loaders, given, log=lambda line: None)
    return state.step, state.history[-1]["train_loss"], state.history[-1]["val_loss"]


class Cut(Exception): pass


def cut_and_resumed(digits, folder, **given):
    "A run that stops in the second validation, so after step 1 as far as its checkpoint knows, and goes on from there."
    score, calls = training.score, []

    def stop(*parts):
        calls.append(parts)
        if len(calls) == 2: raise Cut
        return score(*parts)
    training.score = stop
    try: whole_run(digits, folder, **given)
    except Cut: pass
    finally: training.score = score
    return whole_run(digits, folder, resume=True, **given)


UNEVEN = dict(batch_size=10, gradient_accumulation_steps=2, eval_every_steps=1)


def seeds_drawn(digits, folder):
    "What each step of a short run seeds its random numbers with."
    seeds, seed_step = [], training._seed_step
    training._seed_step = lambda seed, device: seeds.append(seed)
    try: whole_run(digits, folder, epochs=1)
    finally: training._seed_step = seed_step
    return seeds


def everything(digits, data, processor, folder):
    "All that the tests below look at, so that two processes are started once."
    return dict(run=whole_run(digits, folder / "two"), uneven=whole_run(digits, folder / "uneven", **UNEVEN),
                seeds=seeds_drawn(digits, folder / "seeds"), resumed=cut_and_resumed(digits, folder / "resumed", **UNEVEN),
                auto=whole_run(digits, folder / "auto", learning_rate="auto", epochs=1), scored=scored(data, processor),
                unfrozen=unfrozen(data, processor, 12))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    digits = load_digits_dataset()
    digits = DatasetDict(train=digits["train"].select(range(TRAINING)), validation=digits["validation"].select(range(VALIDATION)))
    data = load_and_prepare_dataset(DataArguments(dataset="mine"), 42, digits)
    return SimpleNamespace(digits=digits, data=data, processor=load_processor("tiny"), folder=tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def both(parts):
    return in_two_processes(everything, parts.digits, parts.data, parts.processor, parts.folder)


@pytest.fixture(scope="module")
def alone(parts, both):  # the processes come first: they begin with nothing kept
    reset_accelerate()
    return whole_run(parts.digits, parts.folder / "one", batch_size=16)


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


def test_an_uneven_last_step(both):
    "96 images in steps of 2 x 2 x 10: three steps an epoch, the last of 16 images, of which each process has some."
    for result in both:
        run = result["uneven"]
        assert (run["step"], run["total_steps"], run["schedule"], run["rate"]) == (6, 6, 6, 0)


def test_two_processes_resume_to_the_bit(both):
    "The images that fill up the last step are the same as without the interruption."
    for result in both:
        assert "Going on from step 1" in " ".join(result["resumed"]["lines"])
        for name in ("weight", "curves", "schedule", "rate"): assert result["resumed"][name] == result["uneven"][name], name


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


def test_a_trained_backbone_in_two_processes(parts, both):
    "Processes wait for a gradient of each parameter that learns; all of them get one."
    reset_accelerate()
    alone = unfrozen(parts.data, parts.processor, 24)
    for result in both: assert result["unfrozen"][0] == alone[0] == 4 and close(result["unfrozen"], alone, 0.05), (result["unfrozen"], alone)


def test_opening_lines_count_processes(parts):
    model = build_classifier(ModelArguments(**MODEL), parts.data.class_names)
    accelerator = SimpleNamespace(device="cpu", mixed_precision="no", num_processes=3)
    settings = make_settings(dataset="mine", epochs=5, batch_size=8, gradient_accumulation_steps=2, **MODEL)
    lines = _opening_lines(settings, Loaded(parts.data, None, model), accelerator)
    assert "Total steps: 10 (5 epochs of 2)" in lines  # 96 images, 48 a step
