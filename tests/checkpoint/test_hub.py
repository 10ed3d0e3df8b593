"""Headers from a Hub that is well, and from one that throttles, breaks off and lies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.checkpoint import hub
from blockscale.checkpoint.header import MAX_HEADER_BYTES
from blockscale.checkpoint.hub import Repository, read_headers, read_repository, repository_named
from blockscale.checkpoint.inspect import inspect_checkpoint
from blockscale.checkpoint.read import MODELOPT_NAME, read_bytes, read_checkpoint
from blockscale.checkpoint.remote import Patience, RemoteFile, Server
from blockscale.errors import CheckpointError, SettingsError
from blockscale.testing.hub_server import ENDLESS_BYTES, Answer, Asked, HubServer
from blockscale.testing.model_shapes import qwen3_8b, write_model_headers

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("huggingface_hub", reason="pip install 'blockscale[hub]'")
from huggingface_hub import constants, get_session

HASTY = Patience(attempts=4, first_wait_s=0.0, silence_s=5.0)
TINY = Repository("org/tiny")
SHARD = "org/tiny/model.safetensors"


@pytest.fixture
def server(
    fp8_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    """``org/tiny`` is ``fp8_checkpoint``; headers are kept in a folder of this test."""
    (tmp_path / "served" / "org").mkdir(parents=True)
    fp8_checkpoint.rename(tmp_path / "served" / "org" / "tiny")
    with HubServer(tmp_path / "served").running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = f"{running.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "kept"))
        yield running


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def refused(words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        read_repository(TINY, HASTY)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("org/tiny")


def once(file: str, answer: Answer, times: int = 1) -> object:
    """Answer so to the first requests for a file, then truly."""
    return lambda asked: answer if asked.file == file and asked.nth < times else None


def always(file: str, answer: Answer) -> object:
    return lambda asked: answer if asked.file == file else None


def forget(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "kept")


def test_a_repository_is_the_checkpoint_that_was_uploaded(server: HubServer) -> None:
    local = read_checkpoint(server.folder / "org" / "tiny")
    remote = read_repository(TINY)
    assert remote.revision == server.COMMIT
    assert str(remote.path) == "org/tiny"
    assert str(remote.config_path) == "org/tiny/config.json"
    assert remote.config == local.config
    assert list(remote.tensors) == list(local.tensors)
    for name, entry in local.tensors.items():
        other = remote.tensor(name)
        assert (other.dtype, other.shape, other.offset, other.length) == (
            (entry.dtype, entry.shape, entry.offset, entry.length)
        )
    assert inspect_checkpoint(remote).groups == inspect_checkpoint(local).groups


def test_modelopts_own_declaration_is_fetched_too(server: HubServer) -> None:
    folder = server.folder / "org" / "tiny"
    declared = {"quantization": {"quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]}}
    (folder / MODELOPT_NAME).write_text(json.dumps(declared))
    (folder / "config.json").write_text("{}")
    remote = read_repository(TINY)
    assert remote.modelopt == read_checkpoint(folder).modelopt == declared
    assert inspect_checkpoint(remote).scheme.method == "modelopt"


def test_no_byte_of_the_data_is_asked_for_or_sent(server: HubServer) -> None:
    read_repository(TINY)
    header = header_bytes(server.folder / SHARD)
    assert [(a.begin, a.end) for a in server.requests_for(SHARD)] == [(0, 8), (0, header)]
    assert server.sent[SHARD] == 8 + header


def test_many_shards_and_an_index(server: HubServer) -> None:
    folder = server.folder / "org" / "qwen"
    write_model_headers(folder, qwen3_8b())
    seen: list[tuple[int, int]] = []
    remote = read_repository(
        Repository("org/qwen"), progress=lambda done, total: seen.append((done, total))
    )
    local = read_checkpoint(folder)
    assert remote.tensor_bytes == local.tensor_bytes > 8_000_000_000
    assert seen == [(1, 2), (2, 2)]
    for file in local.files:
        assert server.sent[f"org/qwen/{file.name}"] == 8 + header_bytes(file)


def test_the_token_goes_to_the_hub_and_not_to_the_host_it_redirects_to(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    read_repository(TINY)
    assert [asked.authorized for asked in server.requests_for("org/tiny")] == [True]
    assert [asked.authorized for asked in server.requests_for(SHARD)] == [False, False]


def test_what_was_read_is_kept(server: HubServer) -> None:
    first = read_repository(TINY)
    count = len(server.asked)
    assert read_repository(TINY) == first
    assert len(server.asked) == count + 1, "only the commit of `main` is asked for again"
    assert read_repository(Repository("org/tiny", server.COMMIT)) == first
    assert len(server.asked) == count + 1, "a commit needs no question"


def test_offline_uses_what_was_kept(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("never kept on this disk; read them once without HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first = read_repository(TINY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(server.asked)
    assert read_repository(TINY) == first
    assert len(server.asked) == count


def test_damaged_keepings_are_read_again(server: HubServer, tmp_path: Path) -> None:
    first = read_repository(TINY)
    (kept,) = (tmp_path / "kept").rglob("model.safetensors")
    kept.write_bytes(kept.read_bytes().replace(b"F8_E4M3", b"F8_E5M2"))
    assert read_repository(TINY) == first
    assert len(server.requests_for(SHARD)) == 4


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(
    server: HubServer, tmp_path: Path
) -> None:
    (tmp_path / "kept").write_text("in the way")
    assert read_repository(TINY) == read_repository(TINY)
    assert len(server.requests_for(SHARD)) == 4


def test_a_broken_connection_is_resumed_where_it_broke(server: HubServer) -> None:
    header = header_bytes(server.folder / SHARD)
    breaks = Answer(cut=100)
    server.temper = lambda asked: breaks if asked.file == SHARD and asked.nth in {1, 2} else None
    assert read_repository(TINY, HASTY).tensor_bytes
    begins = [(asked.begin, asked.end) for asked in server.requests_for(SHARD)]
    assert begins == [(0, 8), (0, header), (100, header), (200, header)]


@pytest.mark.parametrize("file", ["org/tiny", "org/tiny/config.json", SHARD])
@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=429, headers={"Retry-After": "0"}),
        Answer(status=503),
        Answer(status=408),
        Answer(cut=0),
        Answer(body=b"", headers={"Content-Length": "no number"}, cut=0),
    ],
    ids=["429", "503", "408", "dropped", "no HTTP"],
)
def test_three_failures_are_borne_and_no_fifth_request_is_made(
    server: HubServer, tmp_path: Path, file: str, answer: Answer
) -> None:
    server.temper = once(file, answer, times=3)
    assert read_repository(TINY, HASTY).tensors
    server.temper = always(file, answer)
    count = len(server.requests_for(file))
    forget(tmp_path)
    refused("in 4 attempts")
    assert len(server.requests_for(file)) == count + 4


def test_a_server_that_is_not_there(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    refused("could not be read from http://127.0.0.1:1 in 4 attempts .*HF_HUB_OFFLINE=1")
    assert server.asked == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(status=429, headers={"Retry-After": "3600"}), "no more requests for 3600 s"),
        (Answer(status=401, headers={"X-Error-Code": "RepoNotFound"}), "neither on this disk nor"),
        (Answer(status=401), "check the name, or log in"),
        (Answer(status=403, headers={"X-Error-Code": "GatedRepo"}), "is gated .* accept its terms"),
        (Answer(status=404, headers={"X-Error-Code": "RevisionNotFound"}), "is no revision"),
        (Answer(status=418), "HTTP status 418"),
        (Answer(body=b"<html>"), "is not valid JSON"),
        (Answer(body=b"[]"), "must be a JSON object"),
        (Answer(body=b"{}"), "does not answer like a Hub; check HF_ENDPOINT"),
        (Answer(body=b'{"sha": "../../x", "siblings": []}'), "does not answer like a Hub"),
        (Answer(body=b"x", headers={"Content-Encoding": "gzip"}), "comes compressed"),
        (Answer(body=b"x", headers={"Content-Length": "99999999999"}, cut=1), "at most 50000000"),
        (Answer(body=b" ", endless=True), "longer than the 50000000 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_hub_may_say_about_a_repository(
    server: HubServer, answer: Answer, words: str
) -> None:
    server.temper = always("org/tiny", answer)
    refused(words)
    assert len(server.asked) == 1


def lying(prefix: int) -> Answer:
    return Answer(body=prefix.to_bytes(8, "little"))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lying(MAX_HEADER_BYTES + 1), "above the limit"),
        (lying(2**64 - 1), "above the limit"),
        (lying(10_000_000), "claims a header of 10000000 bytes but holds only"),
        (Answer(headers={"Content-Range": "bytes 0-7/99"}), "is said to hold .* and then 99"),
        (Answer(headers={"Content-Range": "bytes 8-15/99"}), "sends byte 8"),
        (Answer(headers={"Content-Range": "pages 1-2"}), "sends byte -1"),
        (Answer(status=416), "holds fewer than 8 bytes"),
        (Answer(status=302, headers={"Location": "/"}), None),
        (Answer(status=404, headers={"X-Error-Code": "EntryNotFound"}), "not in the repository"),
        (Answer(body=b"1234", headers={"Content-Range": "bytes 0-3/*"}), "in 4 attempts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_may_come_instead_of_a_header(
    server: HubServer, answer: Answer, words: str | None
) -> None:
    server.temper = always(SHARD, answer)
    refused(words or "org/tiny/model.safetensors")


def test_a_server_that_ignores_ranges_is_not_read_beyond_the_header(server: HubServer) -> None:
    """16 MB of data behind a small header: what leaves the server fits in socket buffers."""
    file = server.folder / SHARD
    save_file({**load_file(file), "z.bias": torch.zeros(4_000_000)}, file)
    server.temper = always(SHARD, Answer(ignores_range=True))
    assert read_repository(TINY, HASTY).tensor("z.bias").length == 16_000_000


def test_an_endless_answer_is_hung_up_on(server: HubServer) -> None:
    endless = Answer(endless=True)
    server.temper = lambda asked: endless if asked.file == SHARD and asked.nth == 1 else None
    assert read_repository(TINY, HASTY).tensors
    assert server.sent[SHARD] < ENDLESS_BYTES / 4


def test_sizes_that_the_listing_lies_about(server: HubServer) -> None:
    server.sizes[SHARD] = 12
    refused("is said to hold 12 bytes and then")
    server.sizes[SHARD] = 3
    refused("holds 3 bytes, too few")


def test_a_slow_server_is_given_up(server: HubServer) -> None:
    times = iter(range(0, 10_000, 200))
    slow = Server(
        server.endpoint,
        get_session(),
        {},
        Patience(grace_s=30.0, slowest=1000),
        clock=lambda: float(next(times)),
    )
    server.temper = always("org/tiny/config.json", Answer(body=b" " * 999, endless=True))
    file = RemoteFile(f"{server.endpoint}/org/tiny/resolve/main/config.json", Path("x"))
    with pytest.raises(CheckpointError, match="too slowly"):
        slow.whole(file, 1_000_000)


def test_waits_double_and_follow_the_server_up_to_a_limit(server: HubServer) -> None:
    waits: list[float] = []
    busy = Server(
        server.endpoint,
        get_session(),
        {},
        Patience(attempts=6, first_wait_s=1.0, longest_wait_s=20.0),
        sleep=waits.append,
    )

    def temper(asked: Asked) -> Answer:
        return Answer(status=429, headers={"Retry-After": "7"} if asked.nth == 2 else {})

    server.temper = temper
    file = RemoteFile(f"{server.endpoint}/org/tiny/resolve/main/config.json", Path("x"))
    with pytest.raises(CheckpointError, match="in 6 attempts"):
        busy.whole(file, 1000)
    assert waits == [1.0, 2.0, 7.0, 14.0, 20.0]


def test_an_index_may_not_leave_the_repository(server: HubServer) -> None:
    for name, words in (("../x", "in no other folder"), ("y.safetensors", "which is missing")):
        index = server.folder / "org" / "tiny" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(words)


@pytest.mark.usefixtures("server")
def test_headers_too_large_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_HEADERS_BYTES", 100)
    refused("headers of more than 100 bytes together")


@pytest.mark.usefixtures("server")
def test_data_of_a_repository_cannot_be_read() -> None:
    entry = read_repository(TINY).tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"is not on this disk.*hf download"):
        read_bytes(entry)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Repository("org/name")),
        ("Qwen/Qwen3-0.6B-FP8", Repository("Qwen/Qwen3-0.6B-FP8")),
        ("org/name@v1.0", Repository("org/name", "v1.0")),
        ("org/name@refs/pr/1", Repository("org/name", "refs/pr/1")),
        ("name", None),
        ("a/b/c", None),
        ("./b", None),
        ("../b", None),
        ("/a/b", None),
        ("a/..", None),
        ("org/name@../../x", None),
        ("org/näme", None),
    ],
)
def test_what_is_a_repository(text: str, expected: Repository | None) -> None:
    assert repository_named(text) == expected


def test_what_lies_here_comes_first(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(server.folder)
    assert read_headers("org/tiny").revision is None
    assert server.asked == []


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SettingsError, match=r"blockscale\[hub\]"):
        read_headers("org/name")


def command(server: HubServer, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in its own process, told about the server by HF_ENDPOINT alone."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BLOCKSCALE_", "HF_"))}
    return subprocess.run(
        [sys.executable, "-m", "blockscale.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
        env={**clean, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf")},
    )


@pytest.mark.usefixtures("forked")
def test_commands_take_a_repository(server: HubServer, tmp_path: Path) -> None:
    inspected = command(server, tmp_path, "inspect", "org/tiny", "--json")
    assert json.loads(inspected.stdout)["path"] == "org/tiny"
    planned = command(server, tmp_path, "plan", "org/tiny@main", "--device", "sm_90", "--json")
    local = command(
        server, tmp_path, "plan", str(server.folder / "org" / "tiny"), "--device", "sm_90", "--json"
    )
    assert json.loads(planned.stdout) == json.loads(local.stdout)
    assert command(server, tmp_path, "advise", "org/tiny", "--device", "sm_90").returncode == 0
    assert list((tmp_path / "hf" / "assets").rglob("manifest.json"))


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "org/nothing"), "org/nothing: is neither on this disk nor on http://127.0.0.1"),
        (("plan", "org/tiny@v9"), "org/tiny@v9: is no revision"),
        (("plan", "org/tiny", "--device", "cpu", "--read-scales"), "hf download org/tiny"),
        (("verify", "org/tiny"), "org/tiny: does not exist"),
    ],
)
def test_failures_are_one_line(
    server: HubServer, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = command(server, tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
