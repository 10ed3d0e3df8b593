"""A transformers model on a GPU, loaded by the quantizer: static cache, compiled, CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("triton", reason="pip install triton: activations are quantized by it")
pytest.importorskip("transformers", reason="pip install transformers")

from blockscale.checkpoint.quantize import quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.policy import PlanPolicy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs SM90 (H100, H200)",
    ),
]

DTYPES = (torch.bfloat16, torch.float16)
# Not DeepGEMM, where it is installed: it would build every shape here, a quarter minute each.
POLICY = PlanPolicy(backends=("gluon", "triton", "cpu", "reference"))
PROMPT = torch.arange(3, 23)[None]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    base = tmp_path_factory.mktemp("qwen3")
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(base / "bf16")
    quantize_checkpoint(read_checkpoint(base / "bf16"), base / "fp8")
    return base / "fp8"


def model_on(folder: Path, device: str | None, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from blockscale.integrations.transformers import BlockScaleConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BlockScaleConfig(POLICY), device_map=device, dtype=dtype
    )


def planned(model: torch.nn.Module) -> list[BlockScaledLinear]:
    return [m for m in model.modules() if isinstance(m, BlockScaledLinear)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_device_map_the_gpu_runs_it(folder: Path, dtype: torch.dtype) -> None:
    model = model_on(folder, None, dtype)
    layers = planned(model)
    assert len(layers) == 14
    assert not {name for layer in layers for name in layer.plan.backends} & {"cpu", "reference"}
    assert {layer.data.device.type for layer in layers} == {"cuda"}
    on_cpu = model_on(folder, "cpu", dtype)
    assert {name for layer in planned(on_cpu) for name in layer.plan.backends} <= {
        "cpu",
        "reference",
    }
    with torch.inference_mode():
        found = model(PROMPT.cuda()).logits.double().cpu()
        wanted = on_cpu(PROMPT).logits.double()
    # The GPU quantizes activations, the CPU does not: about 3 % a layer.
    assert (found - wanted).norm() < 0.15 * wanted.norm()


def test_save_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model_on(folder, None, torch.bfloat16).save_pretrained(tmp_path)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.filterwarnings("ignore")  # Inductor and transformers advise on speed here.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generate_compiles_with_a_static_cache_and_graphs(folder: Path, dtype: torch.dtype) -> None:
    """Transformers compiles decoding with ``reduce-overhead``, CUDA graphs, for a static cache."""
    model = model_on(folder, None, dtype)
    tokens = model.generate(
        PROMPT.cuda(), max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static"
    )
    assert tokens.shape == (1, PROMPT.shape[1] + NEW_TOKENS)
    assert hasattr(model, "_compiled_call")
    with torch.inference_mode():
        logits = model(tokens[:, :-1]).logits[0, PROMPT.shape[1] - 1 :].float()
    # Each token that the compiled model chose is the eager model's choice, or as good as it: fused
    # code rounds otherwise, codes change, and logits move by 0.05 of their spread. A random token
    # is 3 off.
    chosen = logits.gather(1, tokens[0, PROMPT.shape[1] :, None])[:, 0]
    assert (logits.amax(1) - chosen).max() < 0.3 * logits.std()


def test_a_captured_decoding_step_replays_new_tokens_and_new_weights(folder: Path) -> None:
    from transformers import StaticCache

    model = model_on(folder, None, torch.bfloat16)
    cache = StaticCache(config=model.config, max_cache_len=64)
    ids = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    positions = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    mask = {"full_attention": (torch.arange(64, device="cuda") <= 0).expand(1, 1, 1, 64)}

    def step() -> torch.Tensor:
        for layer in cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        result: torch.Tensor = model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return result

    with torch.inference_mode():
        step()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for token in (5, 400):
            ids.fill_(token)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, step())
        first, second = planned(model)[0], planned(model)[7]
        assert first.plan.request.n == second.plan.request.n
        first.update(second.weight)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, step())
