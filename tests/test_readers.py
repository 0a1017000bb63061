"""The formats, what is rejected and why, and every file of the shared data where it is at hand."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdss import config, readers
from edge_sdss.errors import InputError
from edge_sdss.types import Dialogue, Turn

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures" / "readers"
DATA = Path(os.environ.get("EDGE_SDSS_DATA", HERE.parents[1] / "shared" / "data"))
GOOD = '{"input": "a", "response": "b"}'


def _all(name: str, **options: int) -> tuple[readers.Reading, list[Dialogue]]:
    reading = readers.read(FIXTURES / name, settings=config.Reading(**options))
    return reading, list(reading)


def _counts(reading: readers.Reading) -> tuple[str, int, int, int]:
    return reading.format, reading.accepted, reading.rejected, reading.skipped


def _write(tmp_path: Path, content: str | bytes, name: str = "in.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_formats_are_the_files():
    files = {path.stem for path in (HERE.parent / "edge_sdss" / "readers" / "formats").glob("[a-z]*.py")}
    assert set(readers.FORMATS) == files
    assert "messages" in readers.FORMATS


def test_messages():
    reading, (first, second, third) = _all("messages.jsonl")
    assert _counts(reading) == ("messages", 3, 0, 0)
    system, user, assistant = (
        Turn("system", "Be kind."),
        Turn("user", "Which door?"),
        Turn("assistant", "The red one."),
    )
    time, source = "2024-05-01T08:00:00Z", "messages.jsonl:1"
    assert first == Dialogue("Which door?", "The red one.", (system,), None, "c1", time, source)
    wanted = "Try the blue one."
    context = (system, user, assistant)
    assert second == Dialogue("Really?", "Yes, the red one.", context, wanted, "c1", time, source)
    assert (third.prompt, third.response) == ("Hi\nHow warm is it?", "21 degrees.")
    assert third.context == (Turn("assistant", "Hello!"),)
    assert third.conversation == third.source == "messages.jsonl:3"


@pytest.mark.parametrize("context_turns", [0, 1, 2, 3, 4, 50])
def test_context_is_the_last_turns(tmp_path, context_turns):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"t{i}"} for i in range(20)]
    path = _write(tmp_path, json.dumps({"messages": turns}))
    found = list(readers.read(path, settings=config.Reading(context_turns=context_turns)))
    assert len(found) == 10
    for number, dialogue in enumerate(found):
        start = max(0, 2 * number - context_turns)
        assert [turn.text for turn in dialogue.context] == [f"t{i}" for i in range(start, 2 * number)]


def test_alpaca():
    reading, (first, second) = _all("alpaca.json")
    assert (*_counts(reading), reading.unit) == ("alpaca", 2, 0, 0, "record")
    assert first == Dialogue("Name a bird.", 'A wren, in braces: } ] { [ " , \\', source="alpaca.json:1")
    assert second == Dialogue("Translate.\n\nVogel", "bird", source="alpaca.json:2")


def test_sharegpt():
    reading, (first, second) = _all("sharegpt.json")
    assert _counts(reading) == ("sharegpt", 2, 0, 0)
    assert (first.prompt, first.response, first.context) == ("One?", "Two.", ())
    assert second.context == (Turn("user", "One?"), Turn("assistant", "Two."))
    assert first.conversation == second.conversation == "s9"


def test_pairs():
    reading, (first, second, third) = _all("pairs.jsonl")
    assert _counts(reading) == ("pairs", 3, 0, 0)
    before = (Turn("user", "What?"), Turn("assistant", "That."))
    assert first == Dialogue("Why?", "Because.", before, "No reason.", "7", "1714550400", "pairs.jsonl:1")
    assert second.context == (Turn("system", "You are in a wood."),)
    assert third.context == (Turn("user", "Knock"), Turn("assistant", "Yes?"))


def test_csv_turns():
    reading, (first, second) = _all("turns.csv")
    assert _counts(reading) == ("csv", 2, 0, 5)
    assert first.prompt == "My head hurts, badly"
    assert first.response == "Since when?\nAnd where\nexactly?"
    assert (first.conversation, first.time, first.source) == ("a", "09:02", "turns.csv:4")
    assert (second.prompt, second.response) == ("Monday", "Rest.")
    assert second.context == (Turn("user", first.prompt), Turn("assistant", first.response))


def test_tsv_pairs():
    reading, (first, second) = _all("pairs.tsv")
    assert _counts(reading) == ("csv", 2, 0, 0)
    assert (first.prompt, first.response, second.prompt) == ('say "hi"', "hi", "two\twords")


def test_csv_visits():
    reading, (first, second) = _all("visits.csv")
    assert _counts(reading) == ("csv", 2, 1, 0)
    assert first.context == (Turn("assistant", "What brings you here?"),)
    assert first.prompt == "A cough.\nIt is dry.\nAll night long."
    assert first.response == "Any fever?"
    assert (second.prompt, second.response) == ("Are you well?", "I am.")
    assert [(reject.line, reject.reason[:12]) for reject in reading.rejects] == [(10, "no user turn")]


@pytest.mark.parametrize(
    ("names", "marks"),
    [
        ("Doctor Patient", "au"),
        ("HUMAN GPT", "ua"),
        ("Ann Bob Ann", "uau"),
        ("Ann Patient Ann", "aua"),
        ("Doctor Ann Doctor_2 Guest_family_1", "auau"),
        ("Speaker_2 Speaker_1", "au"),
        ("Person_1 Person_2", "ua"),
        ("Supporter Seeker tool", "au"),
    ],
)
def test_speakers(tmp_path, names, marks):
    """Roles are seen through what is paired: every user's run that an assistant's run follows."""
    lines = [f"{name}: t{number}" for number, name in enumerate(names.split())]
    text = "dialogue,x\n" + '"' + "\n".join(lines) + '",1\n'
    tail = '"user: u\nassistant: a",2\n'
    found = list(readers.read(_write(tmp_path, text + tail)))
    pairs = [match.start() for match in re.finditer("ua", marks)]
    assert [d.prompt for d in found[:-1]] == [f"t{at}" for at in pairs]
    assert [d.response for d in found[:-1]] == [f"t{at + 1}" for at in pairs]


def test_days():
    reading, found = _all("days.json")
    assert (*_counts(reading), reading.unit) == ("days", 4, 1, 0, "record")
    assert [dialogue.prompt for dialogue in found] == ["Hi", "A book?", "Hi again", "Swim?"]
    assert [dialogue.conversation for dialogue in found[:3]] == ["Ana 2023-04-27"] * 2 + ["Ana 2023-04-28"]
    assert found[1].context == (Turn("user", "Hi"), Turn("assistant", "Hello"))
    assert found[2].context == ()
    assert found[3].time == "2023-04-27"
    assert (reading.rejects[0].line, reading.rejects[0].reason) == (2, "empty response")


def test_instances():
    reading, found = _all("instances.jsonl")
    assert _counts(reading) == ("instances", 2, 1, 0)
    assert [(dialogue.prompt, dialogue.response) for dialogue in found] == [
        ("Add.\n\n1 2", "3"),
        ("Add.", "0"),
    ]
    assert {dialogue.conversation for dialogue in found} == {"seed_1"}


def test_eos_turns():
    reading, (first, second, third) = _all("eos_turns.tsv")
    assert _counts(reading) == ("eos_turns", 3, 1, 3)
    assert (first.prompt, first.response, first.source) == ("hello", "Hi\nHow are you?", "eos_turns.tsv:2")
    assert second.prompt == "Sad. My EOS camera broke\ntoday"
    assert second.response == "Why [so]?"
    assert second.context == (Turn("user", "hello"), Turn("assistant", "Hi\nHow are you?"))
    assert first.conversation == second.conversation != third.conversation
    assert (third.response, third.context) == ("Good day", ())
    assert reading.rejects[0].line == 6


def test_questions():
    reading, found = _all("questions.jsonl")
    assert _counts(reading) == ("questions", 2, 1, 0)
    assert [(dialogue.prompt, dialogue.response) for dialogue in found] == [
        ("Which book?", ""),
        ("Which day?", ""),
    ]
    assert {dialogue.conversation for dialogue in found} == {"Ana"}


@pytest.mark.parametrize("name", ["messages.jsonl", "pairs.jsonl", "instances.jsonl"])
def test_lines_array_and_spread_document_read_the_same(tmp_path, name):
    values = [json.loads(line) for line in (FIXTURES / name).read_text().splitlines() if line]
    _, wanted = _all(name)
    for text in (
        json.dumps(values),
        json.dumps(values, indent=2),
        "\n".join(json.dumps(v, indent=1) for v in values),
    ):
        found = list(readers.read(_write(tmp_path, text, "x.txt")))
        assert [dialogue.id for dialogue in found] == [dialogue.id for dialogue in wanted]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"input": "a", "response"', "invalid JSON: "),
        ("not JSON", "invalid JSON: "),
        ("[1]", "not an object"),
        ('{"input": "a"}', "missing field: response"),
        ('{"input": 3, "response": "b"}', "wrong type: input is no text"),
        ('{"input": " ", "response": "b"}', "empty prompt"),
        ('{"input": "a", "response": "\\n"}', "empty response"),
        ('{"input": "a", "response": "\\ud800"}', "lone surrogate in response"),
        ('{"input": "a\\u0000", "response": "b"}', "NUL character in input"),
        (b'{"input": "\0", "response": "b"}', "NUL character"),
        (b'{"input": "\xff", "response": "b"}', "invalid UTF-8 at byte 12"),
        (GOOD.replace("a", "a" * 2000), "over max_record_bytes (1000)"),
        ('{"input": "a", "response": ' + "9" * 9000 + "}", "over max_record_bytes (1000)"),
        ('{"input": "a", "response": "b", "context": 1}', "wrong type: context"),
        ('{"input": "a", "response": "b", "preferred": []}', "wrong type: preferred is no text"),
    ],
)
def test_a_bad_line_is_told_and_nothing_else_is_lost(tmp_path, line, reason):
    bad = line if isinstance(line, bytes) else line.encode()
    content = b"\r\n".join([b"\xef\xbb\xbf" + GOOD.encode(), b"", bad, GOOD.encode(), b""])
    kept = tmp_path / "rejects.jsonl"
    reading = readers.read(_write(tmp_path, content), settings=config.Reading(max_record_bytes=1000), rejects=kept)
    assert [dialogue.source for dialogue in reading] == ["in.jsonl:1", "in.jsonl:4"]
    assert _counts(reading) == ("pairs", 2, 1, 0)
    (written,) = [json.loads(row) for row in kept.read_text(encoding="utf-8").splitlines()]
    assert written == {
        "file": "in.jsonl",
        "line": 3,
        "reason": reading.rejects[0].reason,
        "record": bad.decode("utf-8", "replace")[:2000],
    }
    assert written["reason"].startswith(reason)


def test_no_rejects_no_file_and_later_rejects_are_added(tmp_path):
    kept = tmp_path / "rejects.jsonl"
    list(readers.read(_write(tmp_path, GOOD), rejects=kept))
    assert not kept.exists()
    for _ in range(2):
        list(readers.read(_write(tmp_path, f"{GOOD}\nx\n"), rejects=kept))
    assert len(kept.read_text().splitlines()) == 2


def test_only_the_first_rejects_are_held(tmp_path):
    kept = tmp_path / "rejects.jsonl"
    reading = readers.read(_write(tmp_path, f"{GOOD}\n" + "x\n" * 100), rejects=kept)
    list(reading)
    assert (reading.rejected, len(reading.rejects), len(kept.read_text().splitlines())) == (100, 20, 100)


def test_the_input_is_never_written_over(tmp_path):
    path = _write(tmp_path, f"{GOOD}\nx\n")
    with pytest.raises(InputError, match="another path"):
        readers.read(path, rejects=tmp_path / "." / "in.jsonl")
    assert path.read_text() == f"{GOOD}\nx\n"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it is empty"),
        (b"\xef\xbb\xbf \n\n", "it is empty"),
        (GOOD.encode("utf-16"), "UTF-16"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, "binary"),
        (b"import os\nprint(os)\n", "no known format, it begins with 'import os'"),
        (b"name,age\na,3\n", "no known format"),
        (b'{"a": 1}\n{"a": 2}\n', "none of its records is in a known format"),
        (
            b'{\n "messages":',
            "none of its 1 records can be used, the first at record 1: the document breaks off",
        ),
        (
            b'{"input": "a", "response": ""}\n',
            "none of its 1 records can be used, the first at line 1: empty",
        ),
        (b"[1, 2]", "none of its 2 records can be used, the first at record 1: not an object"),
        (b"prompt,response\n", "it has no dialogue"),
        (b"[]", "it has no dialogue"),
        (b"3", "no known format"),
    ],
)
def test_a_file_without_dialogues_is_an_error(tmp_path, content, found):
    with pytest.raises(InputError) as error:
        list(readers.read(_write(tmp_path, content)))
    text = str(error.value)
    assert text.startswith("read dialogues from ")
    assert found in text
    assert "; " in text
    assert "\n" not in text


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        readers.read(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="it is a folder"):
        readers.read(tmp_path)
    path = _write(tmp_path, f"{GOOD}\nx\n")
    with pytest.raises(InputError, match="write rejects to"):
        list(readers.read(path, rejects=path / "no folder" / "rejects.jsonl"))


@pytest.mark.parametrize("path", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_format_is_insisted_on(path):
    own = readers.read(path).format
    assert readers.read(path, format=own).format == own
    for other in set(readers.FORMATS) - {own}:
        with pytest.raises(InputError, match=f"--format {other} was asked for, but it is {own}"):
            list(readers.read(path, format=other))


def test_unknown_format(tmp_path):
    with pytest.raises(InputError, match=r"no such format; give .*messages"):
        readers.read(_write(tmp_path, GOOD), format="xml")


def test_format_reads_past_a_long_bad_start(tmp_path):
    path = _write(tmp_path, "log line\n" * 200 + GOOD)
    with pytest.raises(InputError, match="no known format"):
        readers.read(path)
    reading = readers.read(path, format="pairs")
    assert (len(list(reading)), reading.rejected) == (1, 200)


def test_records_before_the_first_known_one_are_rejected(tmp_path):
    reading = readers.read(_write(tmp_path, f'garbage\n{{"a": 1}}\n{GOOD}\n'))
    assert [dialogue.source for dialogue in reading] == ["in.jsonl:3"]
    assert [reject.line for reject in reading.rejects] == [1, 2]


def test_an_array_that_breaks_off_or_holds_a_bad_element_keeps_the_rest(tmp_path):
    text = f'[{GOOD}, {{"input": "a" "b"}}, 3, {GOOD}, {{"input": "a", "resp'
    reading = readers.read(_write(tmp_path, text))
    assert [dialogue.source for dialogue in reading] == ["in.jsonl:1", "in.jsonl:4"]
    assert [reject.line for reject in reading.rejects] == [2, 3, 5]
    assert reading.rejects[-1].reason == "the document breaks off here"


def test_csv_rows_that_do_not_fit(tmp_path):
    text = 'prompt;response\na;b\na;b;c\n"open;b\nc;d\n"e ""q""\nf";g\n"x";""\n"end;x\n'
    reading = readers.read(_write(tmp_path, text))
    assert [(dialogue.prompt, dialogue.response) for dialogue in reading] == [
        ("a", "b"),
        ("c", "d"),
        ('e "q"\nf', "g"),
    ]
    assert [(reject.line, reject.reason) for reject in reading.rejects] == [
        (3, "3 cells where the header has 2"),
        (4, "a quote is never closed"),
        (8, "empty response"),
        (9, "a quote is never closed"),
    ]


def test_an_answer_without_columns_for_conversations_still_pairs(tmp_path):
    text = "role,content\nuser,1\nbot,2\ntool,x\nhuman,3\nassistant,4\n"
    reading = readers.read(_write(tmp_path, text))
    assert [(dialogue.prompt, dialogue.response) for dialogue in reading] == [("1", "2"), ("3", "4")]
    assert (reading.rejected, reading.skipped) == (0, 3)


def test_standard_input_gives_a_dialogue_as_soon_as_its_line_is_there():
    program = "from edge_sdss import readers\nfor d in readers.read('-'): print(d.source, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in (1, 2):
            process.stdin.write(GOOD + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"stdin:{number}\n"
        process.stdin.close()
        assert process.wait() == 0


def test_standard_input_can_be_given():
    assert [d.prompt for d in readers.read("-", stdin=io.BytesIO(GOOD.encode()))] == ["a"]


# ---- the shared data: original files, read without conversion -------------------------------------

shared = pytest.mark.skipif(not (DATA / "README.md").exists(), reason="the shared data is not here")
EXPECTED = {
    "alpaca/alpaca_5000.json": ("alpaca", 4998, 2, 0),
    "chatdoctor/chatdoctor5k.json": ("alpaca", 5452, 0, 0),
    "dolly/dolly_3k.json": ("alpaca", 2996, 0, 0),
    "empathetic_dialogues/ed_test_pairs.jsonl": ("pairs", 5242, 0, 0),
    "empathetic_dialogues/ed_val_pairs.jsonl": ("pairs", 5712, 0, 0),
    "esconv/devWithStrategy_short.tsv": ("eos_turns", 2460, 0, 525),
    "esconv/testWithStrategy_short.tsv": ("eos_turns", 2264, 0, 511),
    "memorybank/memory_bank_en.json": ("days", 566, 0, 0),
    "memorybank/probing_questions_en.jsonl": ("questions", 100, 0, 0),
    "mts_dialog/MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv": ("csv", 670, 32, 0),
    "mts_dialog/MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv": ("csv", 780, 33, 0),
    "mts_dialog/MTS-Dialog-TrainingSet.csv": ("csv", 4516, 162, 0),
    "mts_dialog/MTS-Dialog-ValidationSet.csv": ("csv", 307, 21, 0),
    "self_instruct/seed_tasks.jsonl": ("instances", 175, 0, 0),
    "self_instruct/user_oriented_instructions.jsonl": ("instances", 252, 0, 0),
}


@shared
@pytest.mark.parametrize("name", EXPECTED)
def test_shared_data(name):
    reading = readers.read(DATA / name)
    found = list(reading)
    assert _counts(reading) == EXPECTED[name]
    assert all(d.prompt == d.prompt.strip() and d.response == d.response.strip() for d in found)
    assert all(d.prompt and (d.response or reading.format == "questions") for d in found)


@shared
@pytest.mark.parametrize("name", [name for name, (kind, *_) in EXPECTED.items() if kind == "alpaca"])
def test_shared_alpaca_by_json(name):
    wanted = [
        (
            "\n\n".join(part for part in (row["instruction"].strip(), row["input"].strip()) if part),
            row["output"].strip(),
        )
        for row in json.loads((DATA / name).read_text(encoding="utf-8"))
    ]
    assert [(d.prompt, d.response) for d in readers.read(DATA / name)] == [pair for pair in wanted if pair[1]]


@shared
@pytest.mark.parametrize("name", [name for name, (kind, *_) in EXPECTED.items() if kind == "csv"])
def test_shared_visits_by_csv(name):
    """Counts the user's runs of lines that a clinician's line follows, straight from the csv module."""
    exchanges = empty = 0
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            said = re.findall(r"(?m)^[\s\"]*([A-Z]\w+):", row["dialogue"])
            marks = "".join(
                "u" if re.match("(Patient|Guest_family|Gest|Docotr|Guest_clinican)", who) else "a" for who in said
            )
            exchanges += len(re.findall("u+a", marks))
            empty += not re.search("ua", marks)
    assert (exchanges, empty) == EXPECTED[name][1:3]


@shared
@pytest.mark.parametrize("name", [name for name, (kind, *_) in EXPECTED.items() if kind == "eos_turns"])
def test_shared_windows_by_regular_expression(name):
    """Rebuilds the conversations by turn number alone and counts the seeker's turns that are answered."""
    talks: list[dict[int, str]] = []
    last = 10**9
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        turns = {int(number): who for who, number in re.findall(r"(?:^| EOS )[\d.]+ ([01]) (\d+) ", line)}
        if max(turns) <= last:
            talks.append({})
        last = max(turns)
        talks[-1].update(turns)
    speakers = ["".join(talk[number] for number in sorted(talk)) for talk in talks]
    found = list(readers.read(DATA / name))
    assert len(found) == sum(len(re.findall("01", talk)) for talk in speakers)
    assert len({d.conversation for d in found}) == sum("01" in talk for talk in speakers)
    text = " ".join(d.prompt + d.response for d in found)
    assert " EOS " not in text
    assert "[Question" not in text
