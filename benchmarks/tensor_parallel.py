"""A transformers model over the ranks of a torchrun, beside the same model on one GPU.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --out FILE    two Hopper GPUs, NCCL
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --smoke       tiny; gloo on a CPU

Qwen3-8B's layers (12 of 36), random weights written as a block-FP8 checkpoint on the spot, loaded
whole on every GPU and cut over all of them. Logits of the two are compared, then each is timed:
decoding (one token for each sequence of a batch, no cache) in a CUDA graph, and a prefill. The time
of a cut model is that of its slowest rank. A record for each dtype and number of tokens.

Kernels are compiled when the first call needs them, minutes of it on a new machine:
``benchmarks/ahead.py tensor_parallel`` does that on all cores first. NVLink multicast stays off
(NCCL_NVLS_ENABLE=0) unless the environment says otherwise.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import distributed

from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.integrations.transformers import load_model
from blockscale.integrations.transformers_parallel import load_model_shard
from blockscale.parallel.ranks import Ranks
from blockscale.planning.policy import PlanPolicy
from blockscale.reference import quantize
from record import append_to, record

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from blockscale.integrations.transformers_parallel import ModelShard

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
}
# Every layer rounds activations to E4M3. A sum over ranks rounds otherwise than one process's, so a
# few codes fall on the other side, each a tenth of its value away, and random layers amplify that:
# after some layers the two models differ as two ways of quantizing do, in float32 as well. So
# float32 is compared after the first decoder layer: one changed code is 0.005 there for three
# tokens of 256 values, and changes two in a hundred of the next. A lost part of a sum is 0.7 off.
LARGEST_ERROR = 0.4
LARGEST_FLOAT32_ERROR = 0.03
# Layers whose results are sums over ranks.
SUMMED = ("o_proj", "down_proj")
WARM_UP_CALLS = 3
# This project's kernels. DeepGEMM, where it is installed, would compile half a minute a shape; the
# reference on a CPU quantizes activations, as they do.
GPU_BACKENDS = ("gluon", "triton")
CPU_BACKENDS = ("reference",)


@dataclass(frozen=True)
class Size:
    """What is measured. ``decode``: batches of one token each; ``prefill``: tokens of a prompt."""

    shape: dict[str, int]
    layers: int
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    rounds: int


FULL = Size(QWEN3_8B, 12, (1, 16, 64), (4096,), 30)
SMOKE = Size(TINY, 2, (1, 3), (32,), 2)


def main() -> int:
    """Write a checkpoint, compare, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two tiny layers, on the CPU too")
    parser.add_argument("--layers", type=int, help="decoder layers, 12 by default")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--out", type=Path, help="JSON lines, one record for each measurement")
    options = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    on_gpu = not options.smoke or torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")
    ranks = Ranks.joined()
    size = SMOKE if options.smoke else FULL
    bench = Bench(size, options.layers or size.layers, ranks, on_gpu, on_gpu and not options.eager)
    folder = shared_folder(ranks)
    try:
        lines = bench.run(folder)
        # Before the others go on: the first that ends with a fault has all of them ended.
        if ranks.rank == 0 and options.out:
            append_to(options.out, *lines)
    finally:
        distributed.barrier()
        if ranks.rank == 0:
            shutil.rmtree(folder)
    distributed.destroy_process_group()
    return 0 if all(is_the_same_model(line) for line in lines) else 1


def is_the_same_model(line: dict[str, Any]) -> bool:
    """Whether a record's errors are those of rounding."""
    return (
        line["relative_error"] <= LARGEST_ERROR and line["float32_error"] <= LARGEST_FLOAT32_ERROR
    )


def shared_folder(ranks: Ranks) -> Path:
    """A new folder that all ranks of this machine know, in memory where there is enough."""
    memory = Path("/dev/shm")  # noqa: S108 - tempfile makes the folder
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 16e9
    name = [tempfile.mkdtemp(prefix="blockscale-tp-", dir=memory if has_room else None)]
    if ranks.rank > 0:
        Path(name[0]).rmdir()
    distributed.broadcast_object_list(name, src=0)
    return Path(name[0])


@dataclass(frozen=True)
class Bench:
    """What to measure, and where."""

    size: Size
    layers: int
    ranks: Ranks
    on_gpu: bool
    use_graphs: bool

    @property
    def place(self) -> torch.device:
        """This rank's device."""
        return (
            torch.device("cuda", torch.cuda.current_device())
            if self.on_gpu
            else torch.device("cpu")
        )

    def say(self, text: str) -> None:
        """Print once, not once a rank."""
        if self.ranks.rank == 0:
            print(text, flush=True)

    def run(self, folder: Path) -> list[dict[str, Any]]:
        """Records of both dtypes."""
        started = time.perf_counter()
        if self.ranks.rank == 0:
            self.write_checkpoint(folder)
        distributed.barrier()
        self.say(
            f"checkpoint of {self.layers} layers written in {time.perf_counter() - started:.1f} s"
        )
        error = self.float32_error(folder)
        self.say(f"float32: the first layer's results differ by {error:.2e}")
        lines = []
        for dtype in (DType.FLOAT16, DType.BFLOAT16):
            lines += self.measure(folder, dtype)
            gc.collect()
        return [{**line, "float32_error": error} for line in lines]

    def float32_error(self, folder: Path) -> float:
        """Relative error behind the cut model's first layer, next to nothing being rounded."""
        _, models = self.load(folder, DType.FLOAT32)
        tokens = self.size.decode[-1]
        calls = {name: self.first_layer(model, tokens) for name, model in models.items()}
        return self.compare(calls)[0]

    def first_layer(self, model: PreTrainedModel, tokens: int) -> Callable[[], torch.Tensor]:
        """A forward pass that gives what the first decoder layer gave."""
        found: list[torch.Tensor] = []
        forward = self.call(model, "decode", tokens)

        def keep(_: object, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        def run() -> torch.Tensor:
            hook = model.get_submodule("model.layers.0").register_forward_hook(keep)
            forward()
            hook.remove()
            return found.pop()

        return run

    def load(self, folder: Path, dtype: DType) -> tuple[ModelShard, dict[str, PreTrainedModel]]:
        """The model whole and cut, on this rank's device."""
        started = time.perf_counter()
        policy = PlanPolicy(backends=GPU_BACKENDS if self.on_gpu else CPU_BACKENDS)
        one = load_model(folder, dtype=dtype, policy=policy)
        cut = load_model_shard(folder, self.ranks, dtype=dtype, policy=policy)
        self.say(f"{dtype.value}: loaded in {time.perf_counter() - started:.1f} s")
        return cut, {"one": one.model, "cut": cut.model}

    def write_checkpoint(self, folder: Path) -> None:
        """Random Qwen3 weights: block FP8 for linear layers, bfloat16 for the rest."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, Qwen3Config

        config = Qwen3Config(
            **self.size.shape, num_hidden_layers=self.layers, tie_word_embeddings=False
        )
        with init_empty_weights():
            shapes = {
                name: value.shape
                for name, value in AutoModelForCausalLM.from_config(config).named_parameters()
            }
        generator = torch.Generator(device=self.place).manual_seed(0)
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            values = torch.randn(shape, generator=generator, device=self.place)
            if "proj" in name:
                weight = quantize(values / shape[-1] ** 0.5, FP8_128X128_FP32)
                tensors[name] = weight.data.cpu()
                tensors[name + "_scale_inv"] = weight.scales.cpu()
            else:
                tensors[name] = (values / shape[-1] ** 0.5).to(torch.bfloat16).cpu()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        document = config.to_dict()
        document["architectures"] = ["Qwen3ForCausalLM"]
        document["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(json.dumps(document, default=str))

    def measure(self, folder: Path, dtype: DType) -> list[dict[str, Any]]:
        """Load whole and cut, compare, time."""
        cut, models = self.load(folder, dtype)
        lines = []
        for phase, counts in (("decode", self.size.decode), ("prefill", self.size.prefill)):
            for tokens in counts:
                calls = {name: self.call(model, phase, tokens) for name, model in models.items()}
                error, agreement = self.compare(calls)
                shaken = self.shaken_error(models["one"], calls["one"])
                times, timing = self.times(calls)
                backends = {name for layer in cut.plan.plan.layers for name in layer.backends}
                lines.append(
                    record(
                        "tensor_parallel",
                        dtype=dtype.value,
                        phase=phase,
                        m=tokens,
                        layers=self.layers,
                        ranks=self.ranks.size,
                        one_us=round(times["one"], 2),
                        cut_us=round(times["cut"], 2),
                        speedup=round(times["one"] / times["cut"], 3),
                        relative_error=error,
                        same_best_token=agreement,
                        shaken_error=shaken,
                        backends=sorted(backends),
                        timing=timing,
                        nvls=os.environ["NCCL_NVLS_ENABLE"],
                    )
                )
                self.say(
                    f"{dtype.value} {phase:8s}{tokens:6d} tokens: one {times['one']:9.1f} us, "
                    f"{self.ranks.size} ranks {times['cut']:9.1f} us, "
                    f"{times['one'] / times['cut']:.2f}x ({timing}); logits differ by {error:.2e}, "
                    f"best token the same {agreement:.1%}; one GPU's, shaken by a rounding, "
                    f"{shaken:.2e}"
                )
        return lines

    def call(self, model: PreTrainedModel, phase: str, tokens: int) -> Callable[[], torch.Tensor]:
        """One forward pass on fixed tokens, the same on every rank: logits of the last tokens."""
        shape = (tokens, 1) if phase == "decode" else (1, tokens)
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(self.size.shape["vocab_size"], shape, generator=generator).to(
            self.place
        )
        positions = torch.arange(shape[1], device=self.place).expand(shape)
        # A mask that is there already: making one reads data on the host in some releases.
        closed = torch.full((shape[1], shape[1]), -1e4, dtype=model.dtype, device=self.place)
        mask = closed.triu(1).expand(shape[0], 1, -1, -1)

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                out: torch.Tensor = model(
                    input_ids=ids,
                    position_ids=positions,
                    attention_mask=mask,
                    use_cache=False,
                    logits_to_keep=1,
                ).logits
                return out

        return forward

    def compare(self, calls: dict[str, Callable[[], torch.Tensor]]) -> tuple[float, float]:
        """Relative error of the cut model's logits and how often the best token is the same.

        The worst of all ranks.
        """
        one, cut = (calls[name]().float() for name in ("one", "cut"))
        error = float((cut - one).norm() / one.norm())
        agreement = float((cut.argmax(-1) == one.argmax(-1)).float().mean())
        worst = torch.tensor([error, -agreement], device=self.place)
        distributed.all_reduce(worst, distributed.ReduceOp.MAX)
        return float(f"{float(worst[0]):.3g}"), -float(worst[1])

    def shaken_error(self, one: PreTrainedModel, call: Callable[[], torch.Tensor]) -> float:
        """How far the logits of one GPU move if what ranks would sum is rounded otherwise.

        A control: each element of these results goes up or down by half a unit in the last place.
        Codes behind them change, and each change is as large as a step of E4M3.
        """
        wanted = call().float()
        generator = torch.Generator(device=self.place).manual_seed(0)

        def shake(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
            half = torch.finfo(output.dtype).eps / 2
            signs = torch.randint(2, output.shape, generator=generator, device=self.place)
            return (output.double() * (1 + half * (2 * signs - 1))).to(output.dtype)

        hooks = [
            module.register_forward_hook(shake)
            for name, module in one.named_modules()
            if name.endswith(SUMMED)
        ]
        found = call().float()
        for hook in hooks:
            hook.remove()
        return float(f"{float((found - wanted).norm() / wanted.norm()):.3g}")

    def times(self, calls: dict[str, Callable[[], torch.Tensor]]) -> tuple[dict[str, float], str]:
        """Median microseconds in turns, of the slowest rank."""
        runs, timing = dict(calls), "eager"
        if self.use_graphs:
            runs, timing = {name: graph_of(call) for name, call in calls.items()}, "cuda_graph"
        found: dict[str, list[float]] = {name: [] for name in runs}
        for call in runs.values():
            for _ in range(WARM_UP_CALLS):
                call()
        for _ in range(self.size.rounds):
            for name, call in runs.items():
                distributed.barrier()
                found[name].append(self.timed(call))
        medians = torch.tensor([statistics.median(t) for t in found.values()], device=self.place)
        distributed.all_reduce(medians, distributed.ReduceOp.MAX)
        return dict(zip(found, medians.tolist(), strict=True)), timing

    def timed(self, call: Callable[[], object]) -> float:
        """Microseconds of one call, the second of two: the first brings the ranks together."""
        if not self.on_gpu:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000


def graph_of(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
    """The call's kernels and messages as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog looks at events from a thread of its own meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


if __name__ == "__main__":
    sys.exit(main())
