"""``from_pretrained(..., quantization_config=BlockScaleConfig())``: loads by plan, saves bytes."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")

from blockscale.checkpoint.convert import (
    ConvertOptions,
    Dialect,
    ScaleStorage,
    convert_checkpoint,
)
from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.errors import ModelError, PlanError
from blockscale.integrations.transformers import BlockScaleConfig, load_model
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.policy import PlanPolicy
from blockscale.reference import scale_values

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = torch.arange(3, 13)[None]
PLANNED_LAYERS = 14
# The default on a machine with a C++ compiler, and what runs anywhere.
BACKEND_NAMES = ("cpu", "reference")


def from_pretrained(folder: Path, policy: PlanPolicy | None = None, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BlockScaleConfig(policy), **more
    )


def planned(model: torch.nn.Module) -> dict[str, BlockScaledLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockScaledLinear)}


def logits(model: Any, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits
        return result


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_bytes(first: Path, second: Path) -> None:
    before, after = tensors_of(first), tensors_of(second)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype, name
        assert tensor.shape == after[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_loads_by_plan_what_load_model_loads(tiny_fp8: Path, backend: str, dtype: str) -> None:
    from blockscale.formats import DType

    policy = PlanPolicy(backends=(backend,))
    model = from_pretrained(tiny_fp8, policy, dtype=dtype)
    layers = planned(model)
    assert len(layers) == PLANNED_LAYERS
    assert {name for layer in layers.values() for name in layer.plan.backends} == {backend}
    assert model.dtype is getattr(torch, dtype)
    by_hand = load_model(tiny_fp8, dtype=DType(dtype), policy=policy).model
    assert torch.equal(logits(model), logits(by_hand))


def test_a_model_without_its_head_loads_and_misses_nothing(tiny_fp8: Path) -> None:
    """Its modules have other names than the checkpoint's layers."""
    from transformers import AutoModel

    body, told = AutoModel.from_pretrained(
        tiny_fp8, quantization_config=BlockScaleConfig(), output_loading_info=True
    )
    assert len(planned(body)) == PLANNED_LAYERS
    assert not told["unexpected_keys"]
    assert not told["missing_keys"]
    with torch.inference_mode():
        expected = from_pretrained(tiny_fp8).model(PROMPT).last_hidden_state
        assert torch.equal(body(PROMPT).last_hidden_state, expected)


def test_no_weight_becomes_a_float(tiny_fp8: Path) -> None:
    """The codes in memory are the file's: nothing was dequantized."""
    stored = tensors_of(tiny_fp8)
    for name, layer in planned(from_pretrained(tiny_fp8)).items():
        assert torch.equal(
            layer.weight.data.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8)
        )


def test_scales_that_contradict_their_declaration_are_not_rounded(
    tiny_fp8: Path, tmp_path: Path
) -> None:
    """The trap: ``scale_fmt: ue8m0`` declared over float32 scales that are no powers of two."""
    folder = tmp_path / "declared"
    shutil.copytree(tiny_fp8, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (folder / "config.json").write_text(json.dumps(config))
    stored = tensors_of(folder)
    model = from_pretrained(folder)
    for name, layer in planned(model).items():
        assert torch.equal(scale_values(layer.weight), stored[f"{name}.weight_scale_inv"])
    assert torch.equal(logits(model), logits(from_pretrained(tiny_fp8)))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("stored", ["fp32", "ue8m0", "e8m0", "compressed-tensors", "bf16"])
def test_save_gives_the_same_bytes(
    stored: str, backend: str, tiny_fp8: Path, tiny_ue8m0: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stored"
    if stored == "e8m0":
        options = ConvertOptions(Dialect.HF_FP8, ScaleStorage.E8M0)
        convert_checkpoint(read_checkpoint(tiny_ue8m0), folder, options)
    elif stored == "compressed-tensors":
        options = ConvertOptions(Dialect.COMPRESSED_TENSORS, ScaleStorage.KEEP)
        convert_checkpoint(read_checkpoint(tiny_fp8), folder, options)
    else:
        shutil.copytree(tiny_ue8m0 if stored == "ue8m0" else tiny_fp8, folder)
    if stored == "bf16":
        tensors = tensors_of(folder)
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].to(torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = from_pretrained(folder, PlanPolicy(backends=(backend,)))
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    assert_same_bytes(folder, saved)
    declared, kept = (
        json.loads((path / "config.json").read_text())["quantization_config"]
        for path in (folder, saved)
    )
    assert declared == kept
    assert torch.equal(logits(from_pretrained(saved)), logits(from_pretrained(folder)))


def test_shards_load_and_save_the_same_bytes(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder, saved = tmp_path / "sharded", tmp_path / "saved"
    options = QuantizeOptions(max_shard_bytes=300_000)
    assert quantize_checkpoint(read_checkpoint(tiny_qwen3), folder, options).shards > 2
    model = from_pretrained(folder)
    model.save_pretrained(saved, max_shard_size="300KB")
    assert len(list(saved.glob("*.safetensors"))) > 2
    assert_same_bytes(folder, saved)


def test_biases_are_loaded_and_saved(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "bf16")
    folder, saved = tmp_path / "fp8", tmp_path / "saved"
    quantize_checkpoint(read_checkpoint(tmp_path / "bf16"), folder)
    loaded = from_pretrained(folder)
    bias = loaded.model.layers[0].self_attn.q_proj.bias
    assert torch.equal(bias, model.model.layers[0].self_attn.q_proj.bias)
    loaded.save_pretrained(saved)
    assert_same_bytes(folder, saved)


def test_another_model_dtype_keeps_the_fp8_tensors(tiny_fp8: Path, tmp_path: Path) -> None:
    """Norms and embeddings are then saved in that dtype, as transformers does; codes stay."""
    from_pretrained(tiny_fp8, dtype=torch.float32).save_pretrained(tmp_path)
    before, after = tensors_of(tiny_fp8), tensors_of(tmp_path)
    fp8 = [name for name in before if f"{name}_scale_inv" in before or name.endswith("scale_inv")]
    assert len(fp8) == 2 * PLANNED_LAYERS
    for name in fp8:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))


def test_generate_with_a_static_cache(tiny_fp8: Path) -> None:
    model = from_pretrained(tiny_fp8)
    options = {"max_new_tokens": 12, "do_sample": False}
    dynamic = model.generate(PROMPT, **options)
    static = model.generate(PROMPT, cache_implementation="static", **options)
    assert dynamic.shape == (1, PROMPT.shape[1] + 12)
    assert torch.equal(dynamic, static)


def test_compiles_without_graph_breaks(tiny_fp8: Path) -> None:
    model = from_pretrained(tiny_fp8, dtype=torch.float32)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for ids in (PROMPT, PROMPT[:, :1]):
            found = compiled(input_ids=ids, use_cache=False).logits
            assert torch.equal(found, model(ids, use_cache=False).logits)


def test_policy_of_the_environment_applies(tiny_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKSCALE_BACKENDS", "reference")
    layers = planned(from_pretrained(tiny_fp8)).values()
    assert {name for layer in layers for name in layer.plan.backends} == {"reference"}


def test_a_plan_without_backend_raises_before_weights_are_read(tiny_fp8: Path) -> None:
    with pytest.raises(PlanError, match="deep_gemm"):
        from_pretrained(tiny_fp8, PlanPolicy(backends=("deep_gemm",)))


def test_an_unquantized_checkpoint_is_refused_with_a_cure(tiny_qwen3: Path) -> None:
    with pytest.raises(ModelError, match="blockscale quantize"):
        from_pretrained(tiny_qwen3)


def test_a_model_spread_over_devices_is_refused(tiny_fp8: Path) -> None:
    with pytest.raises(ModelError, match="plans for one device"):
        from_pretrained(tiny_fp8, device_map={"model": "cpu", "lm_head": "disk"})


def test_a_config_of_another_model_is_named(tiny_fp8: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_fp8, folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json is not its own"):
        from_pretrained(folder)


def test_other_configs_still_go_their_own_way() -> None:
    """The registered hook is for ``BlockScaleConfig`` alone."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        AutoHfQuantizer.merge_quantization_configs(declared, BitsAndBytesConfig(load_in_8bit=True))
    merged = AutoHfQuantizer.merge_quantization_configs(declared, None)
    assert type(merged).__name__ == "FineGrainedFP8Config"


def test_the_model_reports_what_runs(tiny_fp8: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="blockscale"):
        model = from_pretrained(tiny_fp8, PlanPolicy(backends=("cpu",)))
    report = model.blockscale_report()
    assert report.backends == {"cpu": PLANNED_LAYERS}
    assert {layer.module for layer in report.layers} == planned(model).keys()
    names = [record.name for record in caplog.records]
    assert names == ["blockscale.plan", "blockscale.prepare"]
    assert caplog.records[1].blockscale["bytes"] == report.bytes  # type: ignore[attr-defined]
    copied = copy.deepcopy(model)
    copied.model.layers[0].self_attn.q_proj = torch.nn.Identity()
    assert len(copied.blockscale_report().layers) == PLANNED_LAYERS - 1
    assert len(model.blockscale_report().layers) == PLANNED_LAYERS


def test_ranges_come_with_the_environment(tiny_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", marks.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    monkeypatch.setenv("BLOCKSCALE_RANGES", "nvtx")
    logits(from_pretrained(tiny_fp8, PlanPolicy(backends=("cpu",))))
    assert len(marks) == PLANNED_LAYERS
    assert "blockscale model.layers.1.mlp.down_proj (cpu)" in marks
