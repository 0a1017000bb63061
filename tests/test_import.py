"""What a bare `import edge_sdss` costs, and that the command line starts where there is no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = (
    "import sys\n"
    "for name in ('torch', 'transformers', 'peft', 'matplotlib', 'scipy', 'gguf'): sys.modules[name] = None\n"
)


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_only_the_package_itself() -> None:
    loaded = python("import json, sys; import edge_sdss; print(json.dumps(sorted(sys.modules)))")
    heavy = {"torch", "transformers", "peft", "numpy", "pydantic", "rich", "typer", "matplotlib"}
    assert not heavy & set(json.loads(loaded))


def test_version_is_that_of_the_installed_package() -> None:
    from importlib.metadata import PackageNotFoundError, version

    import edge_sdss

    try:
        installed = version("edge_sdss")
    except PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert edge_sdss.__version__ == installed


@pytest.mark.skipif(importlib.util.find_spec("edge_sdss.cli") is None, reason="no command line yet")
def test_the_command_line_starts_without_torch() -> None:
    shown = python(BLOCK + "sys.argv = ['edge-sdss', '--help']\nfrom edge_sdss.cli import main\nmain()")
    assert "Usage" in shown


def test_onnx_runtime_gets_no_id_and_sends_nothing(tmp_path: Path) -> None:
    """Its wheels have telemetry, which keeps a device id and a queue in the user's cache once a session was made."""
    pytest.importorskip("onnxruntime")
    helper = pytest.importorskip("onnx").helper
    ends = [helper.make_tensor_value_info(name, 1, [1]) for name in "ab"]
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "g", ends[:1], ends[1:])
    file = tmp_path / "identity.onnx"
    file.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )
    program = (
        "import edge_sdss, onnxruntime, sys\n"
        "onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
    )
    users = tmp_path / "user"
    users.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    env = {**kept, "HOME": str(users), "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    subprocess.run([sys.executable, "-c", program, str(file)], check=True, env=env)
    assert list(users.rglob("*")) == []
