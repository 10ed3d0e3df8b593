"""What `blockscale doctor --probe` checks, in this process, where a debugger can stop."""

from __future__ import annotations

from my_gemm import MyMatmul

from blockscale import DType
from blockscale.probe.checks import check_backend
from blockscale.probe.machine import read_machine

for dtype in DType:
    outcome = check_backend(MyMatmul(), read_machine(), dtype, started=lambda _: None)
    print(f"{dtype.value}: {outcome.shapes} shapes")
    print(f"relative error up to {outcome.max_relative_error:.0e}")
