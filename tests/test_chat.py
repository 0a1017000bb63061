"""Conversations with a bundle: what is answered, what the buffer sees of it, and at what cost; no torch."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import document

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from bundles_fixture import random_adapter, random_tiny, reference, write_adapter, write_bundle

from edge_sdss import bundles, cli, embedding, speakers
from edge_sdss.bundles import AdapterEntry
from edge_sdss.bundles.shelf import Shelf
from edge_sdss.config import Config
from edge_sdss.conversation import Conversation
from edge_sdss.errors import ConfigError, InputError
from edge_sdss.runtime import Engine, Sampling, writer
from edge_sdss.runtime.lane import Lane
from edge_sdss.session import Session
from edge_sdss.speakers import BundleSpeaker, TorchSpeaker, read_adapter, sampling
from edge_sdss.types import Dialogue, Example, Turn

REPOSITORY = Path(__file__).resolve().parent.parent
NEVER = (399,)
QUESTIONS = ("What should I cook for dinner tonight?", "My doctor says I should sleep", "The cat sat on the mat")
ANSWERS = ("The cat looked at the rain.", "I feel happy today, thank you!", "Please sleep more.")


def with_adapters(folder, tiny):
    """Puts two adapters into a bundle."""
    manifest = bundles.load(folder)
    entries = []
    for seed, name in enumerate("ab"):
        (folder / "adapters").mkdir(exist_ok=True)
        path = f"adapters/{name}.onnx_adapter"
        write_adapter(folder / path, random_adapter(tiny, seed=seed, size=0.3))
        common = {"rank": 4, "scale": 1.0, "base_fingerprint": manifest.base_fingerprint, "source_sha256": "0" * 64}
        entries.append(AdapterEntry(name=name, file=bundles.entry(folder, path), **common))
    bundles.write(folder, manifest.model_copy(update={"adapters": tuple(entries)}))
    return folder


def make(folder, *, seed=0, **options):
    size = bundles.load(write_bundle(folder / "probe")).graph.vocabulary
    tiny = random_tiny(seed, vocabulary=size, context=options.pop("context", 512))
    return with_adapters(write_bundle(folder / "bundle", tiny=tiny, **options), tiny), tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle with two adapters, and its weights."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A bundle whose answers are cut off."""
    return make(tmp_path_factory.mktemp("endless"), stop_ids=NEVER, context=4096)[0]


def settings(**sections):
    return Config().override({"chat": {"max_new_tokens": 24}, **sections})


@pytest.fixture
def talk(made, tmp_path):
    """Opens a conversation; `observe`: with a session."""
    sessions = []

    def open_conversation(bundle=None, observe=True, found=None, home="home"):
        found = found or settings()
        engine = Engine.open(bundle or made[0], threads=1)
        session = Session(tmp_path / home, found, lm=engine) if observe else None
        sessions.extend([session] if session else [])
        return Conversation(BundleSpeaker(engine, found, embeds=observe), found, session)

    yield open_conversation
    for session in sessions:
        session.close()


@pytest.fixture
def say(monkeypatch, made):
    """Puts answers in the model's mouth, the last one again and again: one of random weights writes no words."""
    engine = Engine.open(made[0], threads=1)

    def script(*texts):
        left = list(texts)

        def token(logits, how, seen, draw):
            if not queue:
                text = left.pop(0) if len(left) > 1 else left[0]
                queue.extend([*engine.tokenizer(text, add_special_tokens=False)["input_ids"], engine.chat.end_of_turn])
            return queue.pop(0)

        queue: list[int] = []
        monkeypatch.setattr(writer, "choose", token)

    script(*ANSWERS)
    return script


@pytest.fixture
def runs(monkeypatch):
    """The forward passes, each as how many tokens it computed."""
    counted = []
    real = Lane._run
    monkeypatch.setattr(Lane, "_run", lambda self, ids, *rest: counted.append(ids.size) or real(self, ids, *rest))
    return counted


def taken(counted):
    found = list(counted)
    counted.clear()
    return found


# The embeddings that come with an answer


def test_an_exchange_costs_no_forward_pass_for_selection(talk, say, runs):
    costs = []
    for conversation in (talk(observe=False), talk()):
        say(*ANSWERS)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
            exchange = conversation.ask(question)
            assert (exchange.answer, exchange.finished) == (answer, True)
        costs.append(taken(runs))
    assert [e.decision.action for e in conversation.exchanges] == ["kept"] * 3
    assert costs[0] == costs[1]


def test_an_answer_that_is_cut_off_costs_one_decode_step_which_the_next_turn_saves(talk, say, runs):
    costs = []
    for observe in (False, True):
        conversation = talk(observe=observe, found=settings(chat={"max_new_tokens": 3}))
        for answer in ANSWERS[:2]:
            say(answer)
            assert not conversation.ask("Hi").finished
            costs.append(taken(runs))
    assert costs[2] == [*costs[0], 1]
    assert costs[3] == [costs[1][0] - 1, *costs[1][1:], 1]


def test_with_an_adapter_it_costs_one_pass_of_the_base_model(talk, say, runs):
    costs = []
    for conversation in (talk(observe=False), talk()):
        say(*ANSWERS)
        conversation.speaker.use({"a": 1.0})
        for question in QUESTIONS[:2]:
            exchange = conversation.ask(question)
            assert exchange.adapter == {"a": 1.0}
            costs.append((taken(runs), exchange.prompt_tokens + exchange.tokens - 1))  # what ends it is not fed
    (first, _), (second, _), (with_first, fed), (with_second, more) = costs
    assert with_first == [*first, fed]
    assert with_second == [*second, more - fed]


@pytest.mark.parametrize("adapter", [{}, {"a": 1.0}, {"a": 0.5, "b": 0.5}], ids=str)
@pytest.mark.parametrize("text", ["dialogue", "prompt"])
def test_what_is_scored_is_the_base_models_states_of_question_and_answer(talk, say, made, monkeypatch, adapter, text):
    """Against NumPy's own computation of the whole sequence; the second turn has the first before it."""
    conversation = talk(found=settings(selection={"text": text}))
    engine, seen = conversation.speaker.engine, []
    real = Session.observe
    monkeypatch.setattr(Session, "observe", lambda self, d, e, **k: seen.append(e) or real(self, d, e, **k))
    conversation.speaker.use(adapter)
    for question in QUESTIONS[:2]:
        before = list(conversation.turns)
        exchange = conversation.ask(question)
        messages = (*before, Turn("user", question))
        encoded = engine.encode(Example(messages, exchange.answer), 512)
        hidden = reference(made[1], encoded.ids)[1]
        words = engine.tokenizer(question, add_special_tokens=False)["input_ids"]
        ends = [at for at in range(encoded.prompt_tokens) if encoded.ids[at : at + len(words)] == words]
        wanted = [hidden[ends[-1] : ends[-1] + len(words)]]
        wanted += [hidden[encoded.prompt_tokens : -1]] if text == "dialogue" else []
        np.testing.assert_allclose(seen[-1], np.concatenate(wanted), atol=2e-4)


def test_observing_a_dialogue_gives_it_the_scores_that_chatting_did(talk, say):
    chatted = talk(home="chat")
    decisions = [chatted.ask(question).decision for question in QUESTIONS]
    observed = talk(home="file")
    kept = [exemplar.dialogue for exemplar in chatted.session.store.exemplars().values()]
    for dialogue, decision in zip(kept, decisions, strict=True):
        found = observed.session.observe(dialogue)
        assert found.dialogue_id == decision.dialogue_id
        assert found.scores.eoe == pytest.approx(decision.scores.eoe, abs=1e-5)
        assert found.scores.idd == pytest.approx(decision.scores.idd, abs=2e-3)


# Embeddings of another source


def state(session):
    return {slot: (e.eoe, e.vector) for slot, e in session.store.exemplars().items()}


DIALOGUES = [Dialogue(f"what of my cat {n}", "it sleeps all day, I feel happy") for n in range(6)]


def session_of(home, bundle, found=None):
    return Session(home, found or Config(), lm=Engine.open(bundle, threads=1))


def test_a_buffer_of_another_source_is_embedded_anew(made, tmp_path):
    other, _ = make(tmp_path / "other", seed=9)
    with session_of(tmp_path / "h", made[0]) as session:
        list(session.observe_all(DIALOGUES))
        first = state(session)
    with session_of(tmp_path / "fresh", other) as session:
        list(session.observe_all(DIALOGUES))
        wanted = state(session)
    with session_of(tmp_path / "h", other) as session:
        session.selector  # noqa: B018
        assert state(session) == wanted
        assert [float(e) for e in session.selector.buffer.eoe[:6]] == [eoe for eoe, _ in wanted.values()]
    with session_of(tmp_path / "h", made[0]) as session:
        session.selector  # noqa: B018
        assert state(session) == first != wanted


def test_embedding_anew_happens_wholly_or_not_at_all(made, tmp_path, monkeypatch):
    other, _ = make(tmp_path / "other", seed=9)
    with session_of(tmp_path / "h", made[0]) as session:
        list(session.observe_all(DIALOGUES))
        first = state(session)
    real, calls = embedding.of, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, session_of(tmp_path / "h", other) as session:
        patch.setattr(embedding, "of", fails)
        with pytest.raises(KeyboardInterrupt):
            session.observe(DIALOGUES[0])
        assert state(session) == first
    with session_of(tmp_path / "h", other) as session:
        session.selector  # noqa: B018
        assert state(session) != first


def test_a_home_from_before_sources_had_names_is_embedded_anew(made, tmp_path):
    with session_of(tmp_path / "h", made[0]) as session:
        list(session.observe_all(DIALOGUES))
        wanted = state(session)
        stored = session.store.meta("identity")
        del stored["embeddings"]
        session.store.set_meta("identity", stored)
        session.store._db.execute("UPDATE exemplars SET eoe = 0.5")
    with session_of(tmp_path / "h", made[0]) as session:
        session.selector  # noqa: B018
        assert state(session) == wanted


def test_another_model_is_refused(made, tmp_path):
    other, _ = make(tmp_path / "other", seed=9)
    manifest = bundles.load(other).model_copy(update={"base_fingerprint": "c" * 64, "adapters": ()})
    bundles.write(other, manifest)
    with session_of(tmp_path / "h", made[0]) as session:
        list(session.observe_all(DIALOGUES))
    with session_of(tmp_path / "h", other) as session, pytest.raises(ConfigError, match="another model"):
        session.observe(DIALOGUES[0])


def test_adapters_do_not_change_what_embeds(made, tmp_path):
    engine = Engine.open(made[0], threads=1)
    name = embedding.source(engine, Config())
    engine.manifest = engine.manifest.model_copy(update={"adapters": ()})
    assert embedding.source(engine, Config()) == name
    other, _ = make(tmp_path, seed=9)
    assert embedding.source(Engine.open(other, threads=1), Config()) != name


# A conversation


def test_turns_are_remembered_until_they_are_cleared(talk, endless):
    conversation = talk(endless, observe=False)
    first = conversation.ask(QUESTIONS[0])
    second = conversation.ask(QUESTIONS[1])
    turns = [(turn.role, turn.text) for turn in conversation.turns]
    exchanges = [(first, QUESTIONS[0]), (second, QUESTIONS[1])]
    assert turns == [t for e, q in exchanges for t in (("user", q), ("assistant", e.answer))]
    engine = Engine.open(endless, threads=1)
    alone = "".join(engine.stream([*conversation.turns[:2], Turn("user", QUESTIONS[1])], max_new_tokens=24, seed=1))
    assert second.answer == alone
    conversation.clear()
    again = conversation.ask(QUESTIONS[0])
    assert (again.answer, again.prompt_tokens) == (first.answer, first.prompt_tokens)


def test_a_long_conversation_stays_within_the_context(talk, tmp_path):
    bundle, _ = make(tmp_path / "short", context=160, stop_ids=NEVER)
    conversation = talk(bundle, observe=False)
    used = []
    for number in range(12):
        used.append(conversation.ask(f"{number}: {QUESTIONS[number % 3]}").prompt_tokens)
        assert conversation.turns[0].role == "user"
        assert len(conversation.turns) % 2 == 0
    room = 160 - 24
    assert max(used) <= room
    falls = [after for before, after in itertools.pairwise(used) if after < before]
    assert falls
    assert max(falls) <= room // 2
    assert conversation.ask("cat " * 300).answer


def test_an_answer_that_the_user_stops_is_remembered_and_not_offered(talk, endless):
    conversation = talk(endless, found=settings(chat={"max_new_tokens": 400}))
    pieces = []

    def show(piece):
        pieces.append(piece)
        if len(pieces) == 5:
            conversation.stop()

    stopped = conversation.ask("Hi", show)
    assert stopped.stopped
    assert "".join(pieces) == stopped.answer == conversation.turns[-1].text
    assert stopped.decision is None
    assert conversation.session.store.counts.offers == 0
    talked = conversation.speaker.engine._talk
    assert talked is not None, "the KV cache is kept for the next turn"
    assert not conversation.ask("Go on", lambda piece: None).stopped
    assert conversation.session.store.counts.offers == 1


def test_each_exchange_is_on_the_disk_when_it_is_answered(talk, tmp_path):
    conversation = talk()
    for count, question in enumerate(QUESTIONS, start=1):
        conversation.ask(question)
        with sqlite3.connect(tmp_path / "home" / "edge_sdss.db") as db:
            assert db.execute("SELECT COUNT(*) FROM exemplars").fetchone() == (count,)


def test_a_kept_exchange_has_the_turns_before_it_and_its_conversation(talk, say):
    conversation = talk(found=settings(reading={"context_turns": 3}))
    for question in QUESTIONS:
        conversation.ask(question)
    kept = sorted(conversation.session.store.exemplars().values(), key=lambda e: e.seq)
    turns = conversation.turns
    assert [list(e.dialogue.context) for e in kept] == [[], turns[:2], turns[2:4]]
    assert len({e.dialogue.conversation for e in kept}) == 1
    assert {e.dialogue.source for e in kept} == {"chat"}
    assert all(e.dialogue.time for e in kept)


def test_an_exchange_that_cannot_be_offered_is_answered_all_the_same(talk, say, monkeypatch):
    conversation = talk()

    def refuses(*arguments, **named):
        raise InputError("the embeddings are not finite")

    monkeypatch.setattr(conversation.session, "observe", refuses)
    exchange = conversation.ask(QUESTIONS[0])
    assert exchange.answer == ANSWERS[0]
    assert (exchange.decision, exchange.problem) == (None, "the embeddings are not finite")


def test_what_was_kept_is_known_until_it_is_replaced(talk):
    conversation = talk(found=settings(buffer={"bins": 1}, selection={"policy": "fifo"}))
    exchanges = [conversation.ask(question) for question in QUESTIONS]
    assert [conversation.is_kept(e) for e in exchanges] == [False, False, True]
    fill = conversation.fill
    assert (fill.entries, fill.bins) == (1, 1)
    assert 0 < fill.bytes <= fill.max_bytes


@pytest.mark.parametrize("text", ["", "  ", "a\x00b", "a\udcffb"])
def test_what_cannot_be_asked_is_refused(talk, text):
    conversation = talk(observe=False)
    with pytest.raises(InputError):
        conversation.ask(text)
    assert conversation.exchanges == conversation.turns == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("none", {}), ("a", {"a": 1.0}), ("a=0.7,b=0.3", {"a": 0.7, "b": 0.3}), (" a = -2 , b", {"a": -2.0, "b": 1.0})],
)
def test_adapters_are_named_scaled_and_mixed(text, wanted):
    assert read_adapter(text) == wanted


@pytest.mark.parametrize("text", ["", "a=", "a=x", "=1", "a,a", "a,,b"])
def test_a_wrong_adapter_is_refused(text):
    with pytest.raises(InputError, match="NAME=SCALE"):
        read_adapter(text)


def test_an_unknown_adapter_leaves_the_one_before(talk):
    conversation = talk(observe=False)
    conversation.speaker.use({"b": 0.5})
    for wrong in ({"c": 1.0}, {"a": float("nan")}):
        with pytest.raises(InputError):
            conversation.speaker.use(wrong)
    assert conversation.speaker.adapter == {"b": 0.5}


def test_what_was_asked_for_stands_over_the_models_own_sampling():
    defaults = Sampling(temperature=0.6, top_p=0.9, top_k=50, repetition_penalty=1.1)
    assert sampling(Config().chat, defaults) == defaults
    asked = settings(chat={"temperature": 0.0, "top_k": 0}).chat
    assert sampling(asked, defaults) == replace(defaults, temperature=0.0, top_k=0)
    with pytest.raises(ConfigError, match=r"chat\.top_p"):
        settings(chat={"top_p": 0.0})


def test_seeds_make_answers_and_each_turn_draws_anew(talk, endless):
    def asked(seed):
        conversation = talk(endless, observe=False, found=settings(chat={"temperature": 1.5, "seed": seed}))
        answers = []
        for _ in range(2):
            answers.append(conversation.ask("Hi").answer)
            conversation.clear()
        return answers

    first = asked(1)
    assert asked(1) == first
    assert first[0] != first[1]


# The command line


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin="", torch=None):
        monkeypatch.setattr(sys, "argv", ["edge-sdss", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        if torch is not None:
            monkeypatch.setattr(speakers, "has_torch", lambda: torch)
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


def test_one_answer_as_json(call, made, endless, talk):
    found = document(call("chat", "--bundle", endless, "--prompt", QUESTIONS[0], "--max-tokens", 24, "--json"))
    wanted = talk(endless, observe=False).ask(QUESTIONS[0])
    assert (found["answer"], found["tokens"], found["adapter"]) == (wanted.answer, 24, {})
    assert found["tokens_per_s"] > 0
    assert found["decision"]["action"] == "kept"
    assert set(found["decision"]) >= {"eoe", "dss", "idd", "reason"}
    mixed = document(
        call("chat", "--bundle", made[0], "--prompt", "Hi", "--adapter", "a=0.7,b=0.3", "--no-observe", "--json")
    )
    assert (mixed["adapter"], mixed["decision"]) == ({"a": 0.7, "b": 0.3}, None)


def test_the_prompt_may_come_from_stdin_and_the_answer_is_plain_text(call, say, made, home):
    code, out, err = call("chat", "--bundle", made[0], stdin=QUESTIONS[1] + "\n")
    assert (code, out) == (0, ANSWERS[0] + "\n")
    assert "Kept: there was room." in err
    with Session(home, Config()) as session:
        assert [e.dialogue.prompt for e in session.store.exemplars().values()] == [QUESTIONS[1]]


def test_a_prompt_that_is_no_text_is_refused(call, made):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    code, _, err = call("chat", "--bundle", made[0], stdin=stdin)
    assert (code, "no utf-8" in err, err.count("\n")) == (2, True, 1)


def test_nothing_is_stored_with_no_observe(call, made, home):
    assert call("chat", "--bundle", made[0], "--prompt", "Hi", "--no-observe")[0] == 0
    assert not home.exists()


def test_the_homes_active_bundle_answers_and_embeds_where_there_is_no_torch(call, made, home):
    Shelf(home).deploy(made[0])
    answered = document(call("chat", "--prompt", QUESTIONS[0], "--json"))
    assert answered["model"] == "tiny, float32 on cpu"
    seen = document(call("observe", "--prompt", "my cat eats soup", "--response", "good", "--json", torch=False))
    assert seen["seq"] == 2
    with Session(home, Config()) as session:
        assert session.store.meta("identity")["embeddings"].startswith("in the chat, graph ")


def test_observe_takes_a_bundle(call, made, home, tmp_path):
    stream = tmp_path / "talk.jsonl"
    stream.write_text("".join(json.dumps({"prompt": d.prompt, "response": d.response}) + "\n" for d in DIALOGUES))
    found = document(call("observe", stream, "--bundle", made[0], "--json", torch=True))
    assert (found["offers"], found["in_buffer"]) == (6, 6)


def test_a_bundle_without_hidden_states_answers_and_says_that_nothing_is_offered(call, tmp_path, home):
    bundle = write_bundle(tmp_path / "blind", hidden_states=False)
    code, _, err = call("chat", "--bundle", bundle, "--prompt", "Hi", "--max-tokens", 4)
    assert code == 0
    assert "gives no hidden states" in err
    assert not home.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "Hi"], "no bundle is active"),
        (["--bundle", "nowhere", "--prompt", "Hi"], "nowhere"),
        (["--bundle", "B", "--prompt", "Hi", "--adapter", "c"], "there are a, b"),
        (["--bundle", "B", "--prompt", "Hi", "--adapter", "a=x"], "NAME=SCALE"),
        (["--bundle", "B", "--prompt", "Hi", "--top-p", "2"], "chat.top_p"),
        (["--bundle", "B", "--prompt", "Hi", "--provider", "abacus"], "abacus"),
        (["--bundle", "B", "--prompt", " "], "empty prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_input_is_one_line_and_exit_code_two(call, made, arguments, words):
    given = [str(made[0]) if one == "B" else one for one in arguments]
    code, out, err = call("chat", *given, torch=False)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert set(json.loads(call("chat", *given, "--json", torch=False)[1])) == {"error", "message"}


def test_what_a_terminal_would_obey_is_not_shown(capsys):
    from edge_sdss import cli_chat

    cli_chat._show("a\x1b[2Jb\x07\x9bc\td\né")
    assert capsys.readouterr().out == "a[2Jbc\td\né"


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments, **environment):
        import pty

        own = {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment}
        program, environment = [sys.executable, "-m", "edge_sdss", *map(str, arguments)], {**os.environ, **own}
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, program, environment)
        self.shown = ""

    def type(self, text):
        os.write(self._fd, text.encode())

    def read(self, until, seconds=120):
        """Reads until a text comes; returns what came before it."""
        end = time.monotonic() + seconds
        while until not in self.shown:
            if not select.select([self._fd], [], [], max(end - time.monotonic(), 0))[0]:
                pytest.fail(f"{until!r} did not come: {self.shown!r}")
            try:
                self.shown += os.read(self._fd, 4096).decode(errors="replace")
            except OSError:
                pytest.fail(f"ended before {until!r}: {self.shown!r}")
        before, _, self.shown = self.shown.partition(until)
        return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", before)

    def end(self):
        try:
            while chunk := os.read(self._fd, 4096):
                self.shown += chunk.decode(errors="replace")
        except OSError:  # Linux ends a terminal's output so
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation_at_a_terminal(endless, home):
    screen = Terminal("chat", "--bundle", endless, "--home", home, "--max-tokens", 12)
    assert "tiny, float32 on cpu · adapter none" in screen.read("/help")
    screen.read("> ")
    screen.type("What should I cook?\n")
    screen.read("Cut off after 12 tokens")
    screen.read("> ")
    screen.type("/adapter a=0.7,b=0.3\n")
    screen.read("Adapter a=0.7, b=0.3; there are: a, b.")
    screen.type("How are you?\n")
    screen.read("Cut off after 12 tokens")
    screen.type("/adapter c\n")
    screen.read("there are a, b")
    screen.type("/why\n")
    table = screen.read("The buffer holds 2 of 32 bins")
    assert "What should I cook?" in table
    assert table.count("there was room") == 2
    screen.type("/nonsense\n")
    screen.read("There is no /nonsense")
    screen.type("/clear\n")
    screen.read("begins anew")
    screen.type("/help\n")
    screen.read("/quit")
    screen.type("/quit\n")
    assert screen.end() == 0


def test_ctrl_c_ends_the_answer_and_not_the_program(endless, home):
    screen = Terminal("chat", "--bundle", endless, "--home", home, "--max-tokens", 4000)
    screen.read("> ")
    screen.type("Hi\n")
    screen.read("\n")
    while not screen.shown.strip():
        screen.shown += os.read(screen._fd, 64).decode(errors="replace")  # it streams: text before the end
    screen.type("\x03")
    screen.read("Stopped; not offered")
    screen.read("> ")
    screen.type("/why\n")
    assert "not offered" in screen.read("The buffer holds 0 of 32 bins")
    screen.read("> ")  # before the prompt is there the terminal keeps a Ctrl-D to itself
    screen.type("\x04")
    assert screen.end() == 0


@pytest.fixture(params=[False, True], ids=["at-once", "late"])
def waits(request, tmp_path):
    """The environment of a program; `late`: its `select` begins 0.3 s after it was called, as on a busy machine."""
    if not request.param:
        return {}
    if sys.platform != "linux" or not (compiler := shutil.which("cc")):
        pytest.skip("needs Linux and a C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-xc", "-", "-o", tmp_path / "late.so"], input=LATE, check=True)
    return {"LD_PRELOAD": str(tmp_path / "late.so")}


LATE = b"""
#include <poll.h>
#include <sys/select.h>
#include <time.h>
int select(int n, fd_set *in, fd_set *out, fd_set *bad, struct timeval *most) {
    struct timespec left = {0, 300000000}, span = {0, 0};
    while (nanosleep(&left, &left)) {}
    if (most) span = (struct timespec){most->tv_sec, most->tv_usec * 1000};
    return pselect(n, in, out, bad, most ? &span : 0, 0);
}
"""


def test_ctrl_c_at_the_prompt_is_heard_and_takes_back_what_was_typed(endless, home, waits):
    """However close to the prompt: a signal before `input`'s select interrupts no wait."""
    screen = Terminal("chat", "--bundle", endless, "--home", home, "--max-tokens", 3, **waits)
    for typed in ("", "", "nev"):
        screen.read("> ")
        if typed:
            screen.type(typed)
            screen.read(typed)
        screen.type("\x03")
        screen.read("/quit or Ctrl-D ends the conversation.")
    screen.read("> ")
    screen.type("/why\n")
    assert "nev" not in screen.read("The buffer holds 0 of 32 bins")
    screen.read("> ")
    screen.type("/quit\n")
    assert screen.end() == 0


def test_what_was_answered_survives_a_kill(endless, home):
    screen = Terminal("chat", "--bundle", endless, "--home", home, "--max-tokens", 5)
    screen.read("> ")
    screen.type("My cat eats soup\n")
    screen.read("Cut off after 5 tokens")
    os.kill(screen.pid, signal.SIGKILL)
    assert screen.end() == -signal.SIGKILL
    with Session(home, Config()) as session:
        assert [e.dialogue.prompt for e in session.store.exemplars().values()] == ["My cat eats soup"]


# The torch model, where there is no bundle


@pytest.fixture
def torch_session(tiny, tmp_path):
    pytest.importorskip("peft")
    found = settings(model={"name": str(tiny), "device": "cpu"})
    with Session(tmp_path / "torch", found) as session:
        yield session


def test_the_torch_model_answers_as_it_generates(torch_session):
    conversation = Conversation(TorchSpeaker(torch_session, torch_session.settings), torch_session.settings, None)
    pieces = []
    exchange = conversation.ask(QUESTIONS[0], pieces.append)
    wanted = torch_session.lm.generate([[Turn("user", QUESTIONS[0])]], max_new_tokens=24)[0]
    assert (exchange.answer, exchange.tokens, exchange.finished) == (wanted.text, wanted.tokens, wanted.finished)
    assert len(pieces) > 3
    with pytest.raises(InputError, match="there are none"):
        conversation.speaker.use({"round-0001": 1.0})


def test_a_torch_conversation_is_offered_with_embeddings_of_the_text_alone(torch_session):
    conversation = Conversation(
        TorchSpeaker(torch_session, torch_session.settings), torch_session.settings, torch_session
    )
    exchange = conversation.ask(QUESTIONS[0])
    assert exchange.decision.action == "kept"
    assert torch_session.store.meta("identity")["embeddings"] == "text alone, torch float32"


def test_a_home_moves_between_torch_and_a_bundle_and_back(torch_session, tiny, tmp_path):
    from bundles_fixture import hf_tiny

    list(torch_session.observe_all(DIALOGUES))
    alone, home = state(torch_session), torch_session.home
    fingerprint = torch_session.lm.fingerprint
    torch_session.close()
    bundle = write_bundle(tmp_path / "b", tiny=hf_tiny(tiny), tokenizer=tiny, base_fingerprint=fingerprint)
    with session_of(home, bundle, torch_session.settings) as session:
        session.selector  # noqa: B018
        moved = state(session)
        assert all(moved[slot] != alone[slot] for slot in alone)
    with Session(home, torch_session.settings, lm=torch_session.lm) as session:
        session.selector  # noqa: B018
        assert state(session) == alone
