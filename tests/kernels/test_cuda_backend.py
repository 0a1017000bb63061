"""The CUDA backend where there is no GPU: what it says, and its host code by the real PyCUDA over a fake driver."""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")  # PyCUDA is built for one Python only, that of the whole suite

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE / "fake_driver"))
import driver_build

from edge_sdss import backends
from edge_sdss.errors import BackendUnavailable


@pytest.fixture(scope="module")
def built():
    """PyCUDA and the fake driver, from the cache or built now."""
    try:
        return driver_build.pycuda(), driver_build.driver()
    except driver_build.Unbuildable as error:
        pytest.skip(str(error))


def child(*arguments, path=(), **variables):
    folders = [str(ROOT), *map(str, path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


def over_fake_driver(*arguments):
    folders = HERE, HERE / "fake_driver"
    return child("-m", "pytest", "-q", "-p", "device", "-p", "no:cacheprovider", "-rs", *arguments, path=folders)


def passed(done):
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_the_contract_holds_over_the_real_pycuda(built):
    done = over_fake_driver("tests/contracts/test_backends.py", "-k", "cuda")
    assert passed(done) >= 30
    assert "skipped" not in done.stdout


def test_the_host_code_over_the_fake_driver(built):
    assert passed(over_fake_driver("tests/kernels/over_fake_driver.py")) >= 40


def test_without_a_driver_the_way_out_is_told(built):
    found = child("-c", "from edge_sdss import backends; backends.load('cuda')", path=[built[0]])
    assert "use backend 'cuda': there is no NVIDIA driver (libcuda) here" in found.stderr
    assert "choose --backend auto, torch or numpy." in found.stderr


def test_observe_with_the_cuda_backend_scores_as_with_numpy(built, tmp_path):
    from tiny import tiny_model

    from edge_sdss import config
    from edge_sdss.store import Store

    (tmp_path / "tiny").mkdir()
    model, stream = tiny_model(tmp_path / "tiny"), tmp_path / "stream.jsonl"
    turns = [("user", "my knee hurts when I run uphill"), ("assistant", "rest it for a week, then walk first")]
    said = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
    stream.write_text(said + "\n", encoding="utf-8")
    code = "import device; from edge_sdss.cli import main; main()"
    scores = {}
    for backend in ("numpy", "cuda"):
        home = tmp_path / backend
        arguments = "observe", str(stream), "--backend", backend, "--model", str(model), "--home", str(home)
        done = child("-c", code, *arguments, path=(HERE, HERE / "fake_driver"), EDGE_SDSS_FAKE="12060,8,7,8000000000")
        assert done.returncode == 0, done.stderr[-3000:]
        with contextlib.closing(Store(home / "edge_sdss.db", config.Store())) as store:
            (kept,) = store.exemplars().values()
            scores[backend] = kept.eoe
    assert 0 < scores["cuda"] < 1
    assert scores["cuda"] == pytest.approx(scores["numpy"], abs=1e-6)
    refused = child("-m", "edge_sdss", *arguments, path=[built[0]])
    assert refused.returncode == 2
    assert refused.stderr.startswith("edge-sdss: use backend 'cuda': there is no NVIDIA driver")


@pytest.mark.skipif(importlib.util.find_spec("pycuda") is not None, reason="PyCUDA is installed here")
def test_without_pycuda_the_way_out_is_told():
    with pytest.raises(BackendUnavailable, match=r"pycuda is not installed; pip install 'edge_sdss\[cuda\]'"):
        backends.load("cuda")


def test_the_selftest_writes_a_file_that_can_be_sent_in(built, tmp_path):
    code = "import device; from edge_sdss.cli import main; main()"
    out = tmp_path / "result.json"
    arguments = "-c", code, "doctor", "--selftest", "--out", str(out)
    folders = HERE, HERE / "fake_driver"
    done = child(*arguments, path=folders, EDGE_SDSS_FAKE="12060,8,7,8000000000")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "INTERPRETED on a CPU" in done.stderr
    text = out.read_text()
    result = json.loads(text)
    assert result["device"]["interpreted"] is True
    assert result["benchmark"] == []
    assert result["device"]["images"]["energy.cu"] == "images/jetpack6/energy.cubin"
    assert {row["kernel"] for row in result["parity"]} == {
        "entropy token", "entropy centered", "pool mean", "pool last", "row_entropy", "dissimilarity", "pairwise"
    }  # fmt: skip
    assert all(row["passed"] for row in result["parity"])
    for secret in (socket.gethostname(), str(Path.home()), getpass.getuser(), str(ROOT), str(tmp_path)):
        assert not re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", text)
    again = child(*arguments, path=folders)
    assert again.returncode == 2
    assert "it is there already" in again.stderr


def test_the_selftest_without_a_driver_is_exit_2(built, tmp_path):
    code = "from edge_sdss.cli import main; main()"
    out = tmp_path / "result.json"
    done = child("-c", code, "doctor", "--selftest", "--out", str(out), path=[built[0]])
    assert done.returncode == 2
    assert "there is no NVIDIA driver (libcuda) here" in done.stderr
    assert not out.exists()


def test_auto_falls_back_with_one_line(monkeypatch, caplog):
    from edge_sdss.backends import cuda

    def no_driver():
        raise BackendUnavailable("use backend 'cuda': no driver; do something.")

    monkeypatch.setattr(cuda, "ready", no_driver)
    with caplog.at_level(logging.WARNING):
        assert backends.load("auto", "cuda").__name__.endswith("torch")
        assert backends.load("auto", "cpu").__name__.endswith("numpy")
    assert [r.getMessage() for r in caplog.records] == [
        "auto takes the torch backend: use backend 'cuda': no driver; do something."
    ]
    monkeypatch.setattr(cuda, "ready", lambda: None)
    assert backends.load("auto", "cuda:0").__name__.endswith("cuda")
