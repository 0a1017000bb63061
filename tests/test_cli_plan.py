"""The verb `plan`: from a config alone, without torch; budgets from sizes and boards; one line where it cannot be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_sdss import boards, cli, console, options
from edge_sdss.errors import InputError

CONFIGS = Path(__file__).parent / "fixtures" / "configs"
SMOLLM = str(CONFIGS / "SmolLM2-135M.json")
MIB, GIB = 1 << 20, 1 << 30

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the verb in this process, the runtime given; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(console.out, "_width", 160)

    def run(*arguments: object, runtime: str = "300MiB") -> tuple[int, str, str]:
        given = ["plan", "--model", SMOLLM, "--runtime", runtime, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["edge-sdss", *given])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def document(found: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = found
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("700MiB", 700 * MIB),
        ("1.5GB", 1_500_000_000),
        ("8 GiB", 8 * GIB),
        ("4096", 4096),
        ("10b", 10),
        ("2k", 2000),
        (" 0.5gib ", GIB // 2),
        ("1TiB", 1 << 40),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert options.size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-5MiB", "1e9", "5 apples", "MiB", "nan", "1.2.3GB", "0.1B", "7PiB", "1GiBs"]
)
def test_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no size; write 700MiB"):
        options.size(text)


def test_the_parts_of_the_document_make_its_sums(call: Call) -> None:
    found = document(call("--memory", "1GiB", "--json"))
    assert (found["model"], found["budget_bytes"], found["runtime_bytes"]) == ("SmolLM2-135M", GIB, 300 * MIB)
    for which in ("chosen", "faster", "least"):
        one = found[which]
        moment = one["parts"].pop("moment")
        assert isinstance(moment, str)
        assert sum(one["parts"].values()) == one["tensor_bytes"]
        assert one["process_bytes"] == one["tensor_bytes"] + one["untracked_bytes"] + 300 * MIB
    assert found["least"]["process_bytes"] <= found["chosen"]["process_bytes"] <= GIB < found["faster"]["process_bytes"]
    assert found["speed_up"] > 1
    assert found["limit_bytes"] <= 1.02 * found["chosen"]["tensor_bytes"]


def test_the_table_says_what_the_document_says(call: Call) -> None:
    found = document(call("--memory", "1GiB", "--json"))
    code, out, _ = call("--memory", "1GiB")
    assert code == 0
    for size in (found["chosen"]["parts"]["kept"], found["chosen"]["process_bytes"], found["runtime_bytes"]):
        assert f"{size / MIB:,.1f}" in out
    assert re.search(rf"next faster\s+{found['faster']['process_bytes'] / MIB:,.1f} MiB, about x 1\.\d\d: ", out)
    assert "logits of 128 tokens" in out
    assert "loading" not in out
    assert "next faster  nothing: this is the fastest" in call("--memory", "64GiB")[1]


def test_a_budget_that_is_too_small_is_refused_with_the_least_that_would_do(call: Call) -> None:
    code, out, err = call("--memory", "700MiB")
    assert (code, out) == (2, "")
    least = int(re.search(r"the least that would do is (\d+) MiB", err)[1])  # type: ignore[index]
    assert call("--memory", f"{least}MiB")[0] == 0
    assert call("--memory", f"{least - 1}MiB")[0] == 2
    nf4 = int(re.search(r"nf4, which does with (\d+) MiB", err)[1])  # type: ignore[index]
    assert call("--memory", f"{nf4}MiB", "--weights", "nf4")[0] == 0
    assert call("--memory", f"{nf4 - 1}MiB", "--weights", "auto")[0] == 2
    refused = call("--memory", "700MiB", "--json")
    assert refused[0] == 2
    assert json.loads(refused[1])["error"] == "BudgetExceeded"


def test_loading_that_passes_the_budget_is_told(call: Call) -> None:
    code, out, _ = call("--memory", "700MiB", "--weights", "nf4")
    assert code == 0
    assert re.search(r"loading\s+takes 813\.\d MiB for a moment, more than the budget", out)


def test_a_board_gives_what_it_has_beside_the_reserve(call: Call) -> None:
    usable = boards.load("orin-nano-8gb").usable_bytes
    assert usable is not None
    found = document(call("--board", "orin-nano-8gb", "--json"))
    assert (found["board"], found["budget_bytes"]) == ("orin-nano-8gb", usable - GIB)
    assert (
        document(call("--board", "orin-nano-8gb", "--reserve", "2GB", "--json"))["budget_bytes"] == usable - 2 * 10**9
    )
    assert document(call("--board", "orin-nano-8gb", "--memory", "2GiB", "--json"))["budget_bytes"] == 2 * GIB
    assert document(call("--board", "orin-nano-8gb", "--memory", "8GiB", "--json"))["budget_bytes"] == usable - GIB
    assert "all that orin-nano-8gb has beside a reserve of 1GiB" in call("--board", "orin-nano-8gb")[1]


def test_a_model_too_large_for_a_board_is_refused(call: Call) -> None:
    llama = ("--model", CONFIGS / "Llama-3.1-8B.json", "--memory", "8GiB", "--board", "orin-nano-8gb")
    code, _, err = call(*llama)
    assert code == 2
    assert "set tuning.weights to nf4" in err
    assert document(call(*llama, "--weights", "nf4", "--json"))["chosen"]["weights"] == "nf4"


def test_the_settings_count(call: Call) -> None:
    plain = document(call("--memory", "4GiB", "--json"))
    short = document(call("--memory", "4GiB", "--longest", "64", "--json"))
    assert short["chosen"]["tensor_bytes"] < plain["chosen"]["tensor_bytes"]
    top = document(call("--set", "tuning.memory=4294967296", "--set", "tuning.top_layers=1", "--json"))
    assert top["budget_bytes"] == 4 * GIB
    assert top["chosen"]["parts"]["adapter"] == plain["chosen"]["parts"]["adapter"] / 30
    half = document(call("--memory", "4GiB", "--set", "model.dtype=bfloat16", "--json"))
    assert half["chosen"]["parts"]["weights"] == plain["chosen"]["parts"]["weights"] / 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "no budget; give --memory SIZE or --board NAME"),
        (("--memory", "lots"), "read 'lots': no size"),
        (("--memory", "1GiB", "--weights", "int4"), "'int4' is no type; choose from"),
        (("--board", "toaster"), "no such board"),
        (("--board", "orin-nano-8gb", "--reserve", "9GiB"), "--reserve 9GiB leaves nothing"),
        (("--memory", "1GiB", "--model", "nowhere/model.json"), "nowhere"),
        (("--memory", "1GiB", "--model", CONFIGS / "gemma-2-2b.json"), "caps its logits"),
        (("--memory", "1GiB", "--set", "tuning.dora=true"), "what DoRA takes is not predicted"),
        (("--memory", "1GiB", "--set", "tuning.top_layers=31"), "top_layers is 31; give 1 to 30"),
        (("--memory", "1GiB", "--set", 'tuning.targets=["c_attn"]'), "c_attn to adapt in a llama"),
        (("--memory", "1GiB", "--model", __file__), "no JSON"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call: Call, arguments: tuple[object, ...], complaint: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert complaint in err
    assert len(err.strip().splitlines()) == 1


def test_json_that_is_no_config_is_refused(call: Call, tmp_path: Path) -> None:
    for text, complaint in (("[1]", "it is no object"), ("{}", "no model_type"), ('{"model_type": "bert"}', "'bert'")):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        code, _, err = call("--memory", "1GiB", "--model", tmp_path)
        assert code == 2
        assert complaint in err


def test_a_folder_needs_no_weights(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_bytes(Path(SMOLLM).read_bytes())
    assert document(call("--memory", "2GiB", "--model", folder, "--json"))["model"] == "my-model"


def test_no_torch_is_loaded_for_a_config() -> None:
    program = (
        "import sys\n"
        "from edge_sdss import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'scipy', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    arguments = ["plan", "--model", SMOLLM, "--memory", "2GiB", "--runtime", "300MiB"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
