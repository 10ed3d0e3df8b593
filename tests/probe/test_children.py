"""Child processes: heard line by line, ended at their limit, with what they started."""

from __future__ import annotations

import os
import sys
import threading
import time

from blockscale.probe.children import Children, Ending

SAYS = "print('noise'); print('@probe {\"number\": 7}', flush=True); "


def command(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_lines_are_heard_and_others_ignored() -> None:
    heard: list[dict[str, int]] = []
    assert Children(60).run(command(SAYS), heard.append) == Ending()
    assert heard == [{"number": 7}]


def test_how_it_died_is_said() -> None:
    killed = Children(60).run(command("import os; os.kill(os.getpid(), 11)"), print)
    assert killed == Ending("the process was killed by SIGSEGV")
    raised = Children(60).run(command("raise OSError('no library')"), print)
    assert raised == Ending("the process ended with code 1: OSError: no library")


def test_a_late_one_is_ended_with_the_compiler_that_it_waits_for() -> None:
    """The grandchild holds the pipe: were it left alone, nobody could go on."""
    grandchild: list[dict[str, int]] = []
    program = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print('@probe {\"pid\": %d}' % child.pid, flush=True); child.wait()"
    )
    ending = Children(1.5).run(command(program), grandchild.append)
    assert ending == Ending("no answer within 1.5 s")
    (said,) = grandchild
    assert _is_gone(said["pid"])


def test_stop_ends_those_that_run_and_starts_no_more() -> None:
    children = Children(600)
    threading.Timer(0.5, children.stop).start()
    assert children.run(command("import time; time.sleep(600)"), print) == Ending(is_stopped=True)
    assert children.run(command(SAYS), print) == Ending(is_stopped=True)


def _is_gone(pid: int) -> bool:
    """Killed, and waited for by whoever inherited it, or at least a zombie."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:  # noqa: PTH123 - it may vanish
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.05)
    return False
