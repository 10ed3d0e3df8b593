"""Every Python block of the documents runs, and no code block escapes: it runs or is on the list.

The folder has ``path/to/fp8-checkpoint``, a small Qwen3 in block FP8. The list is in
``tools/document_blocks.py``; console blocks are run by ``tests/documents``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import document_blocks as lists
from blockscale.checkpoint.quantize import quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint

ROOT = Path(__file__).parent.parent.parent


PYTHON = [b for b in lists.BLOCKS if b.language == "python" and not b.is_listed]


@pytest.fixture(scope="module")
def fp8_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of one layer in block FP8, with a tokenizer that knows its 128 bytes."""
    import torch

    pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "float")
    letters = {letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "float")
    quantize_checkpoint(read_checkpoint(folder / "float"), folder / "fp8")
    return folder / "fp8"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_runs(
    block: Any, fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "fp8-checkpoint").symlink_to(fp8_model)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, block.place, "exec"), {"__name__": "document"})  # noqa: S102 - our own documents


@pytest.mark.parametrize("block", lists.BLOCKS, ids=lambda block: block.place)
def test_no_block_escapes(block: Any) -> None:
    """A block is run, is listed, or is plainly no code."""
    if block.language == "python" or block.is_console or block.is_listed:
        return
    assert block.language in {"", *lists.TEXT}, f"no test runs {block.language}"
    for line in block.code.splitlines():
        assert not line.startswith(lists.COMMANDS), (
            f"no test runs {line!r}: begin it with $, or list it in tools/document_blocks.py"
        )


def test_every_exception_is_still_needed() -> None:
    for document, begin, why in lists.NOT_RUN:
        (_,) = [b for b in lists.BLOCKS if b.document == document and b.code.startswith(begin)]
        assert why
    for document, why in lists.NOT_RUN_DOCUMENTS.items():
        assert any(block.document == document for block in lists.BLOCKS)
        assert why
    for command, why in lists.NOT_HERE.items():
        assert why
        assert any(f"$ {command}" in block.code for block in lists.BLOCKS)
