"""``transformers serve`` answers a chat completion with an FP8 checkpoint that runs by plan."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("fastapi", reason="pip install 'blockscale[serve]'")
pytestmark = pytest.mark.weights

START_LIMIT_S = 180.0
ANSWER_LIMIT_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_it_answers(process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended with code {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.5)
    pytest.fail(f"no answer on port {port} within {START_LIMIT_S:g} s")


@pytest.fixture
def server(smollm2_fp8: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A served FP8 SmolLM2 on loopback, and the file its stderr goes to."""
    port = free_port()
    command = [sys.executable, "-m", "blockscale.integrations.transformers_command", "serve"]
    command += [str(smollm2_fp8), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stderr, text=True, cwd=tmp_path
        )
    try:
        wait_until_it_answers(process, port)
        yield f"http://127.0.0.1:{port}", log
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_chat_completion(server: tuple[str, Path], smollm2_fp8: Path) -> None:
    from openai import OpenAI

    url, log = server
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=ANSWER_LIMIT_S, max_retries=0)
    answer = client.chat.completions.create(
        model=str(smollm2_fp8),
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=16,
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    lines = [line for line in log.read_text().splitlines() if line.startswith("blockscale.")]
    assert lines[0].startswith("blockscale.plan: planned 210 layers for cpu: ")
    assert lines[1].startswith("blockscale.prepare: prepared 210 layers")
