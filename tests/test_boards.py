"""Board profiles: every figure has a source, they agree with each other, and real names find their profile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdss import boards, jetpack
from edge_sdss.errors import InputError
from edge_sdss.tree import Tree

GIB = 1 << 30
FIGURES = {"memory_bytes", "usable_bytes", "memory_bandwidth_bytes_per_s", "cpu", "gpu", "power_modes"}


def tree(folder: Path, files: dict[str, str]) -> Tree:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Tree(folder, faults={})


def device_tree(folder: Path, model: str, compatible: str = "", kib: int | None = None) -> Tree:
    files = {"proc/device-tree/model": model + "\0"} if model else {}
    if compatible:
        entries = [entry if "," in entry else f"nvidia,{entry}" for entry in compatible.split()]
        files["proc/device-tree/compatible"] = "\0".join(entries) + "\0"
    if kib:
        files["proc/meminfo"] = f"MemTotal:       {kib} kB\nMemFree:  1 kB\n"
    return tree(folder, files)


def figures(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a profile, with its path: `power_modes.0.watts`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from figures(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from figures(inner, f"{path}.{index}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


@pytest.mark.parametrize("name", boards.names())
def test_every_figure_names_its_source(name: str) -> None:
    board = boards.load(name)
    stated = board.model_dump(mode="json", include=FIGURES)
    bare = [path for path, _ in figures(stated) if not path.endswith(".id") and board.source_of(path) is None]
    assert bare == []
    assert {entry.document for entry in board.source.values()} <= board.documents.keys()
    assert all(re.match(r"https://\S+$", document.url) for document in board.documents.values())
    held = {path for path, _ in figures(stated)} | {"npu"}
    for field in board.source:  # and no source is of a figure that is not there
        assert any(path == field or path.startswith(f"{field}.") for path in held | {"gpu.compute_capability"}), field


def test_the_boards_that_are_promised_are_there() -> None:
    promised = "orin-nano-4gb orin-nano-8gb orin-nano-super orin-nx-8gb orin-nx-16gb agx-orin-32gb agx-orin-64gb"
    assert {*promised.split(), "thor", "pixel-class", "snapdragon-class", "x86"} <= set(boards.names())
    sizes = {"orin-nano-4gb": 4, "orin-nano-8gb": 8, "orin-nano-super": 8, "orin-nx-8gb": 8, "orin-nx-16gb": 16}
    sizes |= {"agx-orin-32gb": 32, "agx-orin-64gb": 64, "thor": 128}
    assert {name: boards.load(name).memory_bytes for name in sizes} == {n: s * GIB for n, s in sizes.items()}
    assert boards.load("x86").memory_bytes is None


# Per multiprocessor and cycle: 4 tensor cores, each 256 (Orin) or 1024 (Thor) multiply-adds of two operations.
RATE = {"8.7": 4 * 256 * 2, "11.0": 4 * 1024 * 2}
EMC_HZ = {34: (2_133e6, 64), 68: (2_133e6, 128), 102: (3_199e6, 128), 204: (3_200e6, 256), 273: (4_266e6, 256)}


@pytest.mark.parametrize(
    "name", [name for name in boards.names() if boards.load(name).npu is not None or "orin" in name]
)
def test_figures_agree_with_each_other(name: str) -> None:
    board = boards.load(name)
    gpu = board.gpu
    assert gpu is not None
    if gpu.compute_capability:
        assert gpu.cores == 128 * (gpu.multiprocessors or 0)
        peak = RATE[gpu.compute_capability] * (gpu.multiprocessors or 0) * (gpu.max_hz or 0)
        assert gpu.fp16_flops == pytest.approx(peak, rel=0.03)
        clock, bits = EMC_HZ[int((board.memory_bandwidth_bytes_per_s or 0) / 1e9)]
        assert board.memory_bandwidth_bytes_per_s == pytest.approx(clock * 2 * bits / 8, rel=0.01)
    for mode in board.power_modes:
        assert (mode.cores or 1) <= (board.cpu.cores if board.cpu else 0)
        assert mode.super or (mode.gpu_max_hz or 0) <= (gpu.max_hz or 0)
        if watts := re.match(r"(?:MODE_)?(\d+)W", mode.name):
            assert mode.watts == float(watts[1])
    for is_super in (False, True):
        modes = [mode for mode in board.power_modes if mode.super is is_super]
        assert len({mode.id for mode in modes}) == len(modes)
        assert sum(mode.default for mode in modes) == bool(modes)
    if board.usable_bytes:
        assert 0.85 * (board.memory_bytes or 0) < board.usable_bytes < (board.memory_bytes or 0)


def test_thor_agrees_with_itself() -> None:
    gpu = boards.load("thor").gpu
    assert gpu is not None
    assert gpu.fp16_flops == pytest.approx(RATE["11.0"] * 20 * 1.575e9, rel=0.03)


ORIN = "NVIDIA Jetson Orin"
KIT = "Engineering Reference Developer Kit"
AGX = "NVIDIA Jetson AGX Orin Developer Kit"
KNOWN = [
    (f"{ORIN} Nano {KIT} Super", "p3768-0000+p3767-0005-super p3767-0005 tegra234", 7_802_644, "orin-nano-super"),
    (f"{ORIN} Nano {KIT}", "p3768-0000+p3767-0005 p3767-0005 tegra234", 7_802_644, "orin-nano-8gb"),
    (f"{ORIN} Nano Developer Kit", "p3768-0000+p3767-0003 p3767-0003 tegra234", 7_337_000, "orin-nano-8gb"),
    (f"{ORIN} Nano {KIT}", "p3768-0000+p3767-0004 p3767-0004 tegra234", 3_600_000, "orin-nano-4gb"),
    (f"{ORIN} Nano {KIT} Super", "p3768-0000+p3767-0004-super p3767-0004 tegra234", 3_600_000, "orin-nano-4gb"),
    (f"{ORIN} NX {KIT}", "p3768-0000+p3767-0000 p3767-0000 tegra234", 15_900_000, "orin-nx-16gb"),
    (f"{ORIN} NX {KIT} Super", "p3768-0000+p3767-0000-super p3767-0000 tegra234", 15_900_000, "orin-nx-16gb"),
    (f"{ORIN} NX {KIT}", "p3768-0000+p3767-0001 p3767-0001 tegra234", 7_500_000, "orin-nx-8gb"),
    (AGX, "p3737-0000+p3701-0005 p3701-0005 tegra234", 64_300_000, "agx-orin-64gb"),
    (AGX, "p3737-0000+p3701-0000 p3701-0000 tegra234", 31_000_000, "agx-orin-devkit"),
    ("NVIDIA Jetson AGX Orin", "p3737-0000+p3701-0004 p3701-0004 tegra234", 31_000_000, "agx-orin-32gb"),
    ("NVIDIA Jetson AGX Thor Developer Kit", "p4071-0000+p3834-0008 p3834-0008 tegra264", 128_825_804, "thor"),
    ("NVIDIA Jetson Xavier NX Developer Kit", "p3509-0000+p3668-0000 p3668-0000 tegra194", 7_800_000, None),
    ("", "p3768-0000+p3767-0005-super p3767-0005 tegra234", 7_802_644, "orin-nano-super"),
    (AGX, "p3737-0000+p3701-0005 p3701-0005 tegra234", 3_900_000, "agx-orin-64gb"),  # booted with mem=4G
    (AGX, "p3737-0000+p3701-0000-as-p3767-0001 tegra234", 7_500_000, "orin-nx-8gb"),  # flashed to stand for another
    ("Another board", "p3768-0000+p3767-0004 p3767-0004", 60_000_000, None),  # more than the module can have
    # Without `compatible`, the model's name and the memory decide.
    (f"{ORIN} Nano {KIT}", "", 3_600_000, "orin-nano-4gb"),
    (f"{ORIN} Nano {KIT}", "", 7_802_644, "orin-nano-8gb"),
    (f"{ORIN} Nano {KIT} Super", "", 7_802_644, "orin-nano-super"),
    (f"{ORIN} NX {KIT}", "", 7_500_000, "orin-nx-8gb"),
    (f"{ORIN} NX {KIT}", "", 15_900_000, "orin-nx-16gb"),
    (AGX, "", 31_000_000, None),  # two modules have 32 GB
    (f"{ORIN} Nano {KIT}", "", 60_000_000, None),
    ("ZUMA SHIBA based on ZUMA", "google,ZUMA,SHIBA google,ZUMA", 7_700_000, "pixel-class"),
    ("Qualcomm Technologies, Inc. Pineapple MTP", "qcom,pineapple-mtp qcom,pineapple", 11_500_000, "snapdragon-class"),
    ("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b brcm,bcm2712", 8_000_000, None),
]  # fmt: skip


@pytest.mark.parametrize(("model", "compatible", "kib", "name"), KNOWN)
def test_a_board_is_found(tmp_path: Path, model: str, compatible: str, kib: int, name: str | None) -> None:
    found = boards.match(device_tree(tmp_path, model, compatible, kib))
    assert (found.name if found else None) == name


def test_an_x86_machine_is_found_by_its_processor(tmp_path: Path) -> None:
    text = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n"
    found = boards.match(tree(tmp_path, {"proc/cpuinfo": text}))
    assert found is not None
    assert found.name == "x86"
    assert boards.match(Tree(tmp_path / "empty")) is None


def test_unreadable_and_odd_files_find_nothing(tmp_path: Path) -> None:
    files = {"proc/meminfo": "MemTotal:\nMemTotal: lots kB\n", "proc/cpuinfo": "vendor_id\n:\n"}
    odd = tree(tmp_path, files)
    odd.faults["proc/device-tree/model"] = "EIO"
    assert boards.match(odd) is None


def test_a_users_own_file(tmp_path: Path) -> None:
    file = tmp_path / "my-carrier.toml"
    file.write_text('about = "a carrier"\nmemory_bytes = 1_000\n[cpu]\nname = "A78AE"\ncores = 6\n')
    board = boards.load(str(file))
    assert (board.name, board.memory_bytes, board.cpu and board.cpu.cores) == ("my-carrier", 1000, 6)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("about = ", "no valid TOML"),
        ('about = "x"\nmemory = 3', "memory: Extra inputs"),
        ('about = "x"\nmemory_bytes = 0', "memory_bytes: Input should be greater than 0"),
        ('about = "x"\n[source]\ncpu = { document = "d", verified = true }', "'d' is not among the documents"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_is_said(tmp_path: Path, text: str | None, complaint: str) -> None:
    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=re.escape(complaint)):
        boards.load(str(file))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no such board; choose .*orin-nano-8gb.*thor"):
        boards.load("orin-nano")


# The Jetson's image

LINE = "# R{} (release), REVISION: {}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Tue Jan  7 17:14:38 UTC 2025\n"


@pytest.mark.parametrize(
    ("release", "revision", "expected"),
    [
        ("32", "7.1", ("32.7.1", "4.6", "10.2", "8.2", "3.6")),
        ("35", "4.1", ("35.4.1", "5.1.2", "11.4", "8.5", "3.8")),
        ("36", "4.3", ("36.4.3", "6.2", "12.6", "10.3", "3.10")),
        ("36", "5.0", ("36.5.0", "6.2.2", "12.6", "10.3", "3.10")),
        ("38", "2.0", ("38.2.0", "7.0", "13.0", "10.13", "3.12")),
        ("38", "4.0", ("38.4.0", "7.1", "13.0", "10.13", "3.12")),
        ("39", "2.0", ("39.2.0", "7.2", "13.2", "10.16", "3.12")),
        ("39", "2.1", ("39.2.1", "7.2.1", "13.2", "10.16", "3.12")),
    ],
)
def test_an_image_is_told_from_its_release(tmp_path: Path, release: str, revision: str, expected: tuple[str]) -> None:
    found = jetpack.detect(tree(tmp_path, {"etc/nv_tegra_release": LINE.format(release, revision)}))
    assert found is not None
    assert (found.l4t, found.jetpack, found.cuda, found.tensorrt, found.python) == expected
    assert found.known
    assert found.note == ""


def test_an_unknown_image_is_not_refused(tmp_path: Path) -> None:
    found = jetpack.detect(tree(tmp_path, {"etc/nv_tegra_release": LINE.format("40", "1.0")}))
    assert found is not None
    assert (found.l4t, found.jetpack, found.known) == ("40.1.0", None, False)
    assert found.note == "unknown, newest known is L4T 39.2.1 (JetPack 7.2.1)"
    assert "3.12" in found.wheels["onnxruntime-gpu"]


STATUS = """Package: nvidia-jetpack
Status: install ok installed
Version: 6.2.2+b24

Package: nvidia-l4t-core
Status: {}
Architecture: arm64
Version: 36.5.0-20260115194252

Package: libnvinfer10
Status: install ok installed
Version: 10.7.0.23-1+cuda12.6

Package: libnvinfer10-dev
Status: install ok installed
Version: 9.9
"""


def test_what_is_installed_says_more_than_the_table(tmp_path: Path) -> None:
    files = {"var/lib/dpkg/status": STATUS.format("install ok installed")}
    files["usr/local/cuda/version.json"] = '{"cuda" : {"name" : "CUDA SDK", "version" : "12.8.1"}, "nvcc": {}}'
    files |= {"usr/bin/python3.11": "", "usr/bin/python3.10": "", "usr/bin/python3.10-config": ""}
    found = jetpack.detect(tree(tmp_path, files))
    assert found is not None
    assert (found.l4t, found.jetpack, found.cuda) == ("36.5.0", "6.2.2", "12.8")
    assert (found.tensorrt, found.python) == ("10.7.0.23", "3.10")


def test_no_jetson(tmp_path: Path) -> None:
    assert jetpack.detect(Tree(tmp_path)) is None
    assert jetpack.detect(tree(tmp_path, {"var/lib/dpkg/status": STATUS.format("deinstall ok config-files")})) is None
    assert jetpack.detect(tree(tmp_path, {"etc/nv_tegra_release": "garbage\n"})) is None


@pytest.mark.parametrize(
    ("release", "package", "says"),
    [
        ("32", "torch", "none"),
        ("35", "onnxruntime-gpu", "none"),
        ("35", "onnxruntime", "CPU"),
        ("36", "torch", "NVIDIA's Jetson index"),
        ("36", "onnxruntime-gpu", "3.10"),
        ("38", "onnxruntime-gpu", "PyPI's"),
        ("39", "onnxruntime-gpu", "libnvdla_compiler"),
        ("39", "torch", "CUDA 13"),
    ],
)
def test_what_follows_for_wheels(tmp_path: Path, release: str, package: str, says: str) -> None:
    found = jetpack.detect(tree(tmp_path, {"etc/nv_tegra_release": LINE.format(release, "2.0")}))
    assert found is not None
    assert says in found.wheels[package]
    assert not re.search(r"https?:|\.(com|org|io|dev)\b", " ".join(found.wheels.values()))
