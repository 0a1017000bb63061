"""The commands to flash a board: for each Jetson there is a plan, and what does not go together is refused."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest

from edge_sdss import boards, cli, flashing
from edge_sdss.errors import InputError


def test_every_jetson_has_a_plan_whose_commands_a_shell_can_read() -> None:
    jetsons = {name for name in boards.names() if name.startswith(("orin", "agx", "thor"))}
    assert set(flashing.boards()) == jetsons
    for name in jetsons:
        found = flashing.plan(name, "38.2" if name == "thor" else "36.4.3")
        commands = [step.command for step in found.steps]
        assert all(shlex.split(command) for command in commands)
        flash = next(i for i, command in enumerate(commands) if "flash" in command and command.endswith("internal"))
        overlay = next(i for i, command in enumerate(commands) if "edge-sdss-overlay" in command)
        binaries = next(i for i, command in enumerate(commands) if "apply_binaries" in command)
        assert binaries < overlay < flash, "over NVIDIA's files, before the board is touched"


@pytest.mark.parametrize(
    ("l4t", "jetpack", "python"), [("36.4.3", "6.2", "3.10"), ("36.4.4", "6.2.1", "3.10"), ("39.2", "7.2", "3.12")]
)
def test_the_overlay_is_of_the_images_own_python(l4t: str, jetpack: str, python: str) -> None:
    found = flashing.plan("agx-orin-64gb", l4t)
    assert (found.jetpack, found.python) == (jetpack, python)
    text = "\n".join(step.command for step in found.steps)
    assert f"--python {python} " in text
    assert f"overlay_arm64_py{python}.tar" in text
    assert set(re.findall(r"_R([\d.]+)_aarch64", text)) == {l4t}


def test_an_overlay_that_is_there_is_not_built() -> None:
    commands = [step.command for step in flashing.plan("thor", "38.4", "mine.tar").steps]
    assert not any("build.py" in command for command in commands)
    assert any("../mine.tar" in command for command in commands)
    assert any("apply_binaries.sh --openrm" in command for command in commands), "Thor's driver is the open one"


@pytest.mark.parametrize(
    ("board", "l4t", "words"),
    [
        ("x86", "36.4.3", "no such Jetson; choose agx-orin"),
        ("orin-nano-8gb", "38.2", "L4T 38 is not for this board; choose one of 36.2, 36.3"),
        ("thor", "36.4.3", "L4T 36 is not for this board; choose one of 38.2"),
        ("thor", "38.9", "this release is not known"),
        ("thor", "latest", "'latest' is no L4T"),
    ],
)
def test_what_does_not_go_together_is_refused(board: str, l4t: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        flashing.plan(board, l4t)


def test_the_verb_prints_and_runs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    for extra in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["edge-sdss", "flash-plan", "orin-nano-8gb", "36.4.3", *extra])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr().out
        assert not end.value.code
        if extra:
            told = json.loads(out)
            assert [set(step) for step in told["steps"]] == [{"about", "command"}] * len(told["steps"])
        else:
            assert "sudo tar xpf ../dist/edge-sdss-overlay_arm64_py3.10.tar -C rootfs/" in out
