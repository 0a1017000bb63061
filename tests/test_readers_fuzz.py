"""Whatever the bytes: dialogues, rejects, skipped records or an InputError; nothing lost or stuck."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_sdss import config, readers
from edge_sdss.errors import InputError
from edge_sdss.types import Dialogue

FIXTURES = Path(__file__).parent / "fixtures" / "readers"
SAMPLES = [path.read_bytes() for path in sorted(FIXTURES.iterdir())]
GOOD = b'{"input": "a", "response": "b"}'
LIMIT = 4096


def _read(data: bytes, **options: str) -> tuple[readers.Reading | None, list[Dialogue]]:
    """Reads to the end; (None, []) where that is an InputError. Any other exception fails the test."""
    try:
        reading = readers.read("-", stdin=io.BytesIO(data), settings=config.Reading(max_record_bytes=LIMIT), **options)
        found = list(reading)
    except InputError:
        return None, []
    for dialogue in found:
        assert dialogue.prompt.strip() == dialogue.prompt != ""
        assert dialogue.response or reading.format == "questions"
        str(dialogue).encode()
        assert len(dialogue.id) == 16
    assert len(found) == reading.accepted > 0
    assert len(reading.rejects) == min(reading.rejected, 20)
    return reading, found


# ---- arbitrary and damaged bytes ------------------------------------------------------------------

WORDS = (
    b'{"messages": [|"role": "user"|"content"|null|NaN|1e999|"\\ud800"| EOS |1.0 0 0 hi|1.0 1 1 [x] yo|'
    b'prompt,response\n|role,text\n|Doctor: |\r\n|\t|;|\0|\xff|\xed\xa0\x80|\xef\xbb\xbf|[|]|{|}|,|:|"|\\|\n'
)
pieces_of_formats = st.sampled_from([GOOD, *WORDS.split(b"|")])


@given(st.lists(pieces_of_formats | st.binary(max_size=6), max_size=60).map(b"".join))
@settings(max_examples=250, deadline=None)
def test_any_bytes(data):
    _read(data)


@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 1), pieces_of_formats, st.integers(0, 9)), max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_damaged_files(data, wounds):
    for place, inserted, removed in wounds:
        at = int(place * len(data))
        data = data[:at] + inserted + data[at + removed :]
    _read(data)


@given(st.sampled_from(SAMPLES), st.floats(0, 1), st.sampled_from(readers.FORMATS))
@settings(max_examples=100, deadline=None)
def test_cut_off_files_and_any_format_insisted_on(data, place, name):
    data = data[: int(place * len(data))]
    _read(data)
    _read(data, format=name)


# ---- every record is accounted for ----------------------------------------------------------------

text = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["input", "prompt", "response", "answer", "context", "preferred", "id", "time", "x"])
objects = st.dictionaries(fields, json_values, max_size=6)
bad_lines = st.sampled_from([b"{", b"x", b"[]", b"3", b"\xff", b'{"input": "\0"}', b"{" * 5000, b'{"input": 1', b'"'])
lines = st.lists(objects.map(lambda value: json.dumps(value).encode()) | bad_lines | st.just(GOOD), max_size=30)


@given(lines, st.sampled_from([b"\n", b"\r\n", b"\n\n \n"]))
@settings(max_examples=150, deadline=None)
def test_every_line_is_accounted_for(rows, line_end):
    reading, _ = _read(line_end.join([GOOD, *rows, GOOD]))
    assert reading is not None
    assert reading.format == "pairs"
    assert reading.accepted + reading.rejected == len(rows) + 2
    assert reading.accepted >= 2 + rows.count(GOOD)


@given(st.lists(objects, max_size=15), st.sampled_from([None, 1]), st.data())
@settings(max_examples=100, deadline=None)
def test_every_element_before_the_break_is_kept(values, indent, data):
    whole = [json.loads(GOOD), *values]
    document = json.dumps(whole, indent=indent).encode()
    reading, found = _read(document)
    assert reading is not None
    assert reading.accepted + reading.rejected == len(whole)
    cut = data.draw(st.integers(document.index(b"}") + 1, len(document) - 1))
    reading, kept = _read(document[:cut])
    assert reading is not None
    assert reading.rejects[-1].reason == "the document breaks off here"
    assert kept == found[: len(kept)]


@given(
    st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=9), text), min_size=1),
    st.sampled_from([",", "\t", ";"]),
)
@example(pairs=[("", "\n\0"), ("0", "0")], delimiter=",")
@settings(max_examples=100, deadline=None)
def test_tables_give_back_what_was_written(pairs, delimiter):
    usable = [(a.strip(), b.strip()) for a, b in pairs if a.strip() and b.strip() and "\0" not in b]
    quoted = ["{}{}{}".format(*(_quoted(a), delimiter, _quoted(b))) for a, b in pairs]
    reading, found = _read("\n".join([f"prompt{delimiter}response", *quoted, ""]).encode())
    if usable:
        assert reading is not None
        assert [(d.prompt, d.response) for d in found] == usable
        assert reading.accepted + reading.rejected == len(pairs)


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


# ---- monsters -------------------------------------------------------------------------------------

MONSTERS: dict[str, Callable[[], bytes]] = {
    "10 MB line": lambda: b'{"input": "' + b"a" * 10_000_000 + b'", "response": "b"}',
    "1 MB of open brackets": lambda: b"{[" * 500_000,
    "10 MB of backslashes": lambda: b'{"input": "' + b"\\" * 10_000_000,
    "10,000 levels": lambda: b'{"input": ' + b"[" * 1_500 + b"]" * 1_500 + b"}",
    "NUL": lambda: b"\0" * 1000,
    "lone surrogates": lambda: b'{"input": "\\udc80\\ud800", "response": "\\ud800"}',
    "raw surrogates": lambda: b'{"input": "\xed\xa0\x80", "response": "b"}',
    "long number": lambda: b'{"input": ' + b"9" * 4000 + b', "response": 1}',
    "empty response": lambda: b'{"input": "a", "response": ""}',
    "unclosed string": lambda: b'{"input": "a, "response": "b"}',
}


@pytest.mark.parametrize("name", MONSTERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_monster_is_one_reject(name, first):
    monster = MONSTERS[name]()
    reading, found = _read(b"\n".join([monster, GOOD, GOOD] if first else [GOOD, monster, GOOD]))
    assert reading is not None
    assert (len(found), reading.rejected) == (2, 1)
    assert reading.rejects[0].line == (1 if first else 2)
    assert len(reading.rejects[0].record) <= 2000


def _plain(data: bytes) -> readers.Reading:
    return readers.read("-", stdin=io.BytesIO(data))


def test_deep_json_below_the_limit_is_a_reject():
    deep = b'{"input": "a", "response": "b", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    reading = _plain(b"\n".join([deep, GOOD]))
    assert len(list(reading)) == 1
    assert reading.rejects[0].reason == "JSON nested too deeply"


def test_a_long_dialogue_below_the_limit_is_accepted():
    long = "word  " * 100_000
    pair = {"input": long, "response": long[:300_000]}
    for data in (json.dumps(pair), json.dumps([pair], indent=1), f'prompt,response\n"{long}",yes\n'):
        (dialogue,) = _plain(data.encode())
        assert len(dialogue.prompt) == 6 * 100_000 - 2


def test_a_document_in_pieces_is_cut_at_the_same_places():
    """Strings of escapes and brackets that lie across the 64 KiB pieces of a one-line document."""
    values = [{"input": '\\"[{' * size, "response": "]},\\" * size} for size in range(1, 400)]
    found = list(_plain(json.dumps(values).encode()))
    assert [(d.prompt, d.response) for d in found] == [(v["input"], v["response"]) for v in values]


@pytest.mark.parametrize("line", [b'"x', b'x"y,"a', b'"a"b",c', b'"'])
def test_quotes_that_never_close_do_not_stick(line):
    data = b"prompt,response\na,b\n" + b"\n".join([line] * 50_000) + b'\nc,d\n"e\nf",g\n'
    reading = _plain(data)
    prompts = [dialogue.prompt for dialogue in reading]
    assert prompts[0] == "a"
    assert len(prompts) + reading.rejected > 20_000


@pytest.mark.parametrize(
    "data",
    [b"\n" * 1_000_000, b'"' * 3_000_000, b"{}\n" * 300_000, b"[" + b"1," * 100_000, b"a: b\n" * 300_000],
    ids=["line ends", "quotes", "empty objects", "numbers", "colons"],
)
def test_large_files_without_a_dialogue_end(data):
    with pytest.raises(InputError):
        list(_plain(data))


def test_memory_stays_flat():
    class Endless(io.RawIOBase):
        """20,000 pairs of 1 kB, then a line of 50 MB, made as they are read."""

        def __init__(self) -> None:
            self.left = 20_000 + 800

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            if not self.left:
                return 0
            self.left -= 1
            row = GOOD.replace(b"a", b"a" * 1000) + b"\n" if self.left >= 800 else b"x" * 65_536
            row = row[: len(buffer)]
            buffer[: len(row)] = row
            return len(row)

    tracemalloc.start()
    reading = readers.read("-", stdin=io.BufferedReader(Endless(), 1 << 17))
    assert sum(1 for _ in reading) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reading.rejected == 1
    assert peak < 8 << 20
