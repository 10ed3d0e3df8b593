"""Load a block-FP8 checkpoint into a transformers model, by plan.

``nn.Linear`` modules whose weight is block FP8 on disk become ``BlockScaledLinear``; everything
else is loaded as it is. No weight passes through bfloat16, and no scale is cast: transformers' own
loader rounds float32 scales to the nearest power of two when a config declares ``ue8m0``,
this one reads the bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockscale.backends.registry import all_backends, packages_of
from blockscale.checkpoint.read import Checkpoint, read_checkpoint
from blockscale.checkpoint.requests import Merging, RequestOptions, dtype_of_config, requests_of
from blockscale.checkpoint.schema import Layers, read_layers
from blockscale.errors import CheckpointError, ModelError, PlanMismatchError
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy, Strictness
from blockscale.probe import detect_device

LONGEST_REASON = 300  # of what transformers says of a file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    from blockscale.formats import DType
    from blockscale.integrations.transformers_quantizer import BlockScaleConfig
    from blockscale.planning.device import Device
    from blockscale.planning.plan import ModelPlan
    from blockscale.planning.saved import SavedPlan

__all__ = [
    "BlockScaleConfig",
    "Generated",
    "LoadedModel",
    "generate_text",
    "load_model",
    "plan_modules",
]


def __getattr__(name: str) -> object:
    """``BlockScaleConfig`` is a class of transformers' kind: it loads transformers when used."""
    if name == "BlockScaleConfig":
        from blockscale.integrations.transformers_quantizer import BlockScaleConfig

        return BlockScaleConfig
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A transformers model that runs by ``plan``."""

    model: PreTrainedModel
    plan: ModelPlan


def load_model(
    path: Path | str,
    *,
    dtype: DType | None = None,
    device: Device | None = None,
    policy: PlanPolicy | None = None,
    plan: SavedPlan | Path | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> LoadedModel:
    """A causal language model with every block-FP8 linear layer planned and prepared.

    ``dtype``: of activations and of unquantized weights; config.json's by default. ``device``: what
    to plan for, this machine by default (weights go to GPU 0 if it has one). ``plan``: a plan file
    (``blockscale plan --layers module --save``) to run instead of planning; it brings dtype and
    policy. ``progress`` is called with the number of layers prepared since its last call.

    Raises CheckpointError for unreadable files, PlanError if a layer has no backend,
    PlanMismatchError with every reason if ``plan`` is not for this checkpoint, this device and
    these versions, ModelError if the model class does not have the layers that the checkpoint
    names.
    """
    from torch import nn

    from blockscale.integrations.transformers_experts import (
        dense_part,
        expert_slots_of,
        fill_experts,
    )
    from blockscale.integrations.transformers_layers import fill, observe, slots_of

    checkpoint = read_checkpoint(path)
    layers = read_layers(checkpoint)
    device = device or detect_device()
    if plan is None:
        dtype = dtype or dtype_of_config(checkpoint)
        decided = plan_modules(checkpoint, layers, dtype, device, policy or PlanPolicy())
    else:
        decided = _saved_modules(plan, checkpoint, layers, dtype, device)
        dtype = decided.layers[0].request.activation_dtype
    model = empty_model(checkpoint, dtype)
    place = "cpu" if device.is_cpu else "cuda"
    experts = expert_slots_of(model, decided, checkpoint, layers)
    slots = slots_of(model, dense_part(decided), checkpoint, layers)
    started = time.perf_counter()
    fill(model, slots, decided, place, progress)
    fill_experts(model, experts, decided, place, progress)
    observe(model, time.perf_counter() - started)
    load_rest(model, checkpoint, layers, dtype)
    if not device.is_cpu:
        nn.Module.to(model, "cuda")
    return LoadedModel(model, decided)


def _saved_modules(
    plan: SavedPlan | Path | str,
    checkpoint: Checkpoint,
    layers: Layers,
    dtype: DType | None,
    device: Device,
) -> ModelPlan:
    """The plan of a file, if it is for modules as transformers has them and fits in all else."""
    from blockscale.checkpoint.plan_file import read_plan, situation_of
    from blockscale.planning.saved import SavedPlan, fitting_plan
    from blockscale.planning.sharded import Target

    saved = plan if isinstance(plan, SavedPlan) else read_plan(plan)
    source = "the saved plan" if isinstance(plan, SavedPlan) else str(plan)
    reasons = []
    if saved.merging != Merging.MODULE.value or saved.tensor_parallel > 1:
        reasons.append(
            "it plans layers as engines merge and cut them; use --layers module, no --tp"
        )
    elif not saved.plan.layers:
        reasons.append("it has no layer")
    elif dtype not in {None, saved.plan.layers[0].request.activation_dtype}:
        planned = saved.plan.layers[0].request.activation_dtype.value
        reasons.append(f"planned for {planned} activations")
    if saved.plan.unservable:
        reasons.append(f"layer {saved.plan.unservable[0].name!r} has no backend")
    if reasons:
        raise PlanMismatchError(source, reasons)
    here = situation_of(
        saved, checkpoint, layers, Target(device, saved.plan.policy, all_backends())
    )
    return fitting_plan(source, saved, here, all_backends(), packages_of)


def plan_modules(
    checkpoint: Checkpoint, layers: Layers, dtype: DType, device: Device, policy: PlanPolicy
) -> ModelPlan:
    """The plan of the layers as transformers' modules have them, unmerged; nothing is loaded.

    Raises PlanError if a layer has no backend: here a model must run, not only be described.
    """
    options = RequestOptions(dtype, merging=Merging.MODULE)
    requests = requests_of(checkpoint, layers, options)
    strict = replace(policy, strictness=Strictness.RAISE)
    return plan_model(
        requests.requests,
        device,
        strict,
        all_backends(),
        skipped=layers.skipped,
        findings=(*layers.findings, *requests.findings),
    )


def empty_model(checkpoint: Checkpoint, dtype: DType) -> PreTrainedModel:
    """The model class: parameters on the meta device, buffers (rotary tables) made for real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from blockscale.tensor import torch_dtype

    folder = checkpoint.config_path.parent
    if not checkpoint.config:
        msg = f"{checkpoint.config_path} is missing; a model cannot be built without it"
        raise ModelError(msg)
    try:
        config = AutoConfig.from_pretrained(folder)
        # The layers are replaced here; transformers must not look for a quantizer of its own.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype))
    except Exception as error:
        msg = f"transformers cannot build the model of {checkpoint.config_path}: {_said(error)}"
        raise ModelError(msg) from error
    generation = folder / "generation_config.json"
    if generation.is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            msg = f"{generation} is none that transformers can read: {_said(error)}; remove it"
            raise ModelError(msg) from error
    model.eval()
    return model  # type: ignore[no-any-return]  # transformers is untyped here


def _said(error: Exception) -> str:
    """What transformers said of a file: any kind of error, often over many lines."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:LONGEST_REASON]}"


def load_rest(model: PreTrainedModel, checkpoint: Checkpoint, layers: Layers, dtype: DType) -> None:
    """Everything that is not part of a replaced layer; parameters are cast to the model's dtype.

    Buffers that files have keep their own dtype (a router's correction of scores is float32).
    """
    from torch import nn

    from blockscale.checkpoint.tensors import read_tensor
    from blockscale.integrations.transformers_layers import renamed_tensors
    from blockscale.tensor import torch_dtype

    taken = {entry.name for layer in layers.quantized for entry in (layer.weight, layer.scale)}
    taken |= {layer.name + ".bias" for layer in layers.quantized}
    wanted = model.state_dict(keep_vars=True)
    state = {}
    left = [name for name in checkpoint.tensors if name not in taken]
    for stored, name in renamed_tensors(model, left).items():
        if name in wanted:
            own = wanted[name]
            entry = checkpoint.tensors[stored]
            if tuple(own.shape) != entry.shape:
                raise CheckpointError(
                    entry.path,
                    f"has shape {entry.shape}, but the model of config.json wants "
                    f"{tuple(own.shape)}; one of them belongs to another model",
                    tensor=stored,
                )
            kept = torch_dtype(dtype) if isinstance(own, nn.Parameter) else own.dtype
            state[name] = read_tensor(entry).to(kept)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        shown = ", ".join(missing[:3])
        msg = (
            f"{checkpoint.path} lacks {len(missing)} parameters of the model, first {shown}; "
            "download it again, or its config.json is another model's"
        )
        if not layers.quantized and any(".experts." in name for name in missing):
            msg = (
                f"{checkpoint.path} is not quantized, and blockscale loads experts in block FP8 "
                "only; quantize it first (blockscale quantize)"
            )
        raise ModelError(msg)
    model.requires_grad_(requires_grad=False)


@dataclass(frozen=True, slots=True)
class Generated:
    """The continuation of a prompt. ``seconds`` cover prefill and decoding, not loading."""

    text: str
    new_tokens: int
    seconds: float


def generate_text(
    loaded: LoadedModel, path: Path | str, prompt: str, max_new_tokens: int
) -> Generated:
    """Continue ``prompt`` greedily with the tokenizer that lies at ``path``.

    Raises ModelError if there is no tokenizer, or the prompt gives no token.
    """
    import torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        msg = (
            f"{path} has no tokenizer that transformers can load: {_said(error)}; download "
            "tokenizer.json and its like anew"
        )
        raise ModelError(msg) from error
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        msg = "the prompt gives no token; write at least one word"
        if prompt.strip():
            msg = f"{path} has no tokenizer for the prompt; tokenizer.json is missing or empty"
        raise ModelError(msg)
    started = time.perf_counter()
    with torch.inference_mode():
        tokens = loaded.model.generate(  # type: ignore[operator]  # transformers types it Tensor | Module
            **inputs, max_new_tokens=max_new_tokens, do_sample=False
        )
    seconds = time.perf_counter() - started
    new = tokens[0, length:]
    return Generated(str(tokenizer.decode(new, skip_special_tokens=True)), len(new), seconds)
