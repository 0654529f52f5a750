"""Which build of torch fits this machine: prints pip arguments. Run by `make setup` before anything is installed.

Usage: python torch_build.py [cpu|cuda|rocm|URL]. Without an argument it looks for an NVIDIA or AMD driver. Only the
standard library is imported. CUDA builds come from PyPI; CPU and ROCm builds from PyTorch's own index, or PyPI's when
that cannot be reached.
"""

import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

INDEX = "https://download.pytorch.org/whl/"
ROCM = "rocm7.1"
TIMEOUT_S = 5


def detect() -> str:
    """'cuda', 'rocm' or 'cpu', from the drivers present."""
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        return "cuda"
    if shutil.which("rocminfo") or Path("/dev/kfd").exists():
        return "rocm"
    return "cpu"


def reachable(url: str) -> bool:
    """Whether an index answers within a few seconds."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def pip_arguments(choice: str) -> tuple[str, str]:
    """(arguments for pip, one line that says what was chosen and why)."""
    asked = bool(choice)
    build = choice or detect()
    if build == "cuda":
        return "", f"torch: CUDA build from PyPI ({'asked for' if asked else 'NVIDIA driver found'})"
    if build.startswith(("http://", "https://", "file:")):
        return f"--index-url {build}", f"torch: from {build}"
    url = INDEX + (ROCM if build == "rocm" else build) + "/"
    if reachable(url):
        return f"--index-url {url}", f"torch: {build} build ({'asked for' if asked else 'detected'})"
    if asked and build != "cpu":
        sys.exit(f"error: TORCH={choice}: {url} cannot be reached; TORCH is cpu, cuda, rocm or a build such as cu128, "
                 "and TORCH_INDEX=URL another index")  # fmt: skip
    return "", f"torch: {build} build wanted, {url} cannot be reached: PyPI's build, which runs on any machine"


if __name__ == "__main__":
    arguments, remark = pip_arguments(sys.argv[1] if len(sys.argv) > 1 else "")
    sys.stderr.write(remark + "\n")
    sys.stdout.write(arguments + "\n")
