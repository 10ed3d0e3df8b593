"""vLLM itself, on this CPU: with the plugin it serves block FP8, without it starts as before.

Run by `make test-vllm` inside the environment that tools/vllm_environment.py makes. The last test
uninstalls blockscale there for as long as it runs.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.engine, pytest.mark.weights]

ROOT = Path(__file__).resolve().parent.parent.parent
NEW_TOKENS = 16
STARTS_WITHIN_S = 420
STOPS_WITHIN_S = 60
MEMORY_LIMIT = 6 * 2**30
# Prompts whose best token leads by at least 0.1 at all sixteen steps in float16, so that another
# order of summation cannot turn the choice. In bfloat16 the steps between logits are as large as
# that, and equal logits are common.
PROMPTS = (
    "The capital of Japan is",
    "Once upon a time, there was a",
    "In 1969, humans first",
    "1, 2, 3, 4, 5, 6,",
    "The quick brown fox jumps over the",
    "The chemical symbol for gold is",
    "The Earth orbits the",
    "2 + 2 =",
    "SELECT * FROM users WHERE",
    "class Stack:",
)
# vLLM joins q, k and v, and gate and up, and wants each whole in blocks: 576 and 192 rows are.
BLOCK = "64x64"
LAYERS = 30
PLANNED = re.compile(r"blockscale: (model\.layers\.\d+\.\S+): (N=.*)")


@dataclass
class Server:
    """A vLLM server that answers, and the file it logs to."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def complete(self, prompt: str) -> list[int]:
        """The greedy continuation, as token ids, asked with the openai client."""
        from openai import OpenAI

        with OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120) as client:
            answer = client.completions.create(
                model="model",
                prompt=prompt,
                max_tokens=NEW_TOKENS,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
        return list(answer.choices[0].token_ids)


@pytest.fixture(scope="module")
def fp8(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fp8") / "smollm2"
    command = [sys.executable, "-m", "blockscale.cli.main", "quantize"]
    subprocess.run([*command, smollm2, target, "--block", BLOCK], check=True)
    return target


@contextmanager
def serving(model: Path, log: Path) -> Iterator[Server]:
    """A server on a free loopback port. Leaves no process, however the body ends.

    Raises AssertionError with the end of the log if it does not come up in time.
    """
    import psutil

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float16", "--max-model-len", "256", "--max-num-seqs", "2"]
    command += ["--enforce-eager"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)  # blockscale is there if and only if it is installed
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, cwd="/")
    family: set[psutil.Process] = set()
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log, family)
        yield Server(url, log, process)
        used = sum(member.memory_info().rss for member in _living(family))
        print(f"memory of the server's {len(family)} processes: {used / 2**30:.1f} GiB")
        assert used < MEMORY_LIMIT
        process.terminate()
        process.wait(STOPS_WITHIN_S)
        _, left = psutil.wait_procs(family, timeout=STOPS_WITHIN_S)
        assert not left, f"left running: {left}"
    finally:
        for member in _living(family):
            member.kill()
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, family: set[object]) -> None:
    import psutil

    end = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < end and process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            family.update((parent, *parent.children(recursive=True)))
        except psutil.NoSuchProcess:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - our own server
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(1)
    raise AssertionError("\n".join(log.read_text(errors="replace").splitlines()[-120:]))


def _living(family: set[object]) -> list[object]:
    return [member for member in family if member.is_running()]


def test_vllm_serves_block_fp8_by_plan_with_the_tokens_of_transformers(
    fp8: Path, tmp_path: Path
) -> None:
    expected = _tokens_of_transformers(fp8)
    with serving(fp8, tmp_path / "server.log") as server:
        answers = [server.complete(prompt) for prompt in PROMPTS]
    log = (tmp_path / "server.log").read_text(encoding="utf-8", errors="replace")
    plan = dict(PLANNED.findall(log))
    print("\nthe plan, as the server logged it:")
    for name, words in plan.items():
        print(f"  {name}: {words}")
    print("\nprompt: tokens of transformers and of vLLM")
    for prompt, tokens, wanted in zip(PROMPTS, answers, expected, strict=True):
        print(f"  {prompt!r}: {'the same' if tokens == wanted else 'differ'}: {tokens}")
    assert answers == expected
    parts = ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
    assert set(plan) == {f"model.layers.{i}.{part}" for i in range(LAYERS) for part in parts}
    assert all("-> M >= 0: cpu; weight: none, used as stored" in words for words in plan.values())
    assert "Selected BlockscaleBlockFp8Kernel" in log


def _tokens_of_transformers(path: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    from blockscale.formats import DType
    from blockscale.integrations.transformers import load_model

    tokenizer = AutoTokenizer.from_pretrained(path)
    loaded = load_model(path, dtype=DType.FLOAT16)
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            tokens = loaded.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def test_without_blockscale_vllm_starts_as_before(smollm2: Path, fp8: Path, tmp_path: Path) -> None:
    """The float model is served; the FP8 model meets vLLM's own answer on this CPU."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    has_amx = torch.cpu._is_amx_tile_supported()
    subprocess.run([*pip, "uninstall", "--yes", "blockscale"], check=True)
    try:
        gone = subprocess.run(
            [sys.executable, "-c", "import blockscale"], cwd="/", capture_output=True, check=False
        )
        assert gone.returncode == 1
        with serving(smollm2, tmp_path / "float.log") as server:
            assert len(server.complete(PROMPTS[0])) == NEW_TOKENS
        assert "blockscale" not in (tmp_path / "float.log").read_text(errors="replace")
        if has_amx:
            with serving(fp8, tmp_path / "fp8.log") as server:
                assert server.complete(PROMPTS[0])
        else:
            with (
                pytest.raises(AssertionError, match="Engine core initialization failed"),
                serving(fp8, tmp_path / "fp8.log"),
            ):
                pass
            log = (tmp_path / "fp8.log").read_text(errors="replace")
            assert "Failed to find a kernel that can implement the ScaledMM linear layer" in log
            assert "CPUFp8BlockScaledMMKernel requires AMX tile support" in log
        print("\nuninstalled: the float model is served, the FP8 model meets vLLM's own refusal")
    finally:
        subprocess.run([*pip, "install", "--no-deps", "--editable", str(ROOT)], check=True)
