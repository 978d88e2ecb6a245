"An average of weights: what PyTorch's own makes of the same steps, and nothing of it left where it does not belong."
import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dinov3_nb.average import WeightAverage, warmed_decay


def make_model(freeze=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    if freeze: model[0].requires_grad_(False)
    return model


def train(model, steps, after=lambda: None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        after()
    return model


def weights(model): return [p.detach().clone() for p in model.parameters()]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_it_is_torchs_average_once_it_is_warm(decay):
    model = make_model(freeze=False)
    ours, theirs = WeightAverage(model, decay), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    ours.updates, theirs.n_averaged = 10_000, theirs.n_averaged + 1

    def update():
        ours.update()
        theirs.update_parameters(model)
    train(model, 200, update)
    mean = ours.state_dict()["mean"]
    for name, p in theirs.module.named_parameters(): assert torch.allclose(mean[name], p, atol=1e-6), name


def test_the_warm_up_rises_to_the_decay():
    rising = [warmed_decay(0.99, t) for t in range(1000)]
    assert rising == sorted(rising) and rising[0] == 0.1 and rising[-1] == 0.99 and warmed_decay(0.0, 5) == 0.0


def test_without_a_decay_it_is_the_last_step():
    model = make_model()
    average = WeightAverage(model, 0.0)
    train(model, 3, average.update)
    after = weights(model)
    with average.in_model(): assert same(weights(model), after)


def test_only_what_learns_is_averaged():
    model = make_model()
    average = WeightAverage(model, 0.9)
    frozen = model[0].weight.data_ptr()
    train(model, 5, average.update)
    with average.in_model(): assert model[0].weight.data_ptr() == frozen
    assert average.names == ["1.weight", "1.bias", "2.weight", "2.bias"]


def test_a_look_at_the_average_does_not_change_the_run():
    looked, plain = make_model(), train(make_model(), 20)
    average = WeightAverage(looked, 0.9)

    def look():
        average.update()
        with average.in_model(), torch.no_grad(): looked[2](torch.zeros(1, 8))
    assert same(weights(train(looked, 20, look)), weights(plain))


def test_both_sides_are_named_whichever_the_model_holds():
    model = make_model()
    average = WeightAverage(model, 0.9)
    train(model, 5, average.update)
    outside = copy.deepcopy(average.state_dict())
    with average.in_model(): inside = copy.deepcopy(average.state_dict())
    for side in ("mean", "weights"):
        assert all(torch.equal(outside[side][name], inside[side][name]) for name in average.names)
    assert not torch.equal(outside["mean"]["2.weight"], outside["weights"]["2.weight"])
    other = WeightAverage(make_model(), 0.9)
    other.exchange()  # as a finished run leaves it
    other.load_state_dict(inside)
    assert same(other.state_dict()["mean"].values(), inside["mean"].values()) and other.updates == 5
    assert same([p.detach() for p in other.parameters], [p.detach() for p in average.parameters])


def test_an_exception_puts_the_weights_back():
    model = make_model()
    average, before = WeightAverage(model, 0.9), weights(model)
    average.others = [torch.zeros_like(value) for value in average.others]
    with pytest.raises(KeyboardInterrupt):
        with average.in_model(): raise KeyboardInterrupt
    assert same(weights(model), before) and not average.is_in_model
