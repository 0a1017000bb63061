"""export, deploy, bundles, rollback --bundle as a user types them, and the round that writes a probe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import talk
from test_export import adapter

from edge_sdss import bundles, bundling, cli, cli_bundle
from edge_sdss.bundles import probe, recipes
from edge_sdss.bundles.shelf import Shelf
from edge_sdss.bundling import probing
from edge_sdss.lm import CARD
from edge_sdss.runtime import Engine
from edge_sdss.session import Session
from edge_sdss.types import Annotation


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["edge-sdss", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def mine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(tiny, tmp_path_factory.mktemp("adapter") / "mine", std=0.2)


@pytest.fixture(scope="module")
def made(tiny: Path, mine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "bundle"
    settings = talk.settings(tiny).model
    bundling.bundle(settings, recipes.load("onnxruntime-cpu"), out, adapters={"mine": mine})
    return out


def document(found: tuple[Any, str, str]) -> dict[str, Any]:
    code, out, err = found
    assert code == 0, err
    read: dict[str, Any] = json.loads(out)
    return read


def refused(found: tuple[Any, str, str]) -> str:
    code, _, err = found
    assert code == 2
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    return err


def test_calibration_gets_the_answers_that_the_user_wanted(tiny: Path, home: Path) -> None:
    settings = talk.settings(tiny)
    assert cli_bundle._kept(home, settings) == []
    with Session(home, settings) as session:
        list(session.observe_all(talk.dialogues(6)))
        edited, skipped, *silent = session.store.exemplars().values()
        session.annotate(edited.dialogue.id, Annotation("edit", "as I want it"))
        session.annotate(skipped.dialogue.id, Annotation("skip"))
    found = {one.dialogue_id: one.answer for one in cli_bundle._kept(home, settings)}
    assert found == {edited.dialogue.id: "as I want it"} | {e.dialogue.id: e.dialogue.response for e in silent}


def test_from_export_to_rollback(call: Any, tiny: Path, mine: Path, home: Path) -> None:
    made = document(call("export", "--model", tiny, "--adapter", f"mine={mine}", "--out", "bundle", "--json"))
    assert (made["adapters"], made["active"], made["precision"]) == (["mine"], "mine", "int4")
    assert made["size_bytes"] == sum(one.size_bytes for one in bundles.verify(Path("bundle")).entries)
    first = document(call("deploy", "bundle", "--json"))
    assert (first["adapter"], first["previous"], first["is_active"]) == ("mine", None, True)
    other = adapter(tiny, Path("other"), seed=3, std=0.2)
    second = document(call("deploy", other, "--name", "new", "--model", tiny, "--json"))
    assert (second["adapters"], second["adapter"], second["previous"]) == (["mine", "new"], "new", first["version"])
    assert second["own_bytes"] < second["size_bytes"] / 2
    assert {"adapter mine", "adapter new"} <= {check["stage"] for check in second["checks"]}
    assert (other / probe.PROBE).is_file()
    active = Shelf(home).active()
    assert active is not None
    assert Engine.open(active).active == "new"
    kept = document(call("deploy", mine, "--name", "third", "--keep", "--model", tiny, "--json"))
    assert kept["adapter"] == "new"
    back = document(call("rollback", "--bundle", "--json"))
    assert back["version"] == second["version"]
    listed = document(call("bundles", "--json"))
    assert [one["is_active"] for one in listed["versions"]] == [False, True, False]
    assert listed["checks"]
    pruned = document(call("bundles", "--prune", 2, "--json"))
    assert pruned["pruned"] == [kept["version"]]
    assert document(call("bundles", "--activate", first["version"], "--json"))["versions"][0]["is_active"]
    code, out, _ = call("bundles")
    assert code == 0
    assert "serves" in out
    assert "mine (active)" in out


def test_a_person_sees_checks_and_notes(call: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "has_torch", lambda: False)
    code, out, err = call("export", "--model", tiny, "--base-only", "--target", "jetson-orin-jp6", "--out", "b")
    assert code == 0
    assert "mean KL" in out
    assert "Note: jetson-orin-jp6 is not yet run on a device" in err
    assert "Note: not compared with torch" in err
    assert "Note: checked on cpu, not on cuda" in " ".join(err.split())


def test_the_targets_are_listed_with_what_is_not_known(call: Any) -> None:
    listed = document(call("export", "--target", "list", "--json"))
    assert listed.keys() == set(recipes.names())
    assert listed["onnxruntime-cpu"]["status"] == "run here on x86"
    assert listed["tensorrt"]["status"] == "not yet run on a device"
    code, out, _ = call("export", "--target", "list")
    assert code == 0
    assert "onnxruntime-cpu" in out


def test_a_target_that_is_built_on_the_device_gets_its_folder(call: Any, tiny: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    own = Path(recipes.folder() / "tensorrt.toml").read_text(encoding="utf-8")
    own = own.replace("max = 512", "max = 128").replace("opt = 512, max = 1024", "opt = 128, max = 256")
    Path("small.toml").write_text(own, encoding="utf-8")
    document(call("export", "--model", tiny, "--base-only", "--target", "small.toml", "--out", "b", "--json"))
    assert {"model.onnx", "profiles.json", "build_engine.sh"} <= {path.name for path in Path("b/engine").iterdir()}
    bundles.verify(Path("b"))
    board = call("export", "--model", tiny, "--target", "small.toml", "--out", "c", "--board", "nowhere")
    assert "nowhere" in refused(board)


def test_wrong_input_is_one_line(call: Any, made: Path, mine: Path, tiny: Path, tmp_path: Path) -> None:
    assert "no such recipe" in refused(call("export", "--target", "toaster"))
    assert "no NAME=DIR" in refused(call("export", "--adapter", "work"))
    assert "given twice" in refused(call("export", "--adapter", "a=x", "--adapter", "a=y"))
    assert "something is there" in refused(call("export", "--model", tiny, "--base-only", "--out", made))
    assert "no adapter that serves" in refused(call("deploy"))
    assert "neither a manifest.json nor" in refused(call("deploy", tiny))
    assert "there is no such folder" in refused(call("export", "--model", tiny, "--adapter", "a=nowhere", "--out", "b"))
    assert "there is no adapter_config.json" in refused(call("export", "--adapter", f"a={tiny}", "--model", tiny))
    assert "open the bundle nowhere: there is no such folder" in refused(
        call("chat", "--bundle", "nowhere", "--prompt", "Hi")
    )
    assert "no bundle is active" in refused(call("deploy", mine))
    assert "no bundle is active" in refused(call("rollback", "--bundle"))
    assert "the shelf is empty" in refused(call("bundles", "--activate", "0001-00000000"))
    code, _, err = call("bundles")
    assert code == 0
    assert "No bundle is deployed" in err


def test_an_adapter_that_must_not_serve_changes_nothing(
    call: Any, made: Path, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shutil import copytree

    from tiny import tiny_model

    first = document(call("deploy", made, "--json"))["version"]
    stranger = adapter(tiny_model(Path("stranger"), seed=4), Path("theirs"))
    assert "it was trained on the model" in refused(call("deploy", stranger, "--model", tiny))
    (stranger / CARD).unlink()
    assert "pass --trust" in refused(call("deploy", stranger, "--model", tiny))
    broken = copytree(made, Path("broken"))
    data = bytearray((broken / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "model.onnx").write_bytes(bytes(data))
    assert "has other bytes" in refused(call("deploy", broken))
    monkeypatch.setattr(probing, "has_torch", lambda: False)
    monkeypatch.setattr(bundling, "has_torch", lambda: False)
    bare = adapter(tiny, Path("bare"), seed=5)
    assert "without a probe" in refused(call("deploy", bare))
    active = Shelf(home).active()
    assert active is not None
    assert active.name == first
    unprobed = document(call("deploy", bare, "--unprobed", "--json"))
    assert unprobed["adapter"] == "bare"


def test_a_round_notes_what_peft_computes_where_a_bundle_is_deployed(
    call: Any, made: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = talk.settings(tiny)
    for deployed in (False, True):
        home = tmp_path / f"home-{deployed}"
        with Session(home, settings) as session:
            if deployed:
                Shelf(home).deploy(made)
            for dialogue in talk.dialogues(12):
                session.observe(dialogue)
            session.annotate_from_stream()
            adapted = session.adapt()
            session.store.activate(adapted.number)
            folder = session.adapter_folder(adapted.number)
        assert bundling.probed(folder, bundles.load(made).base_fingerprint) == deployed
    monkeypatch.setattr(bundling, "has_torch", lambda: False)
    found = document(call("deploy", "--home", home, "--model", tiny, "--json"))
    assert found["adapter"] == "round-0001"
