"""Reinforcement learning in small: a trainer sends FP8 weights to an engine in another process.

    python examples/rl_weight_sync.py            seconds, on any machine, with a tiny random Qwen3

The engine loads an FP8 checkpoint by plan and says, as JSON, what it wants to receive. The trainer
changes its bf16 masters, quantizes them straight to that (one rounding) and sends them in buckets;
the engine takes them into its live storages. A message that does not fit is refused with a reason,
and the engine goes on serving the old weights.

Tensors travel as safetensors bytes through a pipe here; NCCL, shared memory or HTTP carry the same.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save

from blockscale.checkpoint.quantize import quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.errors import ModelError
from blockscale.integrations.transformers import BlockScaleConfig
from blockscale.modules.weight_sync import publish, update
from blockscale.planning.contract import contract_of_json

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PROMPT = torch.arange(3, 19)[None]
BUCKETS = 2


def engine(pipe: Connection, folder: str) -> None:
    """Serve a checkpoint; take new weights whenever they come."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BlockScaleConfig())
    pipe.send_bytes(model.hf_quantizer.plan.contract().to_json())
    while True:
        message = pipe.recv_bytes()
        if message == b"logits":
            with torch.inference_mode():
                pipe.send_bytes(save({"logits": model(PROMPT).logits}))
            continue
        if message == b"stop":
            return
        try:
            taken = update(model, load(message))
            pipe.send(f"{len(taken.layers)} layers updated")
        except ModelError as refusal:
            pipe.send(str(refusal))


def main() -> int:
    """Train for one step, publish, compare with a checkpoint made from the new masters."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        masters = tiny_model(base / "bf16")
        quantize_checkpoint(read_checkpoint(base / "bf16"), base / "fp8")
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=engine, args=(theirs, str(base / "fp8")), daemon=True)
        process.start()
        contract = contract_of_json(pipe.recv_bytes())
        first = contract.layers[0]
        print(f"the engine wants {len(contract.layers)} layers, contract {contract.digest}; first")
        for tensor in first.tensors:
            print(f"  {tensor.name}  {list(tensor.shape)}  {tensor.dtype}")
        old = logits(pipe)

        with torch.no_grad():  # One "training step".
            for layer in contract.layers:
                weight = masters.get_submodule(layer.name).weight
                weight += 0.05 * torch.randn_like(weight)
        wrong = publish(contract, masters.state_dict())
        wrong[first.tensors[0].name] = wrong[first.tensors[0].name][:-1].contiguous()
        pipe.send_bytes(save(wrong))
        print(pipe.recv())
        if not torch.equal(logits(pipe), old):
            sys.exit("a refused update changed the engine")

        for names in buckets([layer.name for layer in contract.layers]):
            bucket = {
                k: v for k, v in masters.state_dict().items() if k.rpartition(".")[0] in names
            }
            pipe.send_bytes(save(publish(contract, bucket)))
            print(pipe.recv())
        new = logits(pipe)
        pipe.send_bytes(b"stop")
        process.join(timeout=60)

        masters.save_pretrained(base / "bf16-new")
        quantize_checkpoint(read_checkpoint(base / "bf16-new"), base / "fp8-new")
        fresh = AutoModelForCausalLM.from_pretrained(
            base / "fp8-new", quantization_config=BlockScaleConfig()
        )
        with torch.inference_mode():
            same = torch.equal(fresh(PROMPT).logits, new)
    print(f"changed: {not torch.equal(old, new)}; as from a fresh checkpoint, bit for bit: {same}")
    return int(not same or torch.equal(old, new))


def tiny_model(folder: Path) -> torch.nn.Module:
    """A Qwen3 of two layers with random weights, saved in bf16; gives the masters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


def buckets(names: list[str]) -> list[set[str]]:
    """Layer names in ``BUCKETS`` messages: a whole model rarely fits one."""
    return [set(names[start::BUCKETS]) for start in range(BUCKETS)]


def logits(pipe: Connection) -> torch.Tensor:
    """What the engine answers now."""
    pipe.send_bytes(b"logits")
    return load(pipe.recv_bytes())["logits"]


if __name__ == "__main__":
    sys.exit(main())
