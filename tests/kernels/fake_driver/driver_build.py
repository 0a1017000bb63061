"""Builds what executor 3 needs, once: the fake libcuda, and the real PyCUDA against it, into the user's cache.

PyCUDA is published as source only. Its headers come from NVIDIA's wheels, so neither a CUDA toolkit nor nvcc is
needed: gcc, g++ and a package index are. Knows nothing of kernels.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

HERE = Path(__file__).parent
PYCUDA = "pycuda==2026.1"
PURE = ("mako==1.3.10", "markupsafe==3.0.3", "pytools==2025.2.5", "siphash24==1.8", "typing-extensions>=4.12")
HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-profiler-api==13.0.85")


class Unbuildable(Exception):
    """In words, why there is no PyCUDA or no fake driver here."""


def driver() -> Path:
    """Returns the fake libcuda, with a failing stand-in for each function that PyCUDA links to and it has not."""
    extension = next(pycuda().glob("pycuda/_driver*.so"))
    source = (HERE / "libcuda.c").read_text(encoding="utf-8")
    out = _cache() / f"libcuda-{_digest(source, extension.name)}.so"
    with _locked(out):
        if not out.exists():
            wanted = [line.split()[-1] for line in _run("nm", "-D", "--undefined-only", str(extension)).splitlines()]
            missing = [name for name in wanted if name.startswith("cu") and f" {name}(" not in source]
            stand_ins = "".join(
                f'int {n}(void) {{ fprintf(stderr, "{n} is not faked\\n"); return 801; }}\n' for n in missing
            )
            partial = out.with_suffix(".c")
            partial.write_text(source + stand_ins, encoding="utf-8")
            _run("gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", str(out) + ".partial", str(partial))
            os.replace(str(out) + ".partial", out)
    return out


def pycuda() -> Path:
    """Returns a folder to put on sys.path: PyCUDA for this Python, and what it imports."""
    tag = f"{sysconfig.get_config_var('SOABI')}-{_digest(PYCUDA, *PURE, *HEADERS)}"
    out = _cache() / f"pycuda-{tag}"
    with _locked(out):
        if not out.exists():
            work = out.with_suffix(".partial")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            _build(work)
            os.replace(work / "site", out)
            shutil.rmtree(work)
    return out


def _build(work: Path) -> None:
    for tool in ("gcc", "g++", "nm"):
        if shutil.which(tool) is None:
            raise Unbuildable(f"PyCUDA is built from source, and there is no {tool}")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    _run(*pip, "download", "--no-deps", "--only-binary=:all:", "-d", str(work), *HEADERS)
    for wheel in work.glob("nvidia*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "cuda")
    _run(*pip, "download", "--no-deps", "--no-binary=pycuda", "-d", str(work), PYCUDA)
    with tarfile.open(next(work.glob("pycuda*.tar.gz"))) as archive:
        archive.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = next(path for path in work.glob("pycuda-*") if path.is_dir())
    (work / "stubs").mkdir()
    _run("gcc", "-shared", "-o", str(work / "stubs/libcuda.so"), "-x", "c", os.devnull)
    root = next((work / "cuda/nvidia").iterdir())
    settings = {"CUDA_ROOT": str(root), "CUDADRV_LIB_DIR": [str(work / "stubs")], "CUDA_ENABLE_CURAND": False}
    settings["CXXFLAGS"] = ["-O0", "-w"]  # -O0: of what PyCUDA computes itself nothing is slow
    # What `configure.py --cuda-root=... --no-cuda-enable-curand` writes; it looks for nvcc on the PATH besides.
    (source / "siteconf.py").write_text("".join(f"{k} = {v!r}\n" for k, v in settings.items()), encoding="utf-8")
    _run(*pip, "install", "--no-deps", "--target", str(work / "site"), str(source), *PURE)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    except OSError as error:
        raise Unbuildable(f"{command[0]}: {error}") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise Unbuildable(f"{' '.join(command[:5])}: {last[0] if last else done.returncode}")
    return done.stdout


def _cache() -> Path:
    folder = Path(os.environ.get("EDGE_SDSS_TEST_CACHE") or platformdirs.user_cache_dir("edge_sdss-tests"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One builder at a time, among processes too."""
    with open(f"{out}.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
