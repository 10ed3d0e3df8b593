"""Reads this machine, and tests what is installed on it.

``machine`` (facts) -> ``cases`` (inputs with known answers) -> ``checks`` (one backend against
the reference) -> ``child`` (the same in a process that may crash or hang) -> ``proving`` (proofs,
kept). Importing this package loads no torch.
"""

from blockscale.probe.machine import detect_device

__all__ = ["detect_device"]
