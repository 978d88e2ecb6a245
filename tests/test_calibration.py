"Calibrations: distances equal a plain sort, no image sees itself, and a file is intact, of this head, or refused in a sentence."
import ast
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from dinov3_nb import calibration as module
from dinov3_nb.calibration import Calibration, calibration_file, fit_familiar, head_digest, load_calibration, save_calibration
from dinov3_nb.core import ModelArguments, UserError
from dinov3_nb.model import DinoV3Linear, build_classifier, export_classifier


def plain(bank, features, k, own=None):
    "The k-th nearest by a sort of everything, in float64."
    near = F.normalize(features.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    if own is not None: near[torch.arange(len(own)), own] = -9
    return 1 - near.sort(1, descending=True).values[:, k - 1]


def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---------------------------------------------------------------- distances

@pytest.mark.parametrize("images,k,real", [(300, 10, 10), (300, 1, 1), (11, 10, 10), (10, 10, 9), (2, 10, 1), (1, 10, 1), (2, 1, 1)])
@pytest.mark.parametrize("tile,queries", [(2**13, 2**9), (7, 3), (1, 1)])
def test_distances_equal_a_plain_sort(images, k, real, tile, queries, monkeypatch):
    monkeypatch.setattr(module, "_TILE", tile), monkeypatch.setattr(module, "_QUERIES", queries)
    bank, asked = unit(images, 16).half(), 5 * torch.randn(10, 16)
    found = Calibration(1.0, bank, 0.5, k, "").distances(asked)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), plain(bank, asked, real).clamp_min(0), atol=1e-3)
    assert len(Calibration(1.0, bank, 0.5, k, "").distances(asked[:0])) == 0
    assert Calibration(1.0, bank, 0.5, 1, "").distances(bank.float()).min() >= 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_precision(dtype):
    known = Calibration(1.0, unit(50, 8).half(), 0.5, 10, "")
    asked = torch.randn(20, 8).to(dtype)
    assert torch.allclose(known.distances(asked), known.distances(asked.float()), atol=1e-6)


@pytest.mark.parametrize("tile,queries", [(2**13, 2**9), (7, 3), (3, 7)])
def test_own_row_is_hidden_and_no_other(tile, queries, monkeypatch):
    monkeypatch.setattr(module, "_TILE", tile), monkeypatch.setattr(module, "_QUERIES", queries)
    x, own = unit(40, 16), torch.randperm(40)[:25]
    for k in (1, 5): assert torch.allclose(module._distances(x, x[own], k, own).double(), plain(x, x[own], k, own), atol=1e-5)


def test_an_exact_double_is_a_neighbour_like_any_other():
    twice = unit(30, 16).repeat(2, 1)[torch.randperm(60)]
    rows = torch.arange(60)
    assert module._distances(twice, twice, 1, rows).max() < 1e-5  # its double, not itself
    assert module._distances(twice, twice, 2, rows).min() > 1e-3  # and nothing else is as near
    assert fit_familiar(twice, k=1)[1] < 1e-3 < fit_familiar(twice, k=2)[1]


def test_the_table_of_similarities_stays_small(monkeypatch):
    shapes, hide = [], module._hide_own
    monkeypatch.setattr(module, "_hide_own", lambda near, columns: (shapes.append(tuple(near.shape)), hide(near, columns)))
    fit_familiar(unit(20_500, 4))
    assert max(a * b for a, b in shapes) <= 512 * 8192 and sum(a * b for a, b in shapes) == 5_000 * 20_000


# ---------------------------------------------------------------- what is familiar

def test_the_threshold_is_a_quantile_of_leave_one_out():
    x = unit(200, 16)
    for k, quantile in ((10, 0.95), (3, 0.5), (1, 1.0), (10, 0.0)):
        bank, threshold = fit_familiar(x, k, quantile)
        assert bank.dtype == torch.float16 and torch.allclose(bank.float().norm(dim=1), torch.ones(200), atol=1e-3)
        assert threshold == pytest.approx(plain(x, x, k, torch.arange(200)).quantile(quantile).item(), abs=1e-3)


def test_an_image_at_the_threshold_is_familiar_in_any_batch():
    x = unit(100, 16)
    bank, edge = fit_familiar(x[:50], k=1, quantile=1.0)
    assert Calibration(1.0, bank, edge, 1, "").familiar(x[:50]).all()
    known = Calibration(1.0, bank, 0.0, 10, "")
    there = known.distances(x)[60].item()
    assert replace(known, threshold=there).familiar(x)[60] and not replace(known, threshold=there - 1e-6).familiar(x)[60]
    same = x[:1].repeat(20, 1)  # all images the same: a threshold of nothing, and they are familiar with each other
    bank, edge = fit_familiar(same)
    for batch in (same[:1], same[:3], same): assert Calibration(1.0, bank, edge, 10, "").familiar(batch).all()
    assert edge > 5e-6 and not Calibration(1.0, bank, edge, 10, "").familiar(x[1:]).any()  # room for sums in another order


def test_a_sample_is_drawn_by_its_seed():
    x = unit(500, 8)
    first, second, other = (fit_familiar(x, most=100, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], second[0]) and first[1] == second[1] and not torch.equal(first[0], other[0])
    near = (x @ first[0].float().T).max(0)
    assert len(first[0]) == 100 and near.values.min() > 0.999 and len(near.indices.unique()) == 100  # images, each once
    assert len(fit_familiar(x, most=500)[0]) == len(fit_familiar(x)[0]) == 500
    assert fit_familiar(x, most=100)[1] > fit_familiar(x)[1]


def test_few_images():
    x = unit(12, 8)
    for n in range(2, 12): assert fit_familiar(x[:n])[1] == pytest.approx(plain(x[:n], x[:n], min(10, n - 1), torch.arange(n)).quantile(0.95).item(), abs=1e-3)
    bank, edge = fit_familiar(x[:1])
    assert edge == math.inf and len(bank) == 1 and Calibration(1.0, bank, edge, 10, "").familiar(x).all()
    for none in (x[:0], torch.full((3, 8), torch.nan)):
        with pytest.raises(UserError, match="No training image has finite features"): fit_familiar(none)


def test_what_is_not_finite_is_never_familiar_and_harms_no_other():
    x = unit(30, 8)
    bank, edge = fit_familiar(x)
    asked = x[:6].clone()
    asked[0, 1], asked[2, 0], asked[4] = torch.nan, torch.inf, -torch.inf
    for threshold in (edge, math.inf):
        found = Calibration(1.0, bank, threshold, 10, "").familiar(asked)
        assert not found[[0, 2, 4]].any() and torch.equal(found[[1, 3, 5]], Calibration(1.0, bank, threshold, 10, "").familiar(x[[1, 3, 5]]))
    spoiled = x.clone()
    spoiled[7, 3] = torch.nan
    rest = torch.cat([x[:7], x[8:]])
    assert torch.equal(fit_familiar(spoiled)[0], fit_familiar(rest)[0]) and fit_familiar(spoiled)[1] == fit_familiar(rest)[1]
    assert Calibration(1.0, bank, edge, 10, "").familiar(torch.zeros(1, 8)).shape == (1,)  # no direction, no crash


def test_probabilities():
    known, logits = Calibration(2.5, unit(3, 2).half(), 0.1, 1, ""), torch.randn(5, 4)
    assert torch.allclose(known.probabilities(logits), (logits / 2.5).softmax(1)) and known.probabilities(logits.half()).dtype == torch.float32


# ---------------------------------------------------------------- the file

class Model(nn.Module):
    "What a calibration needs of a classifier."
    def __init__(self, width=6, seed=0, pool="cls"):
        super().__init__()
        torch.manual_seed(seed)
        self.head, self.config = nn.Linear(width, 3), SimpleNamespace(pool=pool)


@pytest.fixture
def model(): return Model()


@pytest.fixture
def made(model): return Calibration(1.3, unit(5, 6).half(), 0.1234567890123, 10, head_digest(model))


def test_what_is_written_is_read(made, model, tmp_path):
    for threshold in (0.1234567890123, 0.0, math.inf):
        save_calibration(replace(made, threshold=threshold), tmp_path / "a.safetensors")
        found = load_calibration(tmp_path / "a.safetensors", model)
        assert (found.temperature, found.threshold, found.k, found.head) == (1.3, threshold, 10, made.head) and torch.equal(found.bank, made.bank)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    save_calibration(replace(made, bank=made.bank.T.contiguous().T), str(tmp_path / "b.safetensors"))  # in memory another way round
    assert torch.equal(load_calibration(str(tmp_path / "b.safetensors"), model).bank, made.bank)


def test_of_no_head_or_another_head_there_is_none(made, model, tmp_path):
    assert load_calibration(tmp_path / "a.safetensors", model) is None
    save_calibration(made, tmp_path / "a.safetensors")
    for other in (Model(seed=1), Model(pool="mean"), Model(width=7)): assert load_calibration(tmp_path / "a.safetensors", other) is None


def test_a_failed_write_leaves_the_old_file(made, model, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_calibration(made, path)
    def full(*_): raise OSError(28, "No space left on device")
    for name in ("replace", "fsync"):
        with monkeypatch.context() as broken:
            broken.setattr(module.os, name, full)
            with pytest.raises(UserError, match="a.safetensors could not be written .*No space left.*free some space"): save_calibration(replace(made, k=3), path)
    assert load_calibration(path, model).k == 10 and os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(UserError, match="could not be written"): save_calibration(made, tmp_path / "nowhere" / "a.safetensors")


def test_any_flipped_bit_and_any_cut_is_noticed(made, model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_calibration(made, path)
    content, refused = path.read_bytes(), 0
    damaged = [content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1:] for i in range(len(content))]
    for data in [*damaged, *(content[:i] for i in range(0, len(content), 20)), content + b"x", b"\xff" * 100, b"\x80\x04K\x01."]:
        path.write_bytes(data)
        try: found = load_calibration(path, model)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "`dinov3-nb report`, or remove it." in str(error)
        else: assert found is None or torch.equal(found.bank, made.bank) and found.threshold == made.threshold  # a space in the header
    assert refused > 0.8 * len(content)


HOSTILE = {
    "temperature": ["nan", "0", "-1", "inf", "1e300", "1e-300", "x", ""], "threshold": ["nan", "-1", "x", ""],
    "k": ["0", "-3", "1.5", "nan", "x", "9" * 5000, ""],
    "bank": [torch.ones(5, 6), torch.ones(5, 7).half(), torch.ones(6).half(), torch.ones(0, 6).half(), torch.full((5, 6), torch.inf).half(), torch.ones(1, 5, 6).half()],
}


@pytest.mark.parametrize("name,value", [(name, value) for name in HOSTILE for value in HOSTILE[name]], ids=lambda value: str(value)[:12])
def test_well_made_nonsense_is_refused(name, value, made, model, tmp_path):
    told, bank = {"temperature": "1.0", "threshold": "0.1", "k": "10", "head": made.head}, made.bank
    if name == "bank": bank = value
    else: told[name] = value
    told["digest"] = module._digest(told, bank)
    (tmp_path / "a.safetensors").write_bytes(save({"bank": bank}, told))
    with pytest.raises(UserError, match=r"a.safetensors is no intact calibration \(.+\): write it again with `dinov3-nb report`"):
        load_calibration(tmp_path / "a.safetensors", model)


def test_what_is_missing_is_named(made, model, tmp_path):
    path, whole = tmp_path / "a.safetensors", {"temperature": "1.0", "threshold": "0.1", "k": "10", "head": made.head}
    whole["digest"] = module._digest(whole, made.bank)
    for name in whole:
        path.write_bytes(save({"bank": made.bank}, {key: value for key, value in whole.items() if key != name}))
        with pytest.raises(UserError, match=f"no '{name}'"): load_calibration(path, model)
    for content in (save({"bank": made.bank}), save({"bunk": made.bank}, whole)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.safetensors is no intact calibration"): load_calibration(path, model)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="a.safetensors is no intact calibration"): load_calibration(path, model)


def test_where_it_stands(tmp_path):
    assert calibration_file(tmp_path / "best.pt") == tmp_path / "best.calibration.safetensors"
    assert calibration_file(tmp_path / "my.run.v2.pt").name == "my.run.v2.calibration.safetensors"
    assert calibration_file(str(tmp_path)) == tmp_path / "best.calibration.safetensors"
    (tmp_path / "config.json").write_text("{}")
    assert calibration_file(tmp_path) == tmp_path / "calibration.safetensors"


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_classifier_of_ours_keeps_its_digest_when_it_is_exported(head, tmp_path):
    from dinov3_nb.backbone import load_processor
    model = build_classifier(ModelArguments(model_name="tiny", head=head), ["a", "b"])
    export_classifier(model, load_processor("tiny"), tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert head_digest(again) == head_digest(model) != head_digest(build_classifier(ModelArguments(model_name="tiny", head=head), ["a", "b"]))
    bank, threshold = fit_familiar(torch.randn(20, 128))
    save_calibration(Calibration(1.0, bank, threshold, 10, head_digest(model)), calibration_file(tmp_path))
    assert load_calibration(calibration_file(tmp_path), type(model).from_pretrained(tmp_path)).threshold == threshold
    assert isinstance(model, DinoV3Linear) == (head == "linear")


def test_predict_can_import_it():
    tree = ast.parse(open(module.__file__, encoding="utf-8").read())
    own = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level}
    others = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level} | {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert own == {"core", "weights"} and not {name.split(".")[0] for name in others} & {"datasets", "sklearn", "scipy", "matplotlib", "accelerate"}
