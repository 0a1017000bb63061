"""The machine's state on trees written after NVIDIA's developer guide and kernel documentation; what changes say."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import trees
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdss.profiling import schema, state
from edge_sdss.tree import Tree

POLICY = "sys/devices/system/cpu/cpufreq/policy"
ZONE = "sys/class/thermal/thermal_zone"
COOLING = "sys/class/thermal/cooling_device"

ORIN: dict[str, object] = {
    "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nGPU MAX_FREQ 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >",
    f"{POLICY}0/scaling_governor": "schedutil",
    f"{POLICY}0/scaling_cur_freq": 1510400,
    f"{POLICY}0/scaling_min_freq": 115200,
    f"{POLICY}0/scaling_max_freq": 1510400,
    f"{POLICY}4/scaling_governor": "schedutil",
    f"{POLICY}4/scaling_cur_freq": 729600,
    f"{POLICY}4/scaling_min_freq": 729600,
    f"{POLICY}4/scaling_max_freq": 729600,
    "sys/class/devfreq/17000000.gpu/cur_freq": 306000000,
    "sys/class/devfreq/17000000.gpu/min_freq": 306000000,
    "sys/class/devfreq/17000000.gpu/max_freq": 624750000,
    f"{ZONE}0/type": "cpu-thermal",
    f"{ZONE}0/temp": 51687,
    f"{ZONE}1/type": "cv0-thermal",
    f"{ZONE}1/temp": -256000,
    f"{COOLING}0/type": "pwm-fan",
    f"{COOLING}0/cur_state": 3,
    f"{COOLING}0/max_state": 4,
    f"{COOLING}1/type": "gpu-throttle-alert",
    f"{COOLING}1/cur_state": 1,
    f"{COOLING}1/max_state": 2,
    f"{COOLING}2/type": "cpu-throttle-alert",
    f"{COOLING}2/cur_state": 0,
    "sys/class/hwmon/hwmon0/name": "ina3221",
    "sys/class/hwmon/hwmon0/curr1_crit_alarm": 1,
    "sys/class/hwmon/hwmon0/curr2_crit_alarm": 0,
    "sys/class/hwmon/hwmon2/name": "pwmfan",
    "sys/class/hwmon/hwmon2/pwm1": 102,
    "sys/class/hwmon/hwmon2/pwm1_enable": 1,
    "sys/class/hwmon/hwmon3/name": "soctherm_oc",
    "sys/class/hwmon/hwmon3/oc1_throt_en": 1,
    "sys/class/hwmon/hwmon3/oc1_event_cnt": 0,
    "sys/class/hwmon/hwmon3/oc3_throt_en": 1,
    "sys/class/hwmon/hwmon3/oc3_event_cnt": 37,
    "proc/meminfo": "MemTotal:        7802228 kB\nMemAvailable:    5242880 kB",
    "proc/loadavg": "0.52 0.58 0.59 1/597 12345",
}
X86: dict[str, object] = {
    "sys/firmware/acpi/platform_profile": "balanced",
    f"{POLICY}0/scaling_governor": "powersave",
    f"{POLICY}0/energy_performance_preference": "balance_performance",
    f"{POLICY}1/scaling_governor": "powersave",
    f"{POLICY}1/energy_performance_preference": "balance_performance",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": 5,
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": 2,
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": 9,
    "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": 9,
    f"{COOLING}0/type": "Processor",
    f"{COOLING}0/cur_state": 2,
    f"{COOLING}0/max_state": 10,
}


plant = partial(trees.plant, faults={})  # as a recording, no command is run


def test_an_orin(tmp_path: Path) -> None:
    assert state.capture(plant(tmp_path, ORIN)) == schema.State(
        power_mode="MAXN_SUPER",
        governors={"policy0": "schedutil", "policy4": "schedutil"},
        clocks_hz={
            "policy0": 1510.4e6,
            "policy0 min": 115.2e6,
            "policy0 max": 1510.4e6,
            "policy4": 729.6e6,
            "policy4 min": 729.6e6,
            "policy4 max": 729.6e6,
            "17000000.gpu": 306e6,
            "17000000.gpu min": 306e6,
            "17000000.gpu max": 624.75e6,
        },
        clocks_locked=False,
        fan={"pwmfan pwm1": 0.4},
        temperatures_c={"cpu-thermal": 51.687},
        throttled=(
            "gpu-throttle-alert is on",
            "ina3221 curr1_crit_alarm is on",
        ),
        throttle_counts={"supply alarm oc3": 37},
        available_bytes=5 << 30,
        load_1min=0.52,
    )


def test_clocks_are_locked_where_every_policy_has_one(tmp_path: Path) -> None:
    assert state.capture(plant(tmp_path, ORIN | {f"{POLICY}0/scaling_min_freq": 1510400})).clocks_locked is True
    (tmp_path / f"{POLICY}4/scaling_max_freq").unlink()
    assert state.capture(Tree(tmp_path, faults={})).clocks_locked is None


def test_x86(tmp_path: Path) -> None:
    found = state.capture(plant(tmp_path, X86))
    assert found.power_mode == "balanced, EPP balance_performance"
    assert found.throttled == ("Processor is capped, step 2 of 10",)
    assert found.throttle_counts == {"thermal throttling of a core": 7, "thermal throttling of a package": 9}
    assert found.clocks_locked is None


def test_nothing_at_all(tmp_path: Path) -> None:
    assert state.capture(Tree(tmp_path, faults={})) == schema.State()


def test_the_fan_before_jetpack_5(tmp_path: Path) -> None:
    assert state.capture(plant(tmp_path, {"sys/devices/pwm-fan/cur_pwm": 255})).fan == {"pwm-fan": 1.0}


@pytest.mark.parametrize(
    ("status", "table", "mode"),
    [
        ("pmode:0000", "< POWER_MODEL ID=0 NAME=MAXN >", "MAXN"),
        ("pmode:0010", "< POWER_MODEL ID=1 NAME=10W >\n<POWER_MODEL ID=10 NAME=15W_DESKTOP>", "15W_DESKTOP"),
        ("pmode:0003", "< POWER_MODEL ID=0 NAME=MAXN >", "mode 3"),
        ("", "", None),
    ],
)
def test_the_power_mode_has_the_name_of_the_boards_table(
    tmp_path: Path, status: str, table: str, mode: str | None
) -> None:
    tree = plant(tmp_path, {"var/lib/nvpmodel/status": status, "etc/nvpmodel.conf": table})
    assert state.capture(tree).power_mode == mode


@pytest.mark.parametrize(
    ("script", "mode"),
    [
        ("#!/bin/sh\n[ $# = 1 ] && [ $1 = -q ] && printf 'NV Fan Mode:quiet\\nNV Power Mode: 25W\\n1\\n'", "25W"),
        ("#!/bin/sh\nexit 1", None),
        ("no program", None),
    ],
)
def test_nvpmodel_is_asked_where_it_left_no_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, mode: str | None
) -> None:
    program = tmp_path / "bin" / "nvpmodel"
    program.parent.mkdir()
    program.write_text(script, encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / "root").mkdir()
    assert state.capture(Tree(tmp_path / "root")).power_mode == mode


def test_faults_of_every_file_leave_the_rest(tmp_path: Path) -> None:
    tree = plant(tmp_path, ORIN)
    tree.faults |= {f"{ZONE}0/temp": "EIO", "var/lib/nvpmodel/status": "EACCES", f"{POLICY}0/scaling_governor": "EIO"}
    found = state.capture(tree)
    assert (found.power_mode, found.temperatures_c, found.governors) == (None, {}, {"policy4": "schedutil"})
    assert found.fan == {"pwmfan pwm1": 0.4}


def test_a_file_that_would_block_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of Orin's cv zones answers EAGAIN, which Python's text layer turns into a TypeError."""
    real = Tree.text

    def text(self: Tree, path: str) -> str:
        if path == f"{ZONE}0/temp":
            raise TypeError("can't concat NoneType to bytes")
        return real(self, path)

    monkeypatch.setattr(Tree, "text", text)
    assert state.capture(plant(tmp_path, ORIN)).temperatures_c == {}


content = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(["", "nan", "inf", "1e999", "-1", "pmode:9999", "< POWER_MODEL ID=2 NAME= >", "MemAvailable: kB"]),
    st.text(max_size=30),
)
fault = st.sampled_from(["EIO", "EACCES", "EAGAIN", "ENODEV", "no errno"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(sorted({**ORIN, **X86})), content),
    st.dictionaries(st.sampled_from(sorted(ORIN)), fault),
)
def test_whatever_the_tree_holds_the_state_is_finite(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str], faults: dict[str, str]
) -> None:
    tree = plant(tmp_path_factory.mktemp("tree"), {**ORIN, **files})
    tree.faults |= faults
    found = state.capture(tree)
    numbers = [*found.clocks_hz.values(), *found.temperatures_c.values(), *found.fan.values(), found.load_1min or 0]
    assert all(math.isfinite(number) for number in numbers)
    assert all(0 <= duty <= 1 for duty in found.fan.values())
    assert schema.State.model_validate_json(found.model_dump_json()) == found
    assert state.changes(found, found) == []


def test_this_machine_has_a_state() -> None:
    found = state.capture(Tree())
    if Path("/proc/meminfo").exists():
        assert found.available_bytes is not None
        assert found.available_bytes > 1 << 20


def test_changes_names_what_may_have_moved_the_figures(tmp_path: Path) -> None:
    before = state.capture(plant(tmp_path, ORIN))
    after = state.capture(
        plant(
            tmp_path,
            {
                "var/lib/nvpmodel/status": "pmode:0000",
                f"{POLICY}0/scaling_governor": "performance",
                f"{ZONE}0/temp": 67688,  # 16.001 °C more
                "sys/class/hwmon/hwmon3/oc1_event_cnt": 2,
                "sys/class/hwmon/hwmon3/oc3_event_cnt": 40,
                f"{COOLING}2/cur_state": 1,
                f"{POLICY}4/scaling_cur_freq": 422400,
                "sys/class/devfreq/17000000.gpu/max_freq": 408000000,
                f"{POLICY}0/scaling_cur_freq": 115200,  # follows the load: no change
            },
        )
    )
    assert state.changes(before, after) == [
        "the power mode went from MAXN_SUPER to 15W",
        "the governor of policy0 went from schedutil to performance",
        "supply alarm oc1: 2 more while measuring",
        "supply alarm oc3: 3 more while measuring",
        "cpu-throttle-alert is on, and was not before",
        "cpu-thermal rose from 52 to 68 °C",
        "the clock policy4 fell from 730 to 422 MHz",
        "the clock 17000000.gpu max fell from 625 to 408 MHz",
    ]


def test_a_small_or_unknown_change_is_none() -> None:
    before = schema.State(
        power_mode="15W", temperatures_c={"cpu": 40.0}, clocks_hz={"gpu max": 1e9}, governors={"p": "a"}
    )
    after = schema.State(temperatures_c={"cpu": 55.0}, clocks_hz={"gpu max": 0.985e9})
    assert state.changes(before, after) == []
    assert state.changes(after, before) == []
