"Local folders of each family train one epoch: frozen, frozen in 4 bits, and unfrozen."
import pytest
import torch
from helpers import make_image_folder, save_convnext, save_timm, save_vits16

from dinov3_nb import DataArguments, ModelArguments, QuantizationArguments, TrainArguments, UserError, load_classifier, train

FAMILIES = {"vits16": save_vits16, "convnext": save_convnext, "timm": save_timm}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images"), per_class=4)


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request, tmp_path_factory):
    if request.param == "timm": pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp(request.param) / "backbone"
    FAMILIES[request.param](folder)
    return folder


def run(images, backbone, folder, freeze=True, four_bits=False):
    size = 64  # small pictures keep the test quick; the weights are those of the true configuration
    arguments = TrainArguments(epochs=1, batch_size=4, checkpoint_dir=str(folder), no_tracking=True, mixed_precision="no")
    return train(DataArguments(dataset=str(images), num_workers=0),
                 ModelArguments(model_name=str(backbone), freeze_backbone=freeze, image_size=size),
                 QuantizationArguments(use_4bit=four_bits, bnb_4bit_compute_dtype="float32"), arguments, log=lambda line: None)


@pytest.mark.parametrize("freeze, four_bits", [(True, False), (True, True), (False, False)], ids=["frozen", "frozen-4bit", "unfrozen"])
def test_trains_and_loads(images, backbone, tmp_path, freeze, four_bits):
    state = run(images, backbone, tmp_path / "run", freeze, four_bits)
    assert state.step == 3 and all(torch.isfinite(p).all() for p in state.model.head.parameters())
    kept = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model_state_dict"]
    assert any(k.startswith("backbone.") for k in kept) is not freeze
    picture = next((images / "val").rglob("*.png"))
    again = load_classifier(tmp_path / "run" / "last.pt").predict(picture)[0].labels
    assert {name for name, _ in again} == {"circle", "square", "stripes"}
    assert abs(sum(p for _, p in again) - 1) < 1e-5


def test_4bit_and_unfrozen_is_refused(images, backbone, tmp_path):
    with pytest.raises(UserError, match="4-bit weights take no gradient steps"):
        run(images, backbone, tmp_path, freeze=False, four_bits=True)
