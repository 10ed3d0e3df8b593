"""The code blocks of the documents, and the reviewed list of those that no test runs.

``tests/docs/test_blocks.py`` runs Python blocks, ``tests/documents`` those of commands.
A block that only another machine can run goes on ``NOT_RUN`` with the reason, nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *(*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")),
    ]
)
TEXT = {"text", "json", "cpp", "toml", "yaml", "diff"}
COMMANDS = ("blockscale ", "python ", "pip ", "make ", "vllm ", "docker ", "git ", "torchrun ")

# Blocks that tests do not run: (document, how the block begins, why). Reviewed one by one.
NOT_RUN = [
    ("README.md", "make demo", "installs; CI runs the same commands"),
    ("docs/transformers.md", "from transformers import AutoModelForCausalLM", "ends in ..."),
    ("docs/clients/vllm.md", "pip install blockscale", "a server; `make test-vllm` runs it"),
    ("docs/clients/sglang.md", "pip install blockscale", "a server that needs a GPU"),
    ("docs/experts.md", "from blockscale.integrations", "a checkpoint of 30 GB"),
    ("docs/parallel.md", "# path/to/program.py", "for torchrun; tests/parallel runs the like"),
]
# Documents that describe another machine from the first step to the last.
NOT_RUN_DOCUMENTS = {"examples/sglang_h200.md": "every step needs a GPU machine"}
# Commands of blocks that do run, which only another machine can carry out.
NOT_HERE = {
    "blockscale generate /models/": "a model of 8 GB on a GPU",
    "python -m blockscale.integrations.transformers_command serve": "a server; its test starts it",
}


@dataclass(frozen=True)
class Block:
    """One fenced block. ``document`` is relative to the repository."""

    document: str
    language: str
    code: str

    @property
    def place(self) -> str:
        """How test reports name it."""
        return f"{self.document}: {self.code.splitlines()[0][:60]}"

    @property
    def is_console(self) -> bool:
        """Whether it shows commands, each after a ``$``."""
        return self.language in {"", "console"} and self.code.startswith("$ ")

    @property
    def is_listed(self) -> bool:
        """Whether it is not to be run."""
        return self.document in NOT_RUN_DOCUMENTS or any(
            self.document == document and self.code.startswith(begin)
            for document, begin, _ in NOT_RUN
        )


def blocks_of(document: Path) -> list[Block]:
    """All blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    name = str(document.relative_to(ROOT))
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [Block(name, language, code) for language, code in found]


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
