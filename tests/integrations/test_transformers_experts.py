"""Qwen3-MoE and MiniMax-M2, as transformers has them, from checkpoints named as on the Hub.

Three claims, each with its own comparison. *Plumbing*: the `cpu` backend quantizes no activation,
so its logits are those of transformers' own model with dequantized weights, up to float32 sums.
*Kernel error*: `reference` quantizes activations, so it is compared with that model with quantized
activations. *Quantization error*: what that costs, with the same experts chosen in both models: a
token that goes to another expert because two were nearly tied is another answer, not an error.
(With free routing the logits of these models differ by 14 % and 23 %, with the same experts by 10 %
and 6 %: among random weights, near ties are frequent.)
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")

from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.tensors import read_block_scaled
from blockscale.errors import CheckpointError, ModelError
from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, FP8_128X128_UE8M0, DType
from blockscale.integrations.transformers import load_model
from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.policy import PlanPolicy
from blockscale.reference import dequantize, quantize
from blockscale.reference.fused import silu_and_multiply
from blockscale.testing.moe_models import (
    CHOICES,
    EXPERTS,
    FAMILIES,
    LAYERS,
    FixedRouter,
    names_on_disk,
    new_model,
    write_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    Disturbance = Callable[[torch.Tensor], torch.Tensor]

TOKENS = 24
# What a router compares differs by about 1e-6 between two orders of float32 sums.
MARGIN = 1e-4


@dataclass(frozen=True)
class Case:
    """A model, its FP8 checkpoint, the same model with dequantized weights, and a prompt."""

    family: str
    fp8: Path
    dequantized: PreTrainedModel
    prompt: torch.Tensor

    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        with torch.inference_mode():
            return model(self.prompt).logits.double()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    with torch.random.fork_rng():
        model = new_model(family)
        prompt = torch.randint(3, 96, (2, TOKENS // 2))
    write_checkpoint(model, family, folder / "bf16")
    options = QuantizeOptions(FP8_128X128_FP32)
    quantize_checkpoint(read_checkpoint(folder / "bf16"), folder / "fp8", options)
    return Case(family, folder / "fp8", with_dequantized(model, family, folder / "fp8"), prompt)


def with_dequantized(model: PreTrainedModel, family: str, folder: Path) -> PreTrainedModel:
    layers = read_layers(read_checkpoint(folder)).quantized
    values = {layer.weight.name: dequantize(read_block_scaled(layer)) for layer in layers}
    assert len(values) > EXPERTS * 3 * 2
    model = copy.deepcopy(model)
    for name, value in model.state_dict().items():
        for stored, expert, half in names_on_disk(family, name):
            if stored in values:
                part = value if expert is None else value[expert]
                part = part if half is None else part.chunk(2)[half]
                part.copy_(values.pop(stored))
    assert not values
    return model


@dataclass
class Routing:
    """What the routers of a model chose, layer after layer, and by how much."""

    chosen: list[torch.Tensor] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


def recorded(model: PreTrainedModel, case: Case) -> tuple[torch.Tensor, Routing]:
    """Logits, with each router's choice and the least distance to the first that was not chosen."""
    routing, hooks = Routing(), []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        logits, _, chosen = output
        score = logits.double()
        if len(inputs) > 1:  # MiniMax chooses by sigmoid and a bias.
            score = score.sigmoid() + inputs[1].double()
        best = score.sort(-1, descending=True).values
        routing.margins.append(float((best[:, CHOICES - 1] - best[:, CHOICES]).min()))
        assert module.top_k == CHOICES
        routing.chosen.append(chosen)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            hooks.append(module.register_forward_hook(record))
    logits = case.logits(model)
    for hook in hooks:
        hook.remove()
    return logits, routing


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("scales", [FP8_128X128_FP32, FP8_128X128_UE8M0], ids=str)
def test_plumbing_logits_are_those_of_the_dequantized_model(
    case: Case, scales: object, tmp_path: Path
) -> None:
    """Every weight in its place, every token at its experts: 1e-5 is float32 sums, nothing else."""
    folder, exact_model = case.fp8, case.dequantized
    if scales is FP8_128X128_UE8M0:
        folder = tmp_path / "ue8m0"
        options = QuantizeOptions(FP8_128X128_UE8M0)
        quantize_checkpoint(read_checkpoint(case.fp8.parent / "bf16"), folder, options)
        exact_model = with_dequantized(case.dequantized, case.family, folder)
    loaded = load_model(folder, dtype=DType.FLOAT32)
    assert {name for layer in loaded.plan.layers for name in layer.backends} == {"cpu"}
    assert not [f for f in loaded.plan.findings if f.code == "plan_only"]
    modules = list(loaded.model.modules())
    sets = LAYERS - 1 if case.family == "qwen3_moe" else LAYERS
    assert sum(isinstance(module, BlockScaledExperts) for module in modules) == sets
    dense = 4 * LAYERS + (3 if case.family == "qwen3_moe" else 0)
    assert sum(isinstance(module, BlockScaledLinear) for module in modules) == dense
    assert len(loaded.plan.layers) == dense + 2 * sets
    logits, routing = recorded(loaded.model, case)
    exact, wanted = recorded(exact_model, case)
    assert min(wanted.margins) > MARGIN
    assert all(map(torch.equal, routing.chosen, wanted.chosen))
    assert relative(logits, exact) < 1e-5


class DisturbedExperts(nn.Module):
    """The definition, expert by expert, on dequantized weights and disturbed activations."""

    def __init__(self, experts: Any, disturb: Disturbance) -> None:
        super().__init__()
        self.gate_up, self.down, self.disturb = experts.gate_up_proj, experts.down_proj, disturb

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        rows, out = self.disturb(hidden), torch.zeros_like(hidden)
        for choice in range(ids.shape[1]):
            for expert in range(EXPERTS):
                here = (ids[:, choice] == expert).nonzero().squeeze(1)
                activated = silu_and_multiply(rows[here] @ self.gate_up[expert].T)
                product = self.disturb(activated) @ self.down[expert].T
                out[here] += product * weights[here, choice, None]
        return out


def fake_quantized(values: torch.Tensor) -> torch.Tensor:
    return dequantize(quantize(values, FP8_1X128_FP32))


def with_disturbed_activations(case: Case, disturb: Disturbance) -> PreTrainedModel:
    """The dequantized model, with the input of every planned product changed."""
    model = copy.deepcopy(case.dequantized)
    planned = {layer.name for layer in by_reference(case).plan.layers}
    count = 0
    for name, module in list(model.named_modules()):
        if name.endswith("mlp.experts"):
            model.set_submodule(name, DisturbedExperts(module, disturb))
        elif name in planned:
            count += 1
            module.register_forward_pre_hook(lambda _, inputs: (disturb(inputs[0]),))
    assert count == 4 * LAYERS + (3 if case.family == "qwen3_moe" else 0)
    return model


def by_reference(case: Case) -> Any:
    policy = PlanPolicy(backends=("reference",))
    return load_model(case.fp8, dtype=DType.FLOAT32, policy=policy)


def test_kernel_error_of_the_reference(case: Case) -> None:
    """The same arithmetic in another order of sums.

    A value beside a boundary of E4M3 may then take the neighbouring code: 6 % of one of a token's
    256 values is 0.4 % of its product, and one token of 24 that has it 0.08 % of all logits.
    Everything else is float32 rounding, below 1e-6; routing has a margin.
    """
    logits, routing = recorded(by_reference(case).model, case)
    exact, wanted = recorded(with_disturbed_activations(case, fake_quantized), case)
    assert min(wanted.margins) > MARGIN
    assert all(map(torch.equal, routing.chosen, wanted.chosen))
    assert relative(logits, exact) < 1e-3


def with_routing(model: PreTrainedModel, routing: Routing) -> PreTrainedModel:
    routers = [name for name, _ in model.named_modules() if name.endswith("mlp.gate")]
    for name, chosen in zip(routers, routing.chosen, strict=True):
        model.set_submodule(name, FixedRouter(model.get_submodule(name), chosen))
    return model


def test_quantization_error_is_that_of_as_much_noise(case: Case) -> None:
    """E4M3 rounds a value by 2.65 % (docs/numerics.md), each in its own direction.

    So quantized activations must cost what independent noise of 2.65 % costs, put into the same
    places of the dequantized model, with the same experts chosen. Neither the depth of the model
    nor its nonlinearities need a bound then: both models have them.
    """
    exact, routing = recorded(case.dequantized, case)
    error = relative(case.logits(with_routing(by_reference(case).model, routing)), exact)
    generator = torch.Generator().manual_seed(5)

    def noisy(values: torch.Tensor) -> torch.Tensor:
        return values * (1 + 0.0265 * torch.randn(values.shape, generator=generator))

    noise = with_routing(with_disturbed_activations(case, noisy), routing)
    costs = [relative(case.logits(noise), exact) for _ in range(4)]
    expected = (sum(cost**2 for cost in costs) / len(costs)) ** 0.5
    assert 0.8 < error / expected < 1.25


@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16])
def test_half_precision_models_generate(case: Case, dtype: DType) -> None:
    loaded = load_model(case.fp8, dtype=dtype)
    with torch.inference_mode():
        tokens = loaded.model.generate(case.prompt, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, TOKENS // 2 + 3)
    assert torch.equal(tokens[:, : TOKENS // 2], case.prompt)
    assert loaded.model(case.prompt).logits.isfinite().all()


def edited(case: Case, folder: Path, **config: object) -> Iterator[dict[str, torch.Tensor]]:
    shutil.copytree(case.fp8, folder)
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    declared = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(declared))


def test_an_expert_that_is_missing_is_named(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    for tensors in edited(case, folder):
        for name in [name for name in tensors if ".layers.0." in name and ".experts.3." in name]:
            del tensors[name]
    with pytest.raises(CheckpointError, match="number 3 is missing"):
        load_model(folder)


def test_experts_whose_down_is_not_quantized_are_named(case: Case, tmp_path: Path) -> None:
    """Half-converted experts have shipped; nobody should find out by their answers."""
    folder = tmp_path / "broken"
    for tensors in edited(case, folder):
        for name in list(tensors):
            is_down = ".experts." in name and ("down_proj" in name or ".w2." in name)
            if is_down and name.endswith("scale_inv"):
                del tensors[name]
            elif is_down:
                tensors[name] = tensors[name].to(torch.bfloat16)
    with pytest.raises(ModelError, match="lack FP8 gate, up or down"):
        load_model(folder)


def test_a_config_of_another_model_is_named(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    key = "moe_intermediate_size" if case.family == "qwen3_moe" else "intermediate_size"
    list(edited(case, folder, **{key: 128}))
    with pytest.raises(ModelError, match=r"config\.json is not its own"):
        load_model(folder)


def test_another_activation_function_is_refused(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "gelu"
    list(edited(case, folder, hidden_act="gelu"))
    with pytest.raises(ModelError, match=r"have the activation function GELU"):
        load_model(folder)


def from_pretrained(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    from blockscale.integrations.transformers import BlockScaleConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BlockScaleConfig(), dtype=torch.float32
    )


def test_the_quantizer_loads_what_load_model_loads(case: Case) -> None:
    model = from_pretrained(case.fp8)
    by_hand = load_model(case.fp8, dtype=DType.FLOAT32)
    assert torch.equal(case.logits(model), case.logits(by_hand.model))
    report = model.blockscale_report()
    assert len(report.layers) == len(by_hand.plan.layers)
    stacks = [layer for layer in report.layers if layer.experts is not None]
    assert {layer.experts for layer in stacks} == {EXPERTS}
    assert len({layer.module for layer in stacks}) * 2 == len(stacks)


def test_experts_are_saved_as_they_were_stored(case: Case, tmp_path: Path) -> None:
    """One by one, under the checkpoint's names, the same bytes."""
    from_pretrained(case.fp8).save_pretrained(tmp_path)
    before = load_file(case.fp8 / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    fp8 = [name for name in before if name.endswith("_scale_inv")]
    fp8 += [name.removesuffix("_scale_inv") for name in fp8]
    assert len(fp8) > 2 * 3 * EXPERTS
    for name in fp8:
        assert before[name].dtype is after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    assert torch.equal(
        case.logits(from_pretrained(tmp_path)), case.logits(from_pretrained(case.fp8))
    )
