"""Run by ``test_idle_steps``, in a process of its own: launches on a GPU that does nothing.

Prints how many pairs of launches were compared. A step's launches must have the very arguments of
the backend's two calls, descriptors included, when both are given the same memory.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from blockscale.backends.registry import BACKENDS, runnable_backend_named
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.kernels.step import Scratch
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe.machine import installed_packages
from blockscale.reference import quantize
from blockscale.tensor import BlockScaledTensor
from blockscale.testing import idle_gpu

if TYPE_CHECKING:
    from collections.abc import Callable

N, K = 256, 512
# Gluon: the kernel for few tokens, unsplit and split, and the dense one.
TOKENS = (1, 5, 600)


def main() -> None:
    """Compare, and run whole layers."""
    idle = idle_gpu.start()
    device = replace(Device.named("sm_90"), packages=installed_packages())
    compared = 0
    for name in ("triton", "gluon"):
        dtype = DType.BFLOAT16
        request = LinearRequest("layer", N, K, FP8_128X128_FP32, dtype, dtype)
        plan = plan_linear(request, device, PlanPolicy(backends=(name,)), BACKENDS)
        bias = torch.zeros(N, dtype=torch.bfloat16)
        layer = BlockScaledLinear(plan, quantize(torch.randn(N, K), FP8_128X128_FP32), bias)
        for m in TOKENS:
            x = torch.zeros(m, K, dtype=torch.bfloat16)
            layer(x)
            before = idle.launches
            assert layer(x.view(1, m, K)).shape == (1, m, N)
            assert idle.launches == before + 2, "a forward is one quantizer and one product"
            compared += compare(plan.choices[0].offer, layer.weight, x, bias)
        before = idle.launches
        assert layer(torch.zeros(2, 0, K, dtype=torch.bfloat16)).shape == (2, 0, N)
        assert idle.launches == before, "no tokens, no launch"
    run_cuda(idle, device)
    sys.stdout.write(f"{compared}\n")


def run_cuda(idle: idle_gpu.IdleDriver, device: Device) -> None:
    """A layer of the ``cuda`` backend: what its product reads is what its quantizer wrote."""
    from blockscale.kernels.cuda import build, launch, product
    from blockscale.kernels.triton.quantize import rows_quantizer

    build.nvrtc = lambda: None
    launch.compile_form = lambda form: form.name.encode()
    keys, original = [], product.CudaProduct._launch

    def noted(self: product.CudaProduct, key: tuple[Any, ...]) -> launch.Launch:
        keys.append(key)
        return original(self, key)

    product.CudaProduct._launch = noted
    device = replace(device, packages=(*device.packages, ("cuda-bindings", "13.0.0")))
    dtype = DType.BFLOAT16
    request = LinearRequest("layer", N, K, FP8_128X128_FP32, dtype, dtype, has_bias=True)
    plan = plan_linear(request, device, PlanPolicy(backends=("cuda",)), BACKENDS)
    bias = torch.zeros(N, dtype=torch.bfloat16)
    layer = BlockScaledLinear(plan, quantize(torch.randn(N, K), FP8_128X128_FP32), bias)
    form = plan.choices[0].offer.activation
    quantizer = rows_quantizer(form.format, form.layout, torch.bfloat16, K, 0)
    for m in TOKENS:
        x, results, made = torch.zeros(m, K, dtype=torch.bfloat16), [], len(keys)
        before = idle.launches
        arguments = recorded(quantizer.launcher(0), lambda x=x, to=results: to.append(layer(x)))
        assert idle.launches == before + 1, "one product, beside the quantizer that was noted"
        (_, tokens, out_dtype, out, codes, stride, scales, added), *more = keys[made:]
        assert not more
        assert (tokens, out_dtype, stride) == (m, torch.bfloat16, K)
        assert (out, added) == (results[0].data_ptr(), layer.bias.data_ptr())
        assert {x.data_ptr(), codes, scales} <= set(arguments)
        code_bytes, scale_bytes = quantizer.sizes(m)
        assert scales == codes + Scratch.of(code_bytes, scale_bytes, 0).scales


def compare(offer: Any, weight: BlockScaledTensor, x: torch.Tensor, bias: torch.Tensor) -> int:
    """Both products and the quantizer for the rows of ``x``."""
    from blockscale.kernels.triton.quantize import rows_quantizer

    m, form = x.shape[0], offer.activation
    quantizer = rows_quantizer(form.format, form.layout, x.dtype, K, 0)
    product: Any = runnable_backend_named(offer.backend).bind(weight, offer)
    code_bytes, scale_bytes = quantizer.sizes(m)
    scratch = Scratch.of(code_bytes, scale_bytes, product.workspace_bytes(m, x.dtype))
    memory = torch.zeros(scratch.nbytes, dtype=torch.uint8)
    base, values = memory.data_ptr(), x.data_ptr()

    launched = recorded(
        quantizer.launcher(0), lambda: quantizer.start_for(m, scratch)(0, values, K, base)
    )
    alone = recorded(quantizer.launcher(0), lambda: quantizer(x))
    places = [index for index, one in enumerate(launched) if one in (base, base + scratch.scales)]
    assert len(places) == 2, "codes and scales"
    assert without(launched, places) == without(alone, places)

    codes = memory[:code_bytes].view(torch.float8_e4m3fn).view(m, K)
    stored = form.layout.stored(m, K, form.format)
    flat = memory[scratch.scales : scratch.scales + scale_bytes].view(torch.float32)
    scales = flat.as_strided(stored.shape, stored.strides)
    activation = BlockScaledTensor(codes, scales, form.format, form.layout)
    out = torch.zeros(m, N, dtype=x.dtype)
    launcher = product.launcher_for(m, x.dtype)
    for one in (None, bias):
        address = None if one is None else one.data_ptr()
        launched = recorded(
            launcher,
            lambda address=address: product.start_for(m, x.dtype, scratch)(
                0, base, out.data_ptr(), address
            ),
        )
        alone = recorded(launcher, lambda one=one: product(activation, out, one))
        # A workspace of its own, and a bias that is not there, may be any address.
        own = {base, base + scratch.workspace}
        free = [index for index, word in enumerate(launched) if word in own]
        keep = [index for index in free if launched[index] != alone[index]]
        assert len(keep) <= (one is None) + (scratch.nbytes > scratch.workspace)
        assert without(launched, keep) == without(alone, keep)
    return 3


def without(arguments: tuple[object, ...], places: list[int]) -> list[object]:
    """The other arguments."""
    return [one for index, one in enumerate(arguments) if index not in places]


def recorded(launcher: Any, launch: Callable[[], object]) -> tuple[object, ...]:
    """The arguments of the one launch."""
    start, found = launcher.start, []
    launcher.start = lambda *arguments: found.append(arguments)
    try:
        launch()
    finally:
        launcher.start = start
    (arguments,) = found
    return arguments


main()
