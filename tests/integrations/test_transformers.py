"""Real models, loaded by plan: what they answer, and how far they are from the originals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.schema import read_layers
from blockscale.errors import CheckpointError, ModelError, PlanError
from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0, BlockFormat, DType
from blockscale.integrations.transformers import generate_text, load_model
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.policy import PlanPolicy

pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")
pytestmark = pytest.mark.weights

FORMATS = {"fp32": FP8_128X128_FP32, "ue8m0": FP8_128X128_UE8M0}


@pytest.fixture(scope="module")
def quantized(
    smollm2: Path, smollm2_fp8: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    ue8m0 = tmp_path_factory.mktemp("smollm2") / "ue8m0"
    quantize_checkpoint(read_checkpoint(smollm2), ue8m0, QuantizeOptions(FORMATS["ue8m0"]))
    return {"fp32": smollm2_fp8, "ue8m0": ue8m0}


def linked(whole: str | Path, copy: str | Path) -> None:
    """As ``shutil.copy2``, but weights (163 MB) become a link: to be replaced, not written to."""
    if str(whole).endswith(".safetensors"):
        Path(copy).hardlink_to(whole)
    else:
        shutil.copy2(whole, copy)


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("scales", FORMATS)
def test_smollm2_knows_the_capital_of_france(
    quantized: dict[str, Path], scales: str, dtype: DType
) -> None:
    loaded = load_model(quantized[scales], dtype=dtype)
    assert {name for layer in loaded.plan.layers for name in layer.backends} == {"cpu"}
    replaced = [m for m in loaded.model.modules() if isinstance(m, BlockScaledLinear)]
    assert len(replaced) == 210
    result = generate_text(loaded, quantized[scales], "The capital of France is", 6)
    assert "Paris" in result.text


def test_reference_backend_answers_too(quantized: dict[str, Path]) -> None:
    loaded = load_model(quantized["fp32"], policy=PlanPolicy(backends=("reference",)))
    result = generate_text(loaded, quantized["fp32"], "The capital of France is", 4)
    assert "Paris" in result.text


def test_a_plan_without_backend_raises_before_weights_are_read(quantized: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match="deep_gemm"):
        load_model(quantized["fp32"], policy=PlanPolicy(backends=("deep_gemm",)))


def test_a_checkpoint_that_lacks_a_parameter_is_named(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(quantized["fp32"], broken, copy_function=linked)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    (broken / "model.safetensors").unlink()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_model(broken)


def test_a_config_of_another_model_is_named(quantized: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(quantized["fp32"], broken, copy_function=linked)
    config = json.loads((broken / "config.json").read_text())
    config["intermediate_size"] = 1024
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json is not its own"):
        load_model(broken)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"hidden_size": 512}, r"config\.json: .*not a multiple of the number of"),
        ("config.json", {"hidden_size": "576"}, r"config\.json: .*expected int, got str"),
        ("config.json", {"hidden_act": "nope"}, r"config\.json: KeyError: 'nope'"),
        ("generation_config.json", None, r"generation_config\.json is none .*; remove it"),
    ],
)
def test_a_damaged_config_is_one_clear_error(
    quantized: dict[str, Path],
    tmp_path: Path,
    file: str,
    change: dict[str, object] | None,
    words: str,
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(quantized["fp32"], broken, copy_function=linked)
    path = broken / file
    whole = json.loads(path.read_text()) if change else {}
    path.write_text(json.dumps(whole | change) if change else "[1")
    with pytest.raises(ModelError, match=words) as caught:
        load_model(broken)
    assert str(caught.value).isprintable()


def test_no_tokenizer_is_one_clear_error(quantized: dict[str, Path], tmp_path: Path) -> None:
    loaded = load_model(quantized["fp32"])
    with pytest.raises(ModelError, match="tokenizer"):
        generate_text(loaded, tmp_path, "Hello", 1)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_minilm_sentences_keep_their_meaning(
    minilm: Path, tmp_path: Path, fmt: BlockFormat
) -> None:
    """A BERT encoder with biases: every linear replaced by hand, the way a user would."""
    from transformers import AutoModel, AutoTokenizer

    target = tmp_path / "fp8"
    quantize_checkpoint(read_checkpoint(minilm), target, QuantizeOptions(fmt))
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    inputs = tokenizer(
        ["Block scales keep small weights alive.", "The cat sat on the mat."],
        return_tensors="pt",
        padding=True,
    )
    original = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    _replace(model, target)
    with torch.inference_mode():
        exact, ours = (m(**inputs).last_hidden_state.mean(1) for m in (original, model))
    assert torch.nn.functional.cosine_similarity(exact, ours).min() > 0.99


def _replace(model: torch.nn.Module, folder: Path) -> None:
    from blockscale.checkpoint.tensors import read_block_scaled
    from blockscale.integrations.transformers import plan_modules
    from blockscale.planning.device import Device

    checkpoint = read_checkpoint(folder)
    layers = read_layers(checkpoint)
    plan = plan_modules(checkpoint, layers, DType.FLOAT32, Device.named("cpu"), PlanPolicy())
    stored = {layer.name: layer for layer in layers.quantized}
    assert len(plan.layers) > 30
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        model.set_submodule(
            layer.name,
            BlockScaledLinear(layer, read_block_scaled(stored[layer.name]), module.bias),
        )


def test_unquantized_checkpoints_are_loaded_as_they_are(smollm2: Path) -> None:
    """No FP8 layer, nothing replaced: `generate` works on the original too."""
    loaded = load_model(smollm2)
    assert loaded.plan.layers == ()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(tmp_path / "nowhere")
