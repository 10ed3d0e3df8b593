"""Skip lists mean what each system takes them to mean; where they differ, a finding says so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from blockscale.checkpoint import skips
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.skips import Patterns, Reader, SkipList, SkipMatcher
from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from blockscale.checkpoint.schema import Layers


def readers_that_skip(layer: str, *entries: str) -> set[Reader]:
    return set(SkipMatcher(SkipList(entries, tuple(Reader))).skipped_by(layer))


TRANSFORMERS, VLLM, SGLANG, COMPRESSED, MODELOPT = Reader
ALL = set(Reader)


@pytest.mark.parametrize(
    ("entry", "layer", "readers"),
    [
        ("lm_head", "lm_head", ALL),
        ("model.layers.1.mlp.gate", "model.layers.1.mlp.gate", ALL),
        ("model.layers.1", "model.layers.11.mlp.gate", set()),
        ("model.layers.1", "model.layers.1.mlp.gate", {TRANSFORMERS, SGLANG}),
        # MiniMax: the router, never gate_proj.
        ("gate", "model.layers.0.block_sparse_moe.gate", {TRANSFORMERS, SGLANG}),
        ("gate", "model.layers.0.mlp.gate_proj", set()),
        # A suffix without a dot before it: transformers alone.
        ("b_proj", "model.layers.0.self_attn.q_b_proj", {TRANSFORMERS}),
        ("self_attn", "model.layers.0.self_attn.q_proj", {SGLANG}),
        # vLLM skips all experts of a layer if one is listed.
        ("m.0.mlp.experts.0.up_proj", "m.0.mlp.experts.7.up_proj", {VLLM}),
        ("m.0.mlp.experts.0.up_proj", "m.1.mlp.experts.0.up_proj", set()),
        ("model.layers.*.mlp.gate", "model.layers.3.mlp.gate", {TRANSFORMERS, MODELOPT}),
        ("mtp*", "mtp.0.eh_proj", {TRANSFORMERS, MODELOPT}),
        ("re:.*gate$", "model.layers.0.mlp.gate", {COMPRESSED}),
        ("re:.*gate$", "model.layers.0.mlp.gate_proj", set()),
        ("re:(", "model.layers.0.mlp.gate", set()),
        ("Linear", "model.layers.0.mlp.gate", set()),
    ],
)
def test_rules(entry: str, layer: str, readers: set[Reader]) -> None:
    assert readers_that_skip(layer, entry) == readers


components = st.sampled_from(["model", "layers", "1", "11", "mlp", "gate", "gate_proj", "b_proj"])
names = st.lists(components, min_size=1, max_size=5).map(".".join)
patterns = names | st.sampled_from(
    ["layers.*", "model.layers.[0-9]+", "gate|b_proj", "model.layers.1.", "proj", ".*gate", "m+"]
)


@settings(deadline=None)
@given(layer=names, entries=st.lists(patterns, min_size=1, max_size=3))
def test_transformers_agrees(layer: str, entries: list[str]) -> None:
    pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")
    from transformers.quantizers.quantizers_utils import should_convert_module

    ours = TRANSFORMERS in readers_that_skip(layer, *entries)
    assert ours is not should_convert_module(layer, entries)


@settings(deadline=None)
@given(layer=names, entries=st.lists(patterns.map("re:".__add__) | names, max_size=3))
def test_compressed_tensors_agrees(layer: str, entries: list[str]) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.utils.match import match_name

    ours = COMPRESSED in readers_that_skip(layer, *entries)
    assert ours is any(match_name(layer, entry) for entry in entries)


def test_a_pattern_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skips, "PATTERN_SECONDS", 0.05)
    endless = Patterns([r"(?:a|aa)+$"], None)
    with pytest.raises(CheckpointError, match="takes too long"):
        endless.match("a" * 60 + "c")


def layers(folder: Path, entries: list[str], *names: str, floats: tuple[str, ...] = ()) -> Layers:
    tensors = {name + ".weight": torch.zeros(128, 128).to(torch.float8_e4m3fn) for name in names}
    tensors |= {name + ".weight_scale_inv": torch.ones(1, 1) for name in names}
    tensors |= {name + ".weight": torch.ones(4, 4) for name in floats}
    save_file(tensors, folder / "model.safetensors")
    declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    declared["modules_to_not_convert"] = entries  # type: ignore[assignment]
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared}))
    return read_layers(read_checkpoint(folder))


def test_fp8_that_only_one_reader_skips(tmp_path: Path) -> None:
    found = layers(tmp_path, ["b_proj"], "a.0.q_b_proj", "a.1.q_b_proj", "a.0.o_proj")
    assert len(found.quantized) == 3
    (finding,) = found.findings
    assert finding.code == "skip_list_contradicted"
    assert finding.message.startswith("2 layers (first: a.0.q_b_proj): ")
    assert "transformers reads it" in finding.message


def test_float_that_the_skip_list_does_not_name(tmp_path: Path) -> None:
    found = layers(tmp_path, ["a.1"], "a.0.o_proj", floats=("a.1.o_proj", "a.2.o_proj", "head"))
    by_code = {(f.code, f.layer): f.message for f in found.findings}
    assert set(by_code) == {
        ("float_but_not_skipped", "a.1.o_proj"),
        ("float_but_not_skipped", "a.2.o_proj"),
    }
    assert "vLLM reads it" in by_code["float_but_not_skipped", "a.1.o_proj"]
    assert "transformers, vLLM and SGLang" in by_code["float_but_not_skipped", "a.2.o_proj"]


def test_no_skip_list_and_one_layer_in_float(tmp_path: Path) -> None:
    (finding,) = layers(tmp_path, [], "a.0.o_proj", floats=("a.1.o_proj",)).findings
    assert (finding.code, finding.layer) == ("float_but_not_skipped", "a.1.o_proj")
