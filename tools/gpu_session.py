"""What the next session on a GPU runs, in order of value, each step with a time limit.

    python tools/gpu_session.py [--seconds 560] [--steps NAME,NAME] [--out DIR]
    python tools/gpu_session.py --list
    python tools/gpu_session.py --rehearse      what can be tiny, on a pretend GPU
    python tools/gpu_session.py --take DIR      the records of DIR go into benchmarks/results

Kernels are compiled on all cores in the background (``benchmarks/ahead.py``) while tests run; what
is timed waits for that. A step starts only if its limit fits into the rest of ``--seconds``. What
ran is kept in .cache/gpu_session.json, so the same command again, into an empty DIR too, goes on
with what is left; ``--steps`` runs what it names, again too; ``--anew`` forgets. DIR ($OUT by
default) gets three files with what this call did, session.json, session.log and records.jsonl, and
one for each step that has its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

# Seconds of a call that are left for writing things down.
RESERVE_S = 10
AHEAD_S = 240
# Git ignores it, so a machine that is given the working tree anew keeps it.
STATE = ROOT / ".cache" / "gpu_session.json"
# Lines of a step's output that are shown, if it failed.
SHOWN, SHOWN_IF_FAILED = 4, 40
# In place of a file of JSON lines that the step writes.
RECORDS = "{records}"
# In place of a file that comes back as it is, called after its step.
OWN_FILE = "{own file}"


@dataclass(frozen=True, slots=True)
class Step:
    """One command. ``is_timed``: it measures, so nothing else may run beside it."""

    name: str
    command: tuple[str, ...]
    limit_s: int
    is_timed: bool = True
    gpus: int = 1


def _tests(name: str, limit_s: int, *what: str) -> Step:
    command = ("-m", "pytest", "-m", "gpu", "-q", "--durations=8", "-p", "no:cacheprovider", *what)
    return Step(name, command, limit_s, is_timed=False)


def _benchmark(name: str, limit_s: int, *arguments: str) -> Step:
    program = f"benchmarks/{name.partition(':')[0]}.py"
    return Step(name, (program, *arguments, "--out", RECORDS), limit_s)


NEVER_RUN = ("test_experts", "test_transformers_experts", "test_transformers")
CUDA = ("test_cuda_exact", "test_cuda_error", "test_cuda_grouped", "test_hopper_launch")
PRETEND = ("-m", "blockscale.testing.pretend_gpu")
# Benchmarks that have a tiny size; and what takes hours in an interpreter, or needs Inductor.
TINY = ("moe_layer", "transformers_model", "tensor_parallel")
NOT_TINY = (
    "not size_of_models and not exact_experts and not same_bits and not compiles and not 130 "
    "and not 300"
)
# Most of a test's time is compiling: 200 s were not enough for one process (H100, 2026-11-26).
AT_ONCE = ("-vv", "-p", "no:benchmark", "-n", "8", "--dist", "worksteal")
OWN = ("--backends", "gluon,cuda,triton")
# Ways to write small tiles, each with one and with two waves in flight.
FLIGHT = ("--tokens", "512,256,128,64", "--seconds", "60")
FLIGHT += ("--shapes", "2112x7168,4096x7168,3072x6144,7168x2048,576x7168,32768x512")
FLIGHT += ("--tiles", "128x64,64x64,64x128,128x96,64x96,64x32,128x128")
SWEEP = "benchmarks/results/nvidia-h100-80gb-hbm3/gluon_sweep.jsonl"
VARIANTS = ("--cases", "masked,contiguous", "--variants", "--dtypes", "bfloat16")
DOCTOR = ("-m", "blockscale.cli.main", "doctor")
# Which (N, K) of gemm.py are done; Git ignores it, as STATE.
ROWS = ".cache/gemm_rows.jsonl"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

# Together within a session's 30 minutes, but for compiling: one GPU's are counted at half.
PLANNED = (
    # All first: they passed on an H200 at c4f41cb, and both families' kernels were changed since.
    Step(
        "gpu_tests",
        ("tools/gpu_tests.py", *AT_ONCE, "tests/gpu", "tests/probe"),
        330,
        is_timed=False,
    ),
    _tests("cuda", 90, *AT_ONCE, *(f"tests/gpu/{name}.py" for name in CUDA)),
    _benchmark("gemm", 80, "--pass", "main", "--seconds", "70", "--state", ROWS),
    _benchmark("gemm:rest", 90, "--pass", "rest", "--seconds", "80", "--state", ROWS),
    _benchmark("grouped", 120, "--seconds", "90"),
    Step("cuda_flight", ("benchmarks/cuda_stores.py", *FLIGHT, "--out", OWN_FILE), 90),
    _benchmark("fp16_model", 60),
    # Without DeepGEMM, which would build for half a minute a shape while it prepares.
    _benchmark("moe_layer", 100, *OWN),
    _benchmark("moe_layer:bfloat16", 100, "--dtype", "bfloat16", *OWN),
    Step("sanitize", ("tools/sanitize.py", "--seconds", "150"), 340, is_timed=False),
    _benchmark("counters", 110),
    Step("doctor", (*DOCTOR, "--probe", "--seconds", "85", "--json"), 100),
    # One rank: how far one GPU's logits move if a sum is rounded otherwise.
    Step("one_rank", (*TORCHRUN, "1", "benchmarks/tensor_parallel.py", "--out", RECORDS), 120),
    _benchmark("transformers_model", 280, *OWN),
    _benchmark("quantize", 80),
    _benchmark("call_overhead", 60),
    Step(
        "tensor_parallel",
        (*TORCHRUN, "2", "benchmarks/tensor_parallel.py", "--out", RECORDS),
        180,
        gpus=2,
    ),
)
# Where time is left.
MORE = (
    _tests("experts", 150, "tests/gpu/test_experts.py"),
    _tests("transformers_experts", 90, "tests/gpu/test_transformers_experts.py"),
    _tests("transformers", 120, "tests/gpu/test_transformers.py"),
    # What the next choices of tiles are fitted to: cuda_fit.py, gluon_fit.py, grouped_fit.py.
    Step(
        "cuda_sweep",
        ("benchmarks/cuda_sweep.py", "--random", "--seconds", "150", "--out", OWN_FILE),
        180,
    ),
    Step(
        "gluon_sweep",
        ("benchmarks/gluon_sweep.py", "--after", SWEEP, "--seconds", "200", "--out", OWN_FILE),
        240,
    ),
    Step(
        "grouped_variants",
        ("benchmarks/grouped.py", *VARIANTS, "--seconds", "90", "--out", OWN_FILE),
        120,
    ),
)
STEPS = PLANNED + MORE


def rehearsed(steps: Sequence[Step]) -> list[Step]:
    """The tests that never ran on a GPU, and tiny benchmarks, on a pretend one."""
    found = []
    for step in steps:
        command = [*step.command]
        if f"test_{step.name}" in NEVER_RUN:
            command = [*PRETEND, *command, "-k", NOT_TINY]
        elif step.name in TINY:
            program = next(i for i, part in enumerate(command) if part.endswith(".py"))
            command = [*command[:program], *PRETEND, *command[program:], "--smoke"]
        else:
            continue
        found.append(replace(step, command=tuple(command), gpus=1))
    return found


# What a benchmark is called in ahead.py.
COMPILED = (
    "moe_layer",
    "transformers_model",
    "gemm",
    "fp16_model",
    "call_overhead",
    "tensor_parallel",
)


@dataclass(slots=True)
class Session:
    """One call: where it writes, and when it must have ended."""

    out: Path
    ends: float
    log: IO[str]
    state: Path

    def left(self) -> float:
        """Seconds for steps."""
        return self.ends - RESERVE_S - time.monotonic()

    def say(self, words: str) -> None:
        """To the screen and the log."""
        print(words, flush=True)
        print(words, file=self.log, flush=True)

    def run(self, step: Step) -> dict[str, Any]:
        """Run a step to its end or its limit; what came of it."""
        limit = min(step.limit_s, self.left())
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            records = Path(scratch) / "records.jsonl"
            log = Path(scratch) / "log"
            own = self.out / f"{step.name}.jsonl"
            files = {RECORDS: str(records), OWN_FILE: str(own.resolve())}
            command = [files.get(part, part) for part in step.command]
            self.say(f"== {step.name}: {' '.join(command)}")
            with log.open("w", encoding="utf-8") as file:
                code = wait_for(start(command, file), limit)
            text = log.read_text(encoding="utf-8", errors="replace")
            print(text, file=self.log, flush=True)
            lines = records.read_text(encoding="utf-8") if records.is_file() else ""
        with (self.out / "records.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines)
        seconds = round(time.monotonic() - started, 1)
        tail = text.strip().splitlines()[-(SHOWN if code == 0 else SHOWN_IF_FAILED) :]
        print("\n".join(tail), flush=True)
        outcome = "passed" if code == 0 else "out of time" if code is None else f"exit {code}"
        self.say(f"== {step.name}: {outcome} in {seconds} s, {lines.count(chr(10))} records")
        found = {"outcome": outcome, "seconds": seconds, "records": lines.count("\n"), "tail": tail}
        file = self.out / "session.json"
        ran = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps({**ran, step.name: found}, indent=1) + "\n", encoding="utf-8")
        return found


def main() -> int:
    """Run what is left; the exit status is 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "session")))
    parser.add_argument("--seconds", type=float, default=560, help="of this call")
    parser.add_argument("--steps", help="names, separated by commas; by default what is left")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--take", type=Path, metavar="DIR")
    parser.add_argument("--no-ahead", action="store_true", help="compile nothing beforehand")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--anew", action="store_true", help="forget what ran before")
    options = parser.parse_args()
    if options.list:
        for step in STEPS:
            needs = "2 GPUs" if step.gpus > 1 else "timed" if step.is_timed else ""
            print(f"{step.name:22s} {step.limit_s:4d} s  {needs}")
        return 0
    if options.take is not None:
        return take(options.take)
    names = options.steps.split(",") if options.steps else []
    unknown = sorted(set(names) - {step.name for step in STEPS})
    if unknown:
        parser.error(f"no such step: {', '.join(unknown)}; see --list")
    if options.anew:
        STATE.unlink(missing_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + options.seconds
    with (options.out / "session.log").open("a", encoding="utf-8") as log:
        session = Session(options.out, ends, log, STATE)
        if options.rehearse:
            session.state = options.out / "rehearsed.json"
        steps = rehearsed(STEPS) if options.rehearse else here(STEPS)
        done = run_all(session, steps, names, is_ahead=not (options.no_ahead or options.rehearse))
    failed = [name for name, found in done.items() if found["outcome"] != "passed"]
    return int(bool(failed))


def run_all(
    session: Session, steps: Sequence[Step], names: Sequence[str], *, is_ahead: bool
) -> dict[str, Any]:
    """All steps that fit; what each came to is kept. What ran before is not run again unasked.

    The first that is timed waits until nothing is compiled any more.
    """
    state: dict[str, str] = {}
    if session.state.is_file():
        state = json.loads(session.state.read_text(encoding="utf-8"))
    done: dict[str, Any] = {}
    wanted = [step for step in steps if (step.name in names if names else step.name not in state)]
    compiling = start_ahead(wanted, session) if is_ahead else None
    for step in wanted:
        if step.is_timed and compiling is not None:
            wait_for_ahead(compiling, session)
            compiling = None
        if session.left() < step.limit_s:
            session.say(f"== {step.name}: not started, {session.left():.0f} s are left")
            continue
        done[step.name] = session.run(step)
        state[step.name] = done[step.name]["outcome"]
        session.state.parent.mkdir(exist_ok=True)
        session.state.write_text(json.dumps(state) + "\n", encoding="utf-8")
    if compiling is not None:
        wait_for_ahead(compiling, session)
    for name, found in done.items():
        session.say(f"{name:22s} {found['outcome']:12s} {found['seconds']:6.1f} s")
    left = [step.name for step in STEPS if step.name not in state]
    session.say(f"left: {','.join(left) or 'nothing'}")
    return done


def here(steps: Sequence[Step]) -> list[Step]:
    """The steps for which this machine has GPUs enough."""
    gpus = gpus_here()
    return [step for step in steps if step.gpus <= gpus]


def gpus_here() -> int:
    """How many GPUs torch sees; asked in another process, so that this one holds no memory."""
    words = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    return int(done.stdout)


def start_ahead(steps: Sequence[Step], session: Session) -> subprocess.Popen[str] | None:
    """Compile for the benchmarks among ``steps``, in the background."""
    names = {step.name for step in steps}
    names |= {"gemm"} & {name.partition(":")[0] for name in names}
    parts = [name for name in COMPILED if name in names]
    if not parts:
        return None
    session.say(f"compiling ahead: {', '.join(parts)}")
    return start(["benchmarks/ahead.py", *parts], session.log)


def wait_for_ahead(process: subprocess.Popen[str], session: Session) -> None:
    """Until everything is compiled, or for too long: what is missing is compiled when it is met."""
    started = time.monotonic()
    code = wait_for(process, min(AHEAD_S, session.left()))
    waited = time.monotonic() - started
    outcome = {0: "done", None: "out of time"}.get(code, "not all could be; see the log")
    session.say(f"compiling ahead: {outcome}; waited {waited:.0f} s for it")


def start(command: Sequence[str], output: IO[str]) -> subprocess.Popen[str]:
    """A Python program of this repository, in a group of processes of its own."""
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # No network there: what looks for the Hub must not wait for it.
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environ,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], seconds: float) -> int | None:
    """The exit status; None if the time was up, and all its processes were ended."""
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=5)
        return None


def take(folder: Path) -> int:
    """Append every record of a session to the results of its machine."""
    from record import append

    counts: dict[Path, int] = {}
    for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines():
        path = append(json.loads(line))
        counts[path] = counts.get(path, 0) + 1
    for path, count in counts.items():
        print(f"{path.relative_to(ROOT)}: {count} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
