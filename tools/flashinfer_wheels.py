"""Wheels with which FlashInfer's SM90 block-scale GEMM runs where nothing can be fetched.

    python tools/flashinfer_wheels.py DIR

FlashInfer's wheel (62 MB) holds the sources of all its kernels. This leaves out all but what
``fp8_blockscale_gemm_sm90`` needs, and puts in the library that it would build on first use. What
that library compiles when it runs (one kernel for each shape) needs nvcc on the other machine.

Needs nvcc 13 and a C++ compiler here, and a Python of the other machine's version with torch for
CUDA 13, of whose packages it takes the headers of cuBLAS. No GPU. 7 minutes on one core.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("flashinfer-python==0.7.2.post1", "apache-tvm-ffi==0.1.11")
# Imported by FlashInfer here; the image of a GPU machine has them (torch's have the rest).
HERE_ONLY = ("einops", "tabulate", "tqdm", "requests", "click", "nvidia-ml-py", "packaging")
HERE_ONLY += ("urllib3", "idna", "certifi", "charset-normalizer", "filelock")
MODULE = "fp8_blockscale_gemm_90"
KEPT_SOURCES = "flashinfer/data/csrc/nv_internal/tensorrt_llm/deep_gemm/"
LIBRARY = f"flashinfer/data/aot/{MODULE}/{MODULE}.so"
BUILD = """
from flashinfer.jit.gemm import gen_fp8_blockscale_gemm_sm90_module
spec = gen_fp8_blockscale_gemm_sm90_module()
spec.build(verbose=True)
print(spec.jit_library_path)
"""


def main() -> int:
    """Write the wheels and say what they weigh."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--cuda", type=Path, default=Path("/usr/local/cuda"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        download = [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", str(place)]
        subprocess.run([*download, *VERSIONS], check=True)
        wheel = next(place.glob("flashinfer_python-*.whl"))
        other = next(place.glob("apache_tvm_ffi-*.whl"))
        site = [*pip, "install", "--no-deps", "--target", str(place / "site")]
        subprocess.run([*site, str(wheel), str(other), *HERE_ONLY], check=True)
        library = built(place, options.cuda)
        slim(wheel, library, options.out / wheel.name)
        (options.out / other.name).write_bytes(other.read_bytes())
    for file in sorted(options.out.glob("*.whl")):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


def built(place: Path, cuda: Path) -> Path:
    """FlashInfer's own build of the library, for SM90."""
    toolkit = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
    headers, libraries = place / "headers", place / "libraries"
    headers.mkdir()
    libraries.mkdir()
    # CUDA's toolkit may come without cuBLAS, and all of torch's headers would hide the toolkit's.
    for pattern in ("cublas*.h", "cusparse*.h", "cusolver*.h", "curand*.h", "nvrtc.h"):
        for header in (toolkit / "include").glob(pattern):
            (headers / header.name).symlink_to(header)
    (libraries / "libnvrtc.so").symlink_to(next((toolkit / "lib").glob("libnvrtc.so.*")))
    # The driver's library is where a GPU is; the name is all that the linker needs.
    driver = ["-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null"]
    subprocess.run(["cc", *driver, "-o", str(libraries / "libcuda.so")], check=True)
    flags = [f"-L{libraries}", f"-L{cuda / 'lib'}", f"-L{cuda / 'lib64'}"]
    flags += ["-Wl,--no-as-needed", "-lcuda", "-Wl,--as-needed"]
    environ = {
        **os.environ,
        "PYTHONPATH": str(place / "site"),
        "CUDA_HOME": str(cuda),
        "CPATH": str(headers),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "FLASHINFER_WORKSPACE_BASE": str(place),
        "FLASHINFER_EXTRA_LDFLAGS": " ".join(flags),
    }
    command = [sys.executable, "-c", BUILD]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    library = Path(done.stdout.strip().splitlines()[-1])
    subprocess.run(["strip", str(library)], check=True)
    return library


def slim(wheel: Path, library: Path, out: Path) -> None:
    """The wheel again: Python, the headers that it compiles kernels with, the library."""
    records = []
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target,
    ):

        def add(name: str, content: bytes) -> None:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            records.append(f"{name},sha256={digest.decode()},{len(content)}")
            target.writestr(name, content)

        record = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        for name in source.namelist():
            is_kept = name.endswith(".py") or ".dist-info/" in name or name.startswith(KEPT_SOURCES)
            if is_kept and name != record and not name.endswith("/"):
                add(name, source.read(name))
        add(LIBRARY, library.read_bytes())
        target.writestr(record, "\n".join([*records, f"{record},,", ""]))


if __name__ == "__main__":
    sys.exit(main())
