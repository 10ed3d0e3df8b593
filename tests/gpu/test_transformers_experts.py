"""Small Qwen3-MoE and MiniMax-M2 on a GPU, by plan, beside the reference on the same GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton: rows of experts are moved by it")
pytest.importorskip("transformers", reason="pip install transformers")

from blockscale.checkpoint.quantize import quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.formats import DType
from blockscale.integrations.transformers import load_model
from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.policy import PlanPolicy
from blockscale.testing.moe_models import FAMILIES, FixedRouter, new_model, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs SM90 (H100, H200)",
    ),
]

# Not DeepGEMM, where it is installed: it would build every shape here, a quarter minute each.
OWN = ("gluon", "triton")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        write_checkpoint(new_model(request.param), request.param, base / "bf16")
    quantize_checkpoint(read_checkpoint(base / "bf16"), base / "fp8")
    return base / "fp8"


def loaded(folder: Path, dtype: DType, *backends: str) -> Any:
    policy = PlanPolicy(backends=backends or None)
    return load_model(folder, dtype=dtype, policy=policy)


def routers(model: Any) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("mlp.gate")]


# Relative to the norm. A product is 1e-4 off, and rounded to bfloat16 (kernels' limit in
# benchmarks/gemm.py). Experts quantize in between: one value of forty is an ulp of bfloat16 off
# there, and one code in a hundred the neighbour, 6 to 12 % away: about 1 %.
OF_LINEAR, OF_EXPERTS = 2.5e-3, 0.03
# A code that changes in an early layer changes a hundred in the next: after some layers a token's
# error is that of quantizing it in another way, here 0.05 to 0.09 whether products differ by 1e-6
# or 1e-3 (on a CPU, noise put into the reference's). A wrong expert is off by 1.
OF_LOGITS = 0.15


def planned(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = (BlockScaledLinear, BlockScaledExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16], ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("tokens", [3, 300])
def test_layers_and_logits_are_those_of_the_reference(
    folder: Path, dtype: DType, tokens: int
) -> None:
    """Each planned layer on the reference model's own inputs; then all, the same experts chosen."""
    generator = torch.Generator().manual_seed(tokens)
    prompt = torch.randint(3, 96, (1, tokens), generator=generator).cuda()
    reference = loaded(folder, dtype, "reference").model
    calls: dict[str, tuple[tuple[torch.Tensor, ...], Any]] = {}

    def keep(name: str, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        # What a hook returns would take the output's place.
        calls[name] = (inputs, output)

    for name in (*planned(reference), *routers(reference)):
        reference.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: keep(name, inputs, output)
        )
    with torch.inference_mode():
        wanted = reference(prompt).logits
    ours = loaded(folder, dtype, *OWN).model
    layers = planned(ours)
    assert layers.keys() == planned(reference).keys()
    assert any(isinstance(layer, BlockScaledExperts) for layer in layers.values())
    for name, layer in layers.items():
        is_dense = isinstance(layer, BlockScaledLinear)
        plan = layer.plan if is_dense else layer.plan.w13
        assert not {"cpu", "reference"} & set(plan.backends)
        inputs, output = calls[name]
        with torch.inference_mode():
            error = relative(layer(*inputs), output)
        assert error < (OF_LINEAR if is_dense else OF_EXPERTS), name
    for name in routers(ours):
        ours.set_submodule(name, FixedRouter(ours.get_submodule(name), calls[name][1][2]))
    with torch.inference_mode():
        assert relative(ours(prompt).logits, wanted) < OF_LOGITS


def test_generates_on_the_gpu(folder: Path) -> None:
    model = loaded(folder, DType.BFLOAT16, *OWN).model
    prompt = torch.arange(3, 13)[None].cuda()
    with torch.inference_mode():
        tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
        again = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 14)
    assert torch.equal(tokens, again)
