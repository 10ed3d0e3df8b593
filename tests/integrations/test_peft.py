"""LoRA on a planned FP8 model: trains, saves, refuses to merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("peft", reason="pip install peft")

from blockscale.errors import ModelError
from blockscale.integrations.peft import LoraBlockScaledLinear, on_block_scaled
from blockscale.integrations.transformers import BlockScaleConfig
from blockscale.modules.linear import BlockScaledLinear

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora_config(**more: Any) -> Any:
    from peft import LoraConfig

    return on_block_scaled(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **more))


def base_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BlockScaleConfig(), dtype=dtype
    )


def adapted(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    from peft import get_peft_model

    torch.manual_seed(0)
    return get_peft_model(base_model(folder, dtype), lora_config(**more))


def codes(model: torch.nn.Module) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, BlockScaledLinear)]
    return [layer.data.view(torch.uint8).clone() for layer in layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_few_steps_lower_the_loss_and_leave_the_codes(tiny_fp8: Path, dtype: torch.dtype) -> None:
    model = adapted(tiny_fp8, dtype)
    wrapped = [m for m in model.modules() if isinstance(m, LoraBlockScaledLinear)]
    assert len(wrapped) == 6
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 12
    before, losses = codes(model), []
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, codes(model), strict=True))


def test_gradients_reach_adapters_below_other_fp8_layers(tiny_fp8: Path) -> None:
    """q_proj of the first layer learns only through every FP8 layer above it."""
    model = adapted(tiny_fp8)
    model(input_ids=IDS, labels=IDS).loss.backward()
    first = model.base_model.model.model.layers[0].self_attn.q_proj
    assert float(first.lora_B["default"].weight.grad.abs().max()) > 0


def test_new_adapters_change_nothing(tiny_fp8: Path) -> None:
    with torch.inference_mode():
        assert torch.equal(adapted(tiny_fp8).eval()(IDS).logits, base_model(tiny_fp8)(IDS).logits)


def test_adapters_are_saved_and_loaded(tiny_fp8: Path, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    model = adapted(tiny_fp8, init_lora_weights=False).eval()
    model.save_pretrained(tmp_path)
    kept = get_peft_model_state_dict(model)
    loaded = PeftModel.from_pretrained(base_model(tiny_fp8), tmp_path, config=lora_config()).eval()
    found = get_peft_model_state_dict(loaded)
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    with torch.inference_mode():
        changed, again = model(IDS).logits, loaded(IDS).logits
        with model.disable_adapter():
            plain = model(IDS).logits
    assert torch.equal(changed, again)
    assert not torch.equal(changed, plain)


def test_the_base_of_an_adapted_model_is_not_saved_by_accident(
    tiny_fp8: Path, tmp_path: Path
) -> None:
    model = adapted(tiny_fp8)
    with pytest.raises(ModelError, match="unload the adapters"):
        model.base_model.model.save_pretrained(tmp_path)
    model.unload().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_merging_is_refused(tiny_fp8: Path) -> None:
    with pytest.raises(ModelError, match="rounded again"):
        adapted(tiny_fp8).merge_and_unload()


def test_variants_that_need_the_weight_are_refused() -> None:
    with pytest.raises(ModelError, match="use_dora"):
        lora_config(use_dora=True)
