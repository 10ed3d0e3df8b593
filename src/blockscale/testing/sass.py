"""Reads what ptxas made of a kernel, with the tools that come with Triton: no GPU, no toolkit."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LABEL = re.compile(r"^\s*(\.L_x_\d+):")
BRANCH = re.compile(r"BRA\S*\s.*`\((\.L_x_\d+)\)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z0-9_]+)")
REGISTER = re.compile(r"\bR(\d+)\b")
SET_REGISTERS = re.compile(r"USETMAXREG\S*\s+(?:UP\d+,\s*)?(0x[0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class Resources:
    """ptxas's own report."""

    registers: int
    spilled_bytes: int
    stack_bytes: int


@dataclass(frozen=True, slots=True)
class Section:
    """Code after one setting of registers per thread: what it may use, what it does use."""

    allowed_registers: int
    used_registers: int
    instructions: Counter[str]


def resources(ptx: str, architecture: str = "sm_90a") -> Resources:
    """Registers, spills and stack of a kernel, by Triton's ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [assembler(ptx), "-v", f"--gpu-name={architecture}", str(source)]
        result = subprocess.run(  # noqa: S603 - Triton's own tool
            [*command, "-o", f"{source}.cubin"], capture_output=True, text=True, check=True
        )
    report = result.stderr
    stack, stores, loads = (
        sum(map(int, re.findall(rf"(\d+) bytes {what}", report)))
        for what in ("stack frame", "spill stores", "spill loads")
    )
    registers = re.findall(r"Used (\d+) registers", report)
    return Resources(max(map(int, registers)), stores + loads, stack)


def assembler(ptx: str) -> str:
    """The path of Triton's ptxas for this PTX."""
    # From Triton 3.9 on PTX is too new for the one named plainly; 3.9 itself takes the other.
    is_new = re.search(r"^\.version 9\.[4-9]", ptx, re.MULTILINE)
    return _tool("ptxas-blackwell" if is_new else "ptxas")


def local_bytes(cubin: bytes) -> int:
    """Bytes of a thread's local memory, stack and spilled registers, by Triton's cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [_tool("cuobjdump"), "--dump-resource-usage", str(binary)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - Triton's own tool
    found = re.findall(r"\b(?:STACK|LOCAL):(\d+)", result.stdout)
    if not found:
        msg = f"cuobjdump names no local memory: {result.stdout[:200]!r}"
        raise ValueError(msg)
    return sum(map(int, found))


def before_arrivals(ptx: str) -> list[str]:
    """For each arrival at a barrier, which of a meeting, an access or a wait comes last before it.

    Lines of PTX in the order of the text: of one thread's arrival the reads of all others must
    lie behind a barrier of the partition's warps.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    kinds = ("bar.sync", "bar.warp.sync", "ld.shared", "st.shared", "wgmma.wait_group")
    arrivals = [at for at, line in enumerate(lines) if "mbarrier.arrive.shared::cta" in line]
    return [[line for line in lines[:at] if line.startswith(kinds)][-1] for at in arrivals]


def disassemble(cubin: bytes) -> list[str]:
    """Lines of SASS, by Triton's nvdisasm."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [_tool("nvdisasm"), "-c", str(binary)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - Triton's own tool
    return result.stdout.splitlines()


def count(lines: list[str]) -> Counter[str]:
    """Instructions by name, without their modifiers."""
    found = (INSTRUCTION.match(line) for line in lines)
    return Counter(match[1] for match in found if match)


def inner_loops(lines: list[str], instruction: str) -> list[list[str]]:
    """The innermost loops that hold ``instruction``, in the order of the code.

    A jump back from behind the end of the program is no loop: ptxas puts what seldom runs there,
    such as waiting once more for a barrier.
    """
    labels = {match[1]: at for at, line in enumerate(lines) if (match := LABEL.match(line))}
    spans = []
    for end, line in enumerate(lines):
        match = BRANCH.search(line)
        start = labels.get(match[1], end) if match else end
        body = count(lines[start : end + 1]) if start < end else Counter[str]()
        if instruction in body and "EXIT" not in body:
            spans.append((start, end))
    innermost = [
        (start, end)
        for start, end in spans
        if not any(
            (start, end) != other and start <= other[0] and other[1] <= end for other in spans
        )
    ]
    return [lines[start : end + 1] for start, end in sorted(innermost)]


def sections(lines: list[str]) -> list[Section]:
    """The parts of a warp-specialized kernel, cut where registers are set (setmaxnreg)."""
    cuts = [at for at, line in enumerate(lines) if SET_REGISTERS.search(line)]
    found = []
    for start, end in zip(cuts, [*cuts[1:], len(lines)], strict=True):
        setting = SET_REGISTERS.search(lines[start])
        assert setting is not None
        code = lines[start:end]
        used = [
            int(number)
            for line in code
            for number in REGISTER.findall(re.sub(r"/\*.*?\*/", "", line))
        ]
        found.append(Section(int(setting[1], 16), max(used, default=-1) + 1, count(code)))
    return found


def _tool(name: str) -> str:
    import triton  # noqa: PLC0415 - the other functions read text that is there already

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
