"What 4 bits hold, counted by hand; what was quantized; and processors that only emulate bfloat16."
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from torch import nn

from dinov3_nb import quantization
from dinov3_nb.backbone import load_backbone
from dinov3_nb.core import ModelArguments, QuantizationArguments
from dinov3_nb.model import build_classifier
from dinov3_nb.quantization import (
    count_parameters, cpu_has_bfloat16, held_bytes, memory_lines, memory_report, quantization_config,
    quantized_layers,
)

TINY = ModelArguments(model_name="tiny")
NAMES = [str(c) for c in range(10)]


def four_bits(nested=False, **others):
    return quantization_config(QuantizationArguments(
        use_4bit=True, use_nested_quant=nested, bnb_4bit_compute_dtype="float32", **others))


@pytest.fixture(scope="module")
def small(): return build_classifier(TINY, NAMES, four_bits())


def test_flags_become_a_configuration():
    assert quantization_config(QuantizationArguments()) is None
    made = quantization_config(QuantizationArguments(
        use_4bit=True, bnb_4bit_quant_type="fp4", use_nested_quant=True, bnb_4bit_compute_dtype="float16"))
    assert made.load_in_4bit and made.bnb_4bit_use_double_quant and made.llm_int8_skip_modules == ["head"]
    assert (made.bnb_4bit_quant_type, made.bnb_4bit_compute_dtype) == ("fp4", torch.float16)


def test_levels():
    nf4, fp4 = (get_4bit_type(kind, device="cpu") for kind in ("nf4", "fp4"))
    assert (nf4.abs() < 0.25).sum() == 6 and len(nf4.unique()) == 16 and len(fp4.unique()) == 15
    assert fp4.abs().unique()[:3].tolist() == pytest.approx([0, 0.0052, 0.1667], abs=1e-4)


@pytest.mark.parametrize("kind, low, high", [("nf4", 0.08, 0.11), ("fp4", 0.10, 0.14)])
def test_error_on_bell_shaped_weights(kind, low, high):
    torch.manual_seed(0)
    weights = torch.randn(512, 1024)
    back = dequantize_4bit(*quantize_4bit(weights, blocksize=64, quant_type=kind))
    assert low < (weights - back).norm() / weights.norm() < high


def test_a_block_by_hand():
    "0 and both extremes come back exactly; 1 is the level nearest to a half, doubled."
    block = torch.zeros(64)
    block[:3] = torch.tensor([2.0, -2.0, 1.0])
    levels = get_4bit_type("nf4", device="cpu")
    nearest = 2 * levels[(levels - 0.5).abs().argmin()].item()
    back = dequantize_4bit(*quantize_4bit(block, blocksize=64, quant_type="nf4")).flatten()
    assert back[:4].tolist() == pytest.approx([2, -2, nearest, 0], abs=1e-6)


def test_only_linear_layers_of_the_backbone(small):
    found, plain = quantized_layers(small), build_classifier(TINY, NAMES)
    assert len(found) == 24 and quantized_layers(plain) == []
    assert not any(part in name for name in found for part in ("head", "norm", "embed"))
    assert {small.head.weight.dtype, small.backbone.norm.weight.dtype} == {torch.float32}
    assert count_parameters(small) == count_parameters(plain) == (819_328 + 1290, 1290)


def test_bytes_by_hand(small):
    assert held_bytes(small.backbone.model.layer[0].mlp.up_proj) == 65_536 // 2 + 1024 * 4 + 16 * 4 + 512 * 4
    nested = load_backbone("tiny", quantization_config=four_bits(nested=True))
    scales = 1024 + 4 * 4 + 256 * 4 + 4  # 8 bits each, a scale for 256 of them, their levels, the offset
    assert held_bytes(nested.model.layer[0].mlp.up_proj) == 65_536 // 2 + scales + 16 * 4 + 512 * 4
    assert held_bytes(nested) < held_bytes(small.backbone)
    assert nested.get_memory_footprint() == small.backbone.get_memory_footprint()  # which cannot tell them apart


def test_shared_tensors_count_once():
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    assert held_bytes(shared) == (16 + 4 + 4) * 4


def test_report(small):
    report = memory_report(small)
    assert 5 < report["float32"] / report["held"] < 6.5 and report["float32"] == 2 * report["bfloat16"]
    assert report["bits"] == pytest.approx(8 * report["held"] / count_parameters(small)[0])
    assert ("peak" in report) is torch.cuda.is_available()


@pytest.mark.parametrize("cpuinfo, found", [
    ("flags : fpu avx512_bf16 x", True), ("flags : fpu amx_bf16", True), ("Features : fp asimd bf16", True),
    ("flags : avx2", False), ("", False)])
def test_which_processors_have_bfloat16(cpuinfo, found): assert cpu_has_bfloat16(cpuinfo) is found


@pytest.mark.parametrize("has", [False, True])
def test_a_processor_that_emulates_bfloat16_is_named(small, has, monkeypatch):
    monkeypatch.setattr(quantization, "cpu_has_bfloat16", lambda: has)
    asked = QuantizationArguments(use_4bit=True)
    warning = quantization._compute_dtype_warning
    assert (warning(asked) is None) is has and warning(asked, "cuda") is None
    assert warning(QuantizationArguments(use_4bit=True, bnb_4bit_compute_dtype="float32")) is None
    assert warning(QuantizationArguments()) is None
    assert any("only emulates bfloat16" in line for line in memory_lines(small, asked)) is not has


def test_log_lines(small):
    asked = QuantizationArguments(use_4bit=True, bnb_4bit_compute_dtype="float32", use_nested_quant=True)
    held, quantized = memory_lines(small, asked)[:2]
    assert held.startswith("weights held: 0.6 MB, 5.66 bits a parameter (counted); float32 3.3 MB")
    assert quantized.startswith("4 bits: 24 linear layers as nf4, constants quantized too, computing in float32;")
    assert not any(line.startswith("4 bits") for line in memory_lines(build_classifier(TINY, NAMES)))
