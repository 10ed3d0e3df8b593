"""Every command as a user meets it: exit code, stdout, stderr, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import command_line
import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.testing.model_shapes import minimax_m25, qwen3_8b, write_model_headers

if TYPE_CHECKING:
    from pathlib import Path

# Of 62: layers are alike, and the whole model is planned in tests/planning.
MINIMAX_LAYERS = 6
COMMANDS = ("doctor", "inspect", "plan", "quantize", "verify", "generate")


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)


def blockscale(*arguments: object, environ: dict[str, str] | None = None) -> Result:
    done = command_line.blockscale(*arguments, **(environ or {}))
    return Result(done.returncode, done.stdout, done.stderr)


def started(*arguments: object) -> Result:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "blockscale", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_one_line_error(result: Result, *words: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("blockscale: ")
    for word in words:
        assert word in result.err


@pytest.fixture(scope="module")
def minimax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minimax")
    write_model_headers(folder, minimax_m25(MINIMAX_LAYERS))
    return folder


def test_help_names_every_command() -> None:
    result = started("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert command in result.out


def test_no_arguments_show_the_help() -> None:
    assert blockscale() == blockscale("--help")


@pytest.mark.parametrize("command", ["inspect", "plan", "verify"])
def test_a_folder_that_may_not_be_entered_is_one_line(
    command: str, fp8_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As root nothing is forbidden, so the operating system's answer is put in its place."""
    from pathlib import Path as AnyPath

    from blockscale.cli import main

    def forbidden(path: AnyPath, **_: object) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(AnyPath, "exists", forbidden)
    monkeypatch.setattr(sys, "argv", ["blockscale", command, str(fp8_checkpoint)])
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"blockscale: {fp8_checkpoint}: cannot be read: Permission denied\n"
    )


def test_findings_are_one_line_each_where_stdout_is_no_terminal(fp8_checkpoint: Path) -> None:
    file = fp8_checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.down_proj.weight_scale_inv"]
    save_file(tensors, file)
    (line,) = [x for x in blockscale("inspect", fp8_checkpoint).out.splitlines() if "fault" in x]
    assert line.endswith("download or convert it again")


def test_verify_says_where_there_is_nothing_to_verify(float_checkpoint: Path) -> None:
    result = blockscale("verify", float_checkpoint)
    assert result.code == 0
    assert result.out == "no layer is in block FP8: there is nothing to verify\n"


def test_version() -> None:
    assert started("--version").out.startswith("blockscale 0.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan",), ("PATH",)),
        (("plan", "/nowhere"), ("/nowhere", "does not exist")),
        (("plan", "x", "--dtype", "int8"), ("int8", "bfloat16")),
        (("plan", "x", "--device", "sm_42"), ("sm_42", "sm_90")),
        (("plan", "x", "--tp", "0"), ("tp=0",)),
        (("plan", "x", "--tp", "8", "--ep", "3"), ("3", "8")),
        (("quantize", "x", "y", "--block", "128"), ("--block", "128x128")),
        (("fly",), ("fly", "see blockscale --help")),
        (("plan", "x", "--devices", "cpu"), ("--device", "see blockscale plan --help")),
        (("convert", "x", "y", "--to", "foo"), ("--to': 'foo' is not one of",)),
        (("plan", __file__), ("is no .safetensors file",)),
    ],
)
def test_wrong_use_is_one_line_and_code_2(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_line_error(blockscale(*arguments), *words)


def test_the_exit_code_is_that_of_the_process() -> None:
    assert_one_line_error(started("plan", "/nowhere"), "/nowhere", "does not exist")


def test_unknown_setting_in_the_environment_is_refused(fp8_checkpoint: Path) -> None:
    result = blockscale(
        "plan", fp8_checkpoint, "--device", "sm_90", environ={"BLOCKSCALE_BACKEND": "triton"}
    )
    assert_one_line_error(result, "BLOCKSCALE_BACKEND")


def test_settings_narrow_the_plan(fp8_checkpoint: Path) -> None:
    result = blockscale(
        "plan",
        fp8_checkpoint,
        "--device",
        "sm_90",
        "--json",
        environ={"BLOCKSCALE_BACKENDS": "triton,reference"},
    )
    used = {b["backend"] for layer in result.document["layers"] for b in layer["backends"]}
    assert used == {"triton"}


def test_doctor_names_every_backend() -> None:
    from blockscale.backends.registry import BACKENDS

    document = blockscale("doctor", "--json").document
    assert document["schema"] == 1
    assert [answer["backend"] for answer in document["backends"]] == [b.name for b in BACKENDS]
    for answer in document["backends"]:
        assert any(answer["dtypes"].values()) or answer["reasons"]
    assert "reference" in blockscale("doctor").out


def test_a_probe_ends_when_its_seconds_are_over(tmp_path: Path) -> None:
    """With what was found until then, and nothing but the document on stdout."""
    home = {"HOME": str(tmp_path)}
    result = blockscale("doctor", "--probe", "--seconds", "1", "--json", environ=home)
    assert result.document["schema"] == 1


def test_quantize_inspect_plan_verify_agree(float_checkpoint: Path, fp8_checkpoint: Path) -> None:
    inspected = blockscale("inspect", fp8_checkpoint, "--json").document
    assert sum(group["layers"] for group in inspected["groups"]) == 2
    planned = blockscale("plan", fp8_checkpoint, "--device", "cpu", "--json").document
    assert {layer["name"] for layer in planned["layers"]} == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    }
    verified = blockscale("verify", fp8_checkpoint, "--against", float_checkpoint, "--json")
    assert verified.code == 0
    errors = [layer["error"]["relative_error"] for layer in verified.document["layers"]]
    assert len(errors) == 2
    assert all(0.02 < error < 0.03 for error in errors)


def test_tables_have_no_json_and_json_has_nothing_else(fp8_checkpoint: Path) -> None:
    for command in ("inspect", "plan", "verify"):
        text, document = (
            blockscale(command, fp8_checkpoint),
            blockscale(command, fp8_checkpoint, "--json"),
        )
        assert text.code == document.code == 0
        assert not text.out.startswith("{")
        assert document.document["schema"] == 1
        assert document.err == ""


def test_quantize_refuses_an_existing_target(float_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    (target / "precious").write_text("keep me")
    assert_one_line_error(blockscale("quantize", float_checkpoint, target), str(target))
    assert (target / "precious").read_text() == "keep me"


def test_quantize_keeps_what_it_is_told_to(float_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept"
    result = blockscale("quantize", float_checkpoint, target, "--keep", "o_proj", "--json")
    assert result.document["quantized"] == 1
    kept = load_file(target / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    original = load_file(float_checkpoint / "model.safetensors")
    assert torch.equal(kept, original["model.layers.0.self_attn.o_proj.weight"])


def test_verify_says_what_it_did_not_read(float_checkpoint: Path, fp8_checkpoint: Path) -> None:
    alone = blockscale("verify", fp8_checkpoint)
    assert alone.out.endswith("no fault found in headers and scales; --against reads all data\n")
    compared = blockscale("verify", fp8_checkpoint, "--against", float_checkpoint)
    assert compared.out.endswith("\nno fault found\n")


def test_verify_exits_1_and_names_the_layer_of_a_bad_scale(fp8_checkpoint: Path) -> None:
    file = fp8_checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight_scale_inv"][0, 0] = float("nan")
    save_file(tensors, file)
    result = blockscale("verify", fp8_checkpoint)
    assert result.code == 1
    assert "model.layers.0.mlp.down_proj" in result.out
    assert "NaN" in result.out


def test_inspect_exits_1_and_names_a_missing_scale(fp8_checkpoint: Path) -> None:
    file = fp8_checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.down_proj.weight_scale_inv"]
    save_file(tensors, file)
    result = blockscale("inspect", fp8_checkpoint)
    assert result.code == 1
    assert "model.layers.0.mlp.down_proj" in result.out


def test_truncated_file_is_one_line(fp8_checkpoint: Path) -> None:
    file = fp8_checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert_one_line_error(blockscale("plan", fp8_checkpoint, "--device", "cpu"), str(file))


def test_fp16_minimax_on_blackwell_converts_nothing_to_ue8m0(minimax: Path) -> None:
    """The founding case, SGLang PR #22300."""
    result = blockscale("plan", minimax, "--device", "sm_100", "--dtype", "float16", "--json")
    for layer in result.document["layers"]:
        assert "ue8m0" not in layer["weight_format"]
        reasons = [r for r in layer["rejected"] if r["backend"] == "deep_gemm"]
        assert "out_dtype" in [reason["obstacle"] for reason in reasons]


def test_bf16_minimax_on_blackwell_is_converted_where_the_policy_allows(minimax: Path) -> None:
    arguments = ("plan", minimax, "--device", "sm_100", "--dtype", "bfloat16", "--json")
    exact = blockscale(*arguments).document
    lossy = blockscale(*arguments, "--allow-lossy").document
    assert all("fp32" in layer["weight_format"] for layer in exact["layers"])
    assert any(finding["code"] == "unread_scales" for finding in exact["findings"])
    assert all("ue8m0" in layer["weight_format"] for layer in lossy["layers"])
    assert {b["backend"] for layer in lossy["layers"] for b in layer["backends"]} == {"deep_gemm"}


def test_tp8_splits_scale_blocks_of_minimax_experts_and_they_are_refined(minimax: Path) -> None:
    arguments = ("plan", minimax, "--device", "sm_100", "--tp", "8", "--strict", "--json")
    result = blockscale(*arguments)
    assert result.code == 0
    refined = {
        layer["name"].rpartition(".")[2]: layer["format"]
        for layer in result.document["layers"]
        if layer["shard"].get("remedy") == "refine"
    }
    assert refined == {"w13": "e4m3fn/64x128/fp32", "w2": "e4m3fn/32x32/fp32"}
    (note,) = [one for one in result.document["findings"] if one["code"] == "shard_remedy"]
    alike = MINIMAX_LAYERS - 1
    words = f"192 rows per rank are 1.5 blocks of 128 and {alike} layers like it"
    assert words in note["message"]
    whole = blockscale(*arguments, "--ep", "8")
    assert whole.code == 0
    assert not any("remedy" in layer["shard"] for layer in whole.document["layers"])


def test_plan_advise_is_the_advise_command(minimax: Path) -> None:
    arguments = (minimax, "--device", "sm_90")
    found = blockscale("plan", *arguments, "--advise", "--json").document
    assert found == blockscale("advise", *arguments, "--json").document
    at_8 = next(one for one in found["degrees"] if (one["tp"], one["ep"]) == (8, 1))
    assert (at_8["works"], at_8["chosen"]) == (True, ["refine"])
    shown = blockscale("plan", *arguments, "--advise").out
    for words in ("by refine", "uneven", "pad", "--ep 2", "1.33x"):
        assert words in shown


def test_plan_on_hopper_reads_float32_scales_as_stored(minimax: Path) -> None:
    document = blockscale("plan", minimax, "--device", "sm_90", "--json").document
    assert {layer["conversion"] for layer in document["layers"]} == {"none"}


def test_explain_gives_every_backend_a_line(tmp_path: Path) -> None:
    from blockscale.backends.registry import BACKENDS

    write_model_headers(tmp_path, qwen3_8b())
    result = blockscale("plan", tmp_path, "--device", "sm_90", "--explain")
    assert result.code == 0
    for backend in BACKENDS:
        assert backend.name in result.out


def test_header_commands_do_not_import_torch(fp8_checkpoint: Path) -> None:
    """700 GB checkpoints are planned on laptops; torch takes two seconds to import."""
    program = (
        "import sys\n"
        "from blockscale.cli import main\n"
        "try:\n"
        "    main.run()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    for arguments in (("inspect",), ("plan", "--device", "sm_90"), ("verify",)):
        done = subprocess.run(
            [sys.executable, "-c", program, arguments[0], str(fp8_checkpoint), *arguments[1:]],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", ["--json", "--all"])
def test_a_closed_pipe_is_quiet_and_no_finding(fp8_checkpoint: Path, option: str) -> None:
    """`| head` in a script that asks for the status of all of the pipe."""
    command = [sys.executable, "-m", "blockscale", "verify", str(fp8_checkpoint), option]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_convert_refuses_what_would_lose_and_measures_it_if_allowed(
    fp8_checkpoint: Path, tmp_path: Path
) -> None:
    wanted = ("convert", fp8_checkpoint, tmp_path / "out", "--scales", "e8m0")
    assert_one_line_error(blockscale(*wanted), "weight_scale_inv", "--allow-lossy")
    assert not (tmp_path / "out").exists()
    document = blockscale(*wanted, "--allow-lossy", "--json").document
    assert document["lossless"] is False
    errors = [loss["relative_error"] for loss in document["losses"]]
    assert len(errors) == 2
    assert all(0 < error < 0.03 for error in errors)
    text = blockscale("convert", fp8_checkpoint, tmp_path / "text", "--to", "modelopt")
    assert text.code == 0
    assert "no value changed" in text.out
    text = blockscale(*wanted[:2], tmp_path / "lossy", *wanted[3:], "--allow-lossy")
    assert "2 layers requantized" in text.out
    assert "down_proj" in text.out


def test_verify_shows_the_first_of_many_faults(tmp_path: Path) -> None:
    """Headers with holes for data: all 252 layers have zero scales."""
    folder = tmp_path / "qwen"
    write_model_headers(folder, qwen3_8b())
    result = blockscale("verify", folder)
    assert result.code == 1
    assert result.out.count("fault: ") == 8
    assert "and 244 more like zero_scale (--all shows them)" in result.out
