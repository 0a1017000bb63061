"""Every verb as a user types it: what it prints, its exit code, and one line for each wrong input."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import document

pytest.importorskip("torch")
pytest.importorskip("peft")

import talk
import typer

from edge_sdss import cli
from edge_sdss.lm import LanguageModel
from edge_sdss.report import RunReport

VERBS = sorted(
    (command.name or command.callback.__name__, command.callback.__doc__) for command in cli.app.registered_commands
)


@pytest.fixture(scope="module")
def lm(tiny):
    return LanguageModel.load(talk.settings(tiny).model)


@pytest.fixture
def call(monkeypatch, capsys, lm, tiny, tmp_path):
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(LanguageModel, "load", classmethod(lambda *a, **k: lm))
    monkeypatch.chdir(tmp_path)
    settings = talk.settings(tiny)
    lines = []
    for section, values in settings.model_dump(exclude_defaults=True, mode="json").items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    Path("tiny.toml").write_text("\n".join(lines), encoding="utf-8")

    def run(*arguments, config=True):
        verb, *rest = map(str, arguments)
        given = [verb, *rest, *(["--config", "tiny.toml"] if config else [])]
        monkeypatch.setattr(sys, "argv", ["edge-sdss", *given])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.mark.parametrize(("verb", "doc"), VERBS, ids=[name for name, _ in VERBS])
def test_every_verb_has_help_with_an_example_json_and_a_place_in_the_readme(verb, doc):
    command = typer.main.get_command(cli.app).commands[verb]
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in options
    assert re.search(rf"Examples?: edge-sdss {verb}", " ".join((doc or "").split()))
    readme = (Path(cli.__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"`{verb}`" in readme
    assert all(parameter.help for parameter in command.params if parameter.name != "help")


def test_a_users_days(call, tmp_path):
    """observe, status, review, synth, tune, eval, forget, rollback: each with --json."""
    stream = talk.write(tmp_path / "talk.jsonl", 30)
    seen = document(call("observe", stream, "--json"))
    assert (seen["offers"], seen["read"], seen["rejected"], seen["in_buffer"]) == (30, 30, 0, 8)
    assert len(seen["decisions"]) == seen["kept"]
    assert document(call("observe", stream, "--json"))["offers"] == 0
    one = document(call("observe", "--prompt", "my cat eats soup", "--response", "good", "--json"))
    assert one["action"] in ("kept", "dropped")
    status = document(call("status", "--json"))
    assert (status["offers"], status["in_buffer"], status["active_round"]) == (31, 8, None)
    assert all(e["reason"] for e in status["buffer"])
    pending = document(call("review", "--json"))["pending"]
    assert pending
    document(call("review", pending[0]["id"], "--edit", "wanted", "--json"))
    document(call("review", pending[1]["id"], "--accept", "--json"))
    assert document(call("review", "--from-stream", "--json"))["answered"] == 6
    made = document(call("synth", "--json"))
    assert made["made"] == made["kept"] + made["dropped"] == len(made["variants"]) > 0
    tuned = document(call("tune", "--json"))
    assert tuned["gate"]["accepted"]
    assert tuned["steps"] == len(tuned["losses"]) > 0
    compared = document(call("eval", talk.write(tmp_path / "held.jsonl", 9, seed=5), "--json"))
    assert compared["n"] == 9
    assert compared["adapter"].endswith("round-0001")
    assert compared["delta_nll"]["lo"] <= compared["delta_nll"]["mean"] <= compared["delta_nll"]["hi"]
    assert compared["after"]["nll"] - compared["before"]["nll"] == pytest.approx(compared["delta_nll"]["mean"])
    trained = [e["id"] for e in status["buffer"]]
    stale = [document(call("forget", key, "--json"))["stale_rounds"] for key in trained[:3]]
    assert [1] in stale
    assert document(call("rollback", "--json", config=False))["active_round"] is None


def test_run_writes_its_outputs_and_goes_on_after_an_interruption(call, tmp_path, monkeypatch):
    stream = talk.write(tmp_path / "talk.jsonl", 60)
    arguments = ("run", "--stream", stream, "--out", "out", "--interval", "20", "--json")
    from edge_sdss import evaluation

    with monkeypatch.context() as broken:
        broken.setattr(evaluation, "evaluate", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(*arguments)
    assert not Path("out/report.json").exists()
    report = RunReport.model_validate(document(call(*arguments)))
    assert (
        report.buffer.offers == report.stream.dialogues - report.stream.heldout - report.stream.near_duplicates_removed
    )
    assert report.tuning.steps > 0
    assert report.eval.n == len(report.eval.items) > 0
    assert report.gate.accepted
    files = {path.name for path in Path("out").iterdir()}
    assert files >= {"report.json", "report.html", "adapter", "home"}
    assert (Path("out/adapter/adapter_model.safetensors")).stat().st_size > 0
    code, _, err = call(*arguments)
    assert (code, "--overwrite" in err) == (2, True)
    again = RunReport.model_validate(document(call(*arguments, "--overwrite")))
    assert again.buffer == report.buffer
    assert again.eval == report.eval


def test_bad_records_are_counted_named_and_kept_aside(call, tmp_path):
    stream = talk.write(tmp_path / "talk.jsonl", 20)
    lines = stream.read_text().splitlines()
    stream.write_text("\n".join([*lines[:4], "{broken", *lines[4:], '{"prompt": "no answer", "response": ""}']) + "\n")
    code, out, err = call("observe", stream, "--json")
    found = json.loads(out)
    assert (code, found["read"], found["offers"], found["rejected"]) == (0, 20, 20, 2)
    assert "talk.jsonl, line 5: " in err
    for _ in range(2):  # a second call does not list them twice
        kept = [json.loads(line) for line in Path(tmp_path / "home/rejects/talk.jsonl.jsonl").read_text().splitlines()]
        assert [(r["line"], r["record"]) for r in kept] == [
            (5, "{broken"),
            (22, '{"prompt": "no answer", "response": ""}'),
        ]
        call("observe", stream, "--json")
    report = document(call("run", "--stream", stream, "--out", "deep/out", "--json"))
    assert report["stream"]["rejected"] == 2
    assert Path("deep/out/rejects.jsonl").read_text().count("\n") == 2


def test_a_dialogue_that_the_model_cannot_embed_does_not_stop_the_stream(call, tmp_path, lm, monkeypatch):
    real = LanguageModel.token_embeddings

    def embed(self, text, max_tokens):
        return real(self, "" if "hello 3" in text else text, max_tokens)

    monkeypatch.setattr(LanguageModel, "token_embeddings", embed)
    code, out, err = call("observe", talk.write(tmp_path / "talk.jsonl", 9), "--json")
    found = json.loads(out)
    assert (code, found["read"], found["offers"], found["unusable"]) == (0, 9, 8, 1)
    assert "talk.jsonl:4" in err


def test_a_person_reads_tables_not_json(call, tmp_path):
    code, out, _ = call("observe", talk.write(tmp_path / "talk.jsonl", 12))
    assert code == 0
    assert "offers" in out
    assert "{" not in out
    code, out, _ = call("status")
    assert code == 0
    assert "there was room" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["observe", "nowhere.jsonl"], "nowhere.jsonl"),
        (["observe"], "give a FILE"),
        (["observe", "--prompt", "  "], "empty"),
        (["observe", "--prompt", "a\x00b"], "NUL"),
        (["observe", "--prompt", "a\udcffb"], "surrogate"),
        (["observe", "tiny.toml", "--policy", "psychic"], "tiny.toml"),
        (["observe", "--prompt", "x", "--policy", "psychic"], "choose one of"),
        (["observe", "--prompt", "x", "--backend", "abacus"], "backend"),
        (["observe", "--prompt", "x", "--set", "tuning.rank"], "no SECTION.NAME=VALUE"),
        (["observe", "--prompt", "x", "--set", "tuning.rank=-1"], "tuning.rank"),
        (["observe", "--prompt", "x", "--set", "tuning.rnak=1"], "tuning.rnak"),
        (["observe", "--prompt", "x", "--bins", "0"], "buffer.bins"),
        (["run", "--stream", "nowhere.json"], "nowhere.json"),
        (["run", "--bins", "abc", "--stream", "x"], "--bins"),
        (["run"], "--stream"),
        (["tune"], "review some dialogues first"),
        (["rollback"], "base model is active"),
        (["forget", "0000000000000000"], "no dialogue has this id"),
        (["review", "0000000000000000", "--accept"], "not in the buffer"),
        (["review", "0000000000000000"], "give --accept"),
        (["eval", "nowhere.jsonl"], "nowhere.jsonl"),
        (["tune", "--config", "nowhere.toml"], "nowhere.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_input_is_one_line_and_exit_code_two(call, arguments, words):
    code, out, err = call(*arguments, config="--config" not in arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""
    code, out, err = call(*arguments, "--json", config="--config" not in arguments)
    assert code == 2
    assert set(json.loads(out)) == {"error", "message"}


def test_review_without_a_terminal_says_how_to_answer(call, tmp_path):
    call("observe", talk.write(tmp_path / "talk.jsonl", 6))
    code, _, err = call("review")
    assert (code, "review ID --accept" in err) == (2, True)


def test_review_at_a_terminal(call, tmp_path, home):
    """Questions on a real terminal: nothing wipes them, a wrong key is asked again, every answer is stored."""
    import pty

    call("observe", talk.write(tmp_path / "talk.jsonl", 12))
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.pop("EDITOR", None)
        os.environ.pop("VISUAL", None)
        os.environ["PYTHONPATH"] = str(Path(cli.__file__).parent.parent)
        os.execv(sys.executable, [sys.executable, "-m", "edge_sdss", "review", "--home", str(home)])
    for key in ("x", "a", "e", "in metric", "s", "f", "q"):
        os.write(terminal, f"{key}\n".encode())
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal's output so
        while chunk := os.read(terminal, 4096):
            shown += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"1 of 8" in shown
    assert b"\x1b[2K" not in shown
    status = document(call("status", "--json"))
    assert [e["annotation"] for e in sorted(status["buffer"], key=lambda e: e["seq"])][:3] == ["accept", "edit", "skip"]
    assert status["in_buffer"] == 7


def test_the_installed_program_starts_without_torch():
    heavy = ["torch", "transformers", "scipy", "matplotlib"]
    code = f"import sys; from edge_sdss import cli; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
