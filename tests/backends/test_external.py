"""Backends of other packages: the example of docs/backends.md, installed, and broken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from blockscale.backends.external import GROUP, external_backends
from blockscale.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "backend_package"


def install(site: Path, points: str, module: str, package: str = "my-gemm") -> None:
    """As pip leaves a distribution with this module and these lines of entry points."""
    information = site / f"{package.replace('-', '_')}-0.1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n")
    (site / f"{package.replace('-', '_')}.py").write_text(module)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of this process, to install packages into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def run_with_example(tmp_path: Path) -> Callable[..., Any]:
    """Commands in a process that has the example installed; gives back the JSON document."""
    points = (EXAMPLE / "pyproject.toml").read_text().split(f'"{GROUP}"]\n')[1]
    install(tmp_path / "site", points.replace('"', ""), (EXAMPLE / "my_gemm.py").read_text())
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": path, "HOME": str(tmp_path)}

    def run(*arguments: object) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "blockscale.cli.main", *map(str, arguments), "--json"],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_document_shows_the_example_as_it_is() -> None:
    document = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert f"```python\n{(EXAMPLE / 'my_gemm.py').read_text(encoding='utf-8')}```" in document
    points = (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8").split("[project.entry")[1]
    assert f"```toml\n[project.entry{points}```" in document


def test_an_installed_backend_is_planned_first_and_its_version_is_kept(
    run_with_example: Callable[..., Any], fp8_checkpoint: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "plan.json"
    document = run_with_example("plan", fp8_checkpoint, "--save", saved)
    used = {b["backend"] for layer in document["layers"] for b in layer["backends"]}
    assert used == {"my_matmul"}
    assert json.loads(saved.read_text())["versions"]["my-gemm"] == "0.1"


def test_a_backend_that_is_only_planned_gives_its_reasons(
    run_with_example: Callable[..., Any], fp8_checkpoint: Path
) -> None:
    arguments = ("plan", fp8_checkpoint, "--device", "sm_90", "--dtype")
    for dtype, backend in (("float16", "my_gemm"), ("bfloat16", "deep_gemm")):
        layers = run_with_example(*arguments, dtype)["layers"]
        (layer,) = [one for one in layers if one["name"].endswith("o_proj")]
        assert [b["backend"] for b in layer["backends"]] == [backend]
    reasons = [r["reason"] for r in layer["rejected"] if r["backend"] == "my_gemm"]
    assert reasons == ["writes float16, not bfloat16"]


def test_doctor_gives_its_answers(run_with_example: Callable[..., Any]) -> None:
    answers = {one["backend"]: one for one in run_with_example("doctor")["backends"]}
    assert all(answers["my_matmul"]["dtypes"].values())
    reasons = [one["reason"] for one in answers["my_gemm"]["reasons"]]
    assert "runs on sm_90, not on cpu" in reasons
    assert "package my-cuda-gemm is not installed (pip install my-cuda-gemm)" in reasons


def test_products_of_experts_are_exact(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's grouped product inside the module that serves experts."""
    import torch

    from blockscale.backends import registry
    from blockscale.modules.experts import BlockScaledExperts
    from blockscale.testing import expert_cases

    install(site, "my_matmul = my_gemm:MyMatmul", (EXAMPLE / "my_gemm.py").read_text())
    registry._external.cache_clear()
    try:
        monkeypatch.setattr(expert_cases, "BACKENDS", registry.all_backends())
        plan = expert_cases.plan_for("my_matmul")
        experts = BlockScaledExperts(plan, *expert_cases.exact_weights())
        tokens = expert_cases.exact_tokens(9)
        ids, weights = expert_cases.routing(9)
        found = experts(tokens, ids, weights)
        assert torch.equal(found, expert_cases.exact_result(tokens, ids, weights))
    finally:
        registry._external.cache_clear()


BROKEN = {
    "import nothing_of_that_name\n": "cannot be made: ModuleNotFoundError: No module named",
    "class B:\n    def __init__(self):\n        1 / 0\n": "cannot be made: ZeroDivisionError",
    "class B:\n    name = 'My GEMM'\n": "has the name 'My GEMM'",
    "class B:\n    name = 'cpu'\n    def evaluate(self, r, d): ...\n": "as another backend is",
    "class B:\n    name = 'b'\n": "has no evaluate",
    "class B:\n    name = 'b'\n    def evaluate(s, r, d): ...\n    def bind(s, w, o): ...\n": (
        "has no prepare and no quantize_activation"
    ),
}


@pytest.mark.parametrize("module", BROKEN)
def test_a_broken_package_is_named_in_one_line(module: str, site: Path) -> None:
    package = f"broken-{list(BROKEN).index(module)}"
    install(site, f"b = {package.replace('-', '_')}:B", module, package)
    with pytest.raises(BackendError) as caught:
        external_backends(["cpu"])
    line = str(caught.value)
    assert BROKEN[module] in line
    assert f"pip uninstall {package}" in line
    assert "\n" not in line
