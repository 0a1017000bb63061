from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Set before anything imports torch or transformers: no test reaches the network, and the processes of xdist
# share the cores instead of each taking all of them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _processes)))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of this test's own, so that no test sees or changes the user's."""
    folder = tmp_path / "home"
    monkeypatch.setenv("EDGE_SDSS_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a Hugging Face folder."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public dialogue data sets, which is not part of the repository."""
    folder = Path(os.environ.get("EDGE_SDSS_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no folder of public data sets; name one in EDGE_SDSS_DATA")
    return folder
