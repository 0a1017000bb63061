"""The engine on tiny bundles, against NumPy's own computation of the same model; no torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from bundles_fixture import (
    random_adapter,
    random_tiny,
    reference,
    write_adapter,
    write_bundle,
)

from edge_sdss import bundles, synthesis
from edge_sdss.bundles import AdapterEntry
from edge_sdss.config import Config, Synthesis
from edge_sdss.errors import BackendUnavailable, ConfigError, InputError
from edge_sdss.runtime import ACTIVE, Engine, kv, lane, providers
from edge_sdss.session import Session
from edge_sdss.types import Dialogue, Example, Turn

KINDS = {
    "growing": {"kv_cache": "growing"},
    "shared": {"kv_cache": "shared"},
    "shared, last logits": {"kv_cache": "shared", "last_logits_only": True},
    "growing, last logits": {"kv_cache": "growing", "last_logits_only": True},
}
IDS = [1, 90, 17, 200, 45, 3, 300, 77, 8, 260, 33, 120]
CHATS = [
    (Turn("user", "What should I cook for dinner tonight?"),),
    (Turn("user", "Hi"),),
    (Turn("system", "Answer in one sentence."), Turn("user", "How are you?")),
    (Turn("user", "I feel happy today"), Turn("assistant", "thank you!"), Turn("user", "I walk. " * 9)),
    (Turn("user", "rain, 123"),),
]
SAMPLED = {"temperature": 1.5, "top_p": 0.95, "top_k": 60, "repetition_penalty": 1.2}


@pytest.fixture(scope="module", params=KINDS)
def bundle(request, tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"), **KINDS[request.param])


@pytest.fixture(scope="module")
def size(bundle) -> int:
    return bundles.load(bundle).graph.vocabulary


@pytest.fixture(scope="module")
def tiny(size):
    return random_tiny(vocabulary=size)


@pytest.fixture
def engine(bundle, tiny, tmp_path) -> Engine:
    """With two adapters, of other ranks; b has only some of the sites."""
    engine = Engine.open(bundle, threads=1)
    engine.load_adapter("a", write_adapter(tmp_path / "a.onnx_adapter", A(tiny)))
    engine.load_adapter("b", write_adapter(tmp_path / "b.onnx_adapter", B(tiny)))
    return engine


@pytest.fixture(scope="module")
def shared_bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"), kv_cache="shared", last_logits_only=True)


def A(tiny):  # noqa: N802
    return random_adapter(tiny, rank=4, seed=1, size=0.2)


def B(tiny):  # noqa: N802
    return random_adapter(tiny, rank=2, seed=2, size=0.3, only="self_attn")


def scaled(tensors, scale):
    return {name: (t * np.float32(scale) if name.endswith("B") else t) for name, t in tensors.items()}


def side_by_side(first, second):
    """The sum of two adapters: A beside A, B on B."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        both[name] = np.concatenate([first[name], second[name]], axis=1 if name.endswith("A") else 0)
    return both


def greedily(tiny, prompt, tokens, adapter=None, stops=()):
    """What a model without any cache answers."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(reference(tiny, ids, adapter)[0][-1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def answer(engine, chat, **options):
    stream = engine.stream(chat, **{"max_new_tokens": 12, **options})
    pieces = list(stream)
    assert "".join(pieces) == stream.text
    assert all(pieces)
    return stream


# The graph


@pytest.mark.parametrize("adapter", [None, "a", "b"])
def test_logits_are_those_of_the_formulas(engine, tiny, adapter):
    tensors = {None: None, "a": A(tiny), "b": B(tiny)}[adapter]
    expected, _ = reference(tiny, IDS, tensors)
    assert np.abs(engine.logits(IDS, adapter) - expected).max() < 1e-3
    assert np.abs(engine.logits(IDS, adapter, first=5) - expected[5:]).max() < 1e-3
    assert adapter is None or np.abs(expected - reference(tiny, IDS)[0]).max() > 1


def test_scaled_and_mixed_adapters(engine, tiny):
    half, mixed = scaled(A(tiny), 0.5), side_by_side(scaled(A(tiny), 0.7), scaled(B(tiny), -0.3))
    for asked, tensors in (({"a": 0.5}, half), ({"a": 0.7, "b": -0.3}, mixed), ({"b": -0.3, "a": 0.7}, mixed)):
        assert np.abs(engine.logits(IDS, asked) - reference(tiny, IDS, tensors)[0]).max() < 1e-3
    base = engine.logits(IDS, None)
    assert np.abs(engine.logits(IDS, {"a": 0.0}) - base).max() < 1e-5
    assert np.array_equal(engine.logits(IDS, {}), base)


@pytest.mark.parametrize("adapter", [None, "a"])
def test_greedy_answers_are_those_without_a_cache(engine, tiny, adapter):
    for chat in CHATS[:3]:
        stream = answer(engine, chat, adapter=adapter)
        tensors = A(tiny) if adapter else None
        assert list(stream.ids) == greedily(tiny, stream.prompt_ids, 12, tensors, engine.chat.stop_ids)


def test_a_long_prompt_goes_through_in_pieces(engine, monkeypatch, size):
    expected = answer(engine, CHATS[3]), engine.logits(IDS)
    monkeypatch.setattr(lane, "_LOGITS_BYTES", 4 * size * 5)
    monkeypatch.setattr(lane, "_PIECE", 5)
    engine.unload_adapter("a")
    fresh = Engine.open(engine.folder, threads=1)
    assert answer(fresh, CHATS[3]).ids == expected[0].ids
    assert np.abs(fresh.logits(IDS) - expected[1]).max() < 1e-4


def test_a_shared_buffer_grows(shared_bundle, monkeypatch):
    monkeypatch.setattr(kv, "_STEP", 8)
    engine = Engine.open(shared_bundle, threads=1)
    tiny = random_tiny(vocabulary=engine.manifest.graph.vocabulary)
    prompt, capacities = IDS[:5], set()
    following = engine.follow(prompt)
    buffer = kv.Shared
    enlarge = buffer._enlarge
    monkeypatch.setattr(buffer, "_enlarge", lambda self, total: (enlarge(self, total), capacities.add(self.capacity)))
    assert [next(following) for _ in range(40)] == greedily(tiny, prompt, 40)
    assert sorted(capacities) == [16, 32, 64]


def test_the_context_is_never_left(tmp_path):
    for kind in ("growing", "shared"):
        engine = Engine.open(write_bundle(tmp_path / kind, kv_cache=kind, context=64), threads=1)
        tiny = random_tiny(vocabulary=engine.manifest.graph.vocabulary, context=64)
        talk = [Turn(("user", "assistant")[n % 2], f"{n} I walk every day and sleep") for n in range(9)]
        stream = answer(engine, talk, max_new_tokens=30)
        assert len(stream.prompt_ids) <= 34
        asked = engine.tokenizer.decode(stream.prompt_ids)
        assert "8 I walk" in asked
        assert "0 I walk" not in asked
        assert list(stream.ids) == greedily(tiny, stream.prompt_ids, 30, stops=engine.chat.stop_ids)
        much = answer(engine, talk[:1], max_new_tokens=1000)
        assert much.finished or len(much.prompt_ids) + len(much.ids) == 64
        with pytest.raises(InputError, match="context 64"):
            engine.logits(list(range(65)))
        assert len(list(engine.follow(IDS))) == 64 - len(IDS) + 1
        with pytest.raises(InputError, match="context of 64"):  # a shared buffer would be written past its end
            engine._new_talk(engine._mix(None), 8).feed([5] * 65)


# Many conversations


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_an_answer_does_not_depend_on_its_batch(engine, options):
    options = {"max_new_tokens": 14, "adapter": "a", **options}
    alone = [engine.generate([chat], seed=[[7, row]], **options)[0] for row, chat in enumerate(CHATS)]
    for batch in (1, 2, 5):
        assert engine.generate(CHATS, seed=7, batch_size=batch, **options) == alone
    assert [engine.generate(CHATS[::-1], seed=[[7, row] for row in (4, 3, 2, 1, 0)], **options)[::-1]] == [alone]
    assert answer(engine, CHATS[0], seed=7, **options).text == alone[0].text
    assert len({made.text for made in alone}) > 3


def test_rows_that_end_early_leave_the_batch(engine, tiny):
    stop = ("e", "a")
    made = engine.generate(CHATS, max_new_tokens=40, stop=stop)
    assert len({m.tokens for m in made}) > 2
    for chat, m in zip(CHATS, made, strict=True):
        alone = answer(engine, chat, max_new_tokens=40, stop=stop)
        assert (alone.text, alone.finished, len(alone.ids)) == (m.text, m.finished, m.tokens)
        assert not any(s in m.text for s in stop)


def test_seeds(engine):
    texts = [answer(engine, CHATS[0], seed=seed, temperature=2.0).text for seed in (0, 1, 2, 0)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


def test_a_prefix_is_put_in_the_models_mouth(engine, tiny):
    made = engine.generate(CHATS[:2], max_new_tokens=6, prefix="[the")
    for chat, m in zip(CHATS, made, strict=False):
        prompt = engine.chat.prompt_ids(chat, 400) + engine.tokenizer("[the", add_special_tokens=False)["input_ids"]
        assert m.text == engine.chat.answer(greedily(tiny, prompt, 6, stops=engine.chat.stop_ids))


def test_a_graph_that_cannot_keep_rows_apart_answers_one_by_one(tmp_path, monkeypatch):
    engine = Engine.open(write_bundle(tmp_path), threads=1)
    expected = engine.generate(CHATS, max_new_tokens=5)
    rows = []
    joined = lane.Lane.joined.__func__
    monkeypatch.setattr(
        lane.Lane,
        "joined",
        classmethod(lambda cls, one, parts, n: rows.append(len(parts)) or joined(cls, one, parts, n)),
    )
    assert engine.generate(CHATS, max_new_tokens=5) == expected
    assert rows == [5]
    graph = engine.manifest.graph.model_copy(update={"position_ids": False})
    engine.manifest = engine.manifest.model_copy(update={"graph": graph})
    assert engine.generate(CHATS, max_new_tokens=5) == expected
    assert rows == [5, 1, 1, 1, 1, 1]


# A chat: what was computed before


def turns(engine, *texts, **options):
    """A chat of the user's texts and the engine's answers; returns the last answer's stream."""
    chat: list[Turn] = []
    for text in texts:
        chat.append(Turn("user", text))
        stream = answer(engine, chat, **options)
        chat.append(Turn("assistant", stream.text))
    return chat, stream


def test_the_next_turn_prefills_only_what_is_new(engine, tiny):
    chat, first = turns(engine, "How are you?")
    assert first.reused == 0
    second = answer(engine, [*chat, Turn("user", "thank you!")])
    assert len(first.prompt_ids) <= second.reused < len(second.prompt_ids)
    assert list(second.ids) == greedily(tiny, second.prompt_ids, 12, stops=engine.chat.stop_ids)
    again = answer(engine, [*chat, Turn("user", "thank you!")])
    assert again.reused == len(again.prompt_ids) - 1
    assert again.ids == second.ids
    other = answer(engine, [Turn("user", "How is the cat?")])
    assert 0 < other.reused < len(other.prompt_ids) - 1
    assert list(other.ids) == greedily(tiny, other.prompt_ids, 12, stops=engine.chat.stop_ids)


def test_after_a_switch_nothing_of_the_old_adapter_is_left(engine, tiny):
    switches = [("a", A(tiny)), (None, None), ("b", B(tiny)), ({"a": 0.5}, scaled(A(tiny), 0.5)), ("a", A(tiny))]
    chat, _ = turns(engine, "How are you?")
    for asked, tensors in switches:
        stream = answer(engine, chat := [*chat, Turn("user", "go on")], adapter=asked)
        assert stream.reused == 0
        assert list(stream.ids) == greedily(tiny, stream.prompt_ids, 12, tensors, engine.chat.stop_ids)
        assert stream.adapter == ({asked: 1.0} if isinstance(asked, str) else dict(asked or {}))
        chat.append(Turn("assistant", stream.text))
    assert answer(engine, [*chat, Turn("user", "go on")], adapter="a").reused > 0


def test_adapters_are_paid_for_from_the_first_that_is_asked_for(tmp_path, monkeypatch):
    import onnx

    bundle = write_bundle(tmp_path / "bundle", kv_cache="shared", last_logits_only=True)
    manifest = bundles.load(bundle)
    tiny = random_tiny(vocabulary=manifest.graph.vocabulary)
    plain = onnx.load(bundle / "model.onnx")
    lora = {name for site in manifest.graph.sites for name in (site.lora_a, site.lora_b)}
    for value in [value for value in plain.graph.input if value.name in lora]:
        plain.graph.input.remove(value)
    onnx.save(plain, bundle / "plain.onnx")
    manifest = manifest.model_copy(update={"graph": manifest.graph.model_copy(update={"plain": "plain.onnx"})})
    bundles.write(bundle, manifest)
    opened, living, failing, whole = [], [], [False, True], providers.open_session

    def opening(file, *rest):
        assert not any(session() for session in living), "the weights would be in memory twice"
        opened.append(file.name)
        if len(opened) == 2 and failing.pop():
            opened.pop()
            raise MemoryError
        found = whole(file, *rest)
        living.append(weakref.ref(found.session))
        return found

    monkeypatch.setattr(providers, "open_session", opening)

    engine = Engine.open(bundle, threads=1)
    engine.load_adapter("a", write_adapter(tmp_path / "a.onnx_adapter", A(tiny)))
    states = engine.hidden_states(IDS[:6], follows=True)
    before = answer(engine, CHATS[0]).ids
    assert opened == ["plain.onnx"]
    with pytest.raises(MemoryError):
        answer(engine, CHATS[0], adapter="a")
    adapted = answer(engine, CHATS[0], adapter="a")
    assert list(adapted.ids) == greedily(tiny, adapted.prompt_ids, 12, A(tiny), engine.chat.stop_ids)
    assert opened == ["plain.onnx", "model.onnx"]
    assert answer(engine, CHATS[0]).ids == before != adapted.ids
    assert np.allclose(engine.hidden_states(IDS, follows=True)[:6], states, atol=1e-5)
    assert opened == ["plain.onnx", "model.onnx"]
    assert lora <= engine.inputs

    living.clear()
    bundles.write(bundle, manifest.model_copy(update={"active": "a"}))
    monkeypatch.setattr("edge_sdss.runtime.adapters.read_entry", None)
    Engine.open(bundle, threads=1)
    assert opened[2:] == ["model.onnx"]


def test_an_adapter_that_is_loaded_anew_is_another(engine, tiny, tmp_path):
    first = answer(engine, CHATS[0], adapter="a")
    changed = random_adapter(tiny, rank=4, seed=9, size=0.3)
    engine.load_adapter("a", write_adapter(tmp_path / "c.onnx_adapter", changed))
    second = answer(engine, CHATS[0], adapter="a")
    assert second.reused == 0
    assert list(second.ids) == greedily(tiny, second.prompt_ids, 12, changed, engine.chat.stop_ids)
    assert first.ids != second.ids


def test_streams_side_by_side(engine):
    expected = [answer(engine, chat).text for chat in CHATS[:2]]
    first, second = (engine.stream(chat, max_new_tokens=12) for chat in CHATS[:2])
    texts = ["", ""]
    for a, b in zip(first, second, strict=False):
        texts = [texts[0] + a, texts[1] + b]
    assert [t == e[: len(t)] for t, e in zip(texts, expected, strict=True)] == [True, True]


def test_a_stream_that_is_left_early(engine, tiny):
    stream = engine.stream(CHATS[0], max_new_tokens=50)
    shown = next(stream)
    stream.close()
    assert stream.text == shown
    assert next(stream, None) is None
    again = answer(engine, CHATS[0])
    assert again.reused > 0
    assert list(again.ids) == greedily(tiny, again.prompt_ids, 12, stops=engine.chat.stop_ids)


def test_a_run_that_failed_leaves_no_trace(engine, tiny, monkeypatch):
    answer(engine, CHATS[0])
    take = kv.Growing.take, kv.Shared.take

    def fail(self, binding):
        raise RuntimeError("out of memory")

    for kind in (kv.Growing, kv.Shared):
        monkeypatch.setattr(kind, "take", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(engine, CHATS[0])
    monkeypatch.setattr(kv.Growing, "take", take[0])
    monkeypatch.setattr(kv.Shared, "take", take[1])
    stream = answer(engine, CHATS[0])
    assert stream.reused == 0
    assert list(stream.ids) == greedily(tiny, stream.prompt_ids, 12, stops=engine.chat.stop_ids)


# Embeddings


def test_an_answer_brings_its_embeddings(engine, tiny):
    stream = engine.stream(CHATS[2], max_new_tokens=8, embeddings=True)
    next(stream)
    assert stream.embeddings.ids == stream.prompt_ids
    list(stream)
    found = stream.embeddings
    kept = stream.ids[:-1] if stream.finished else stream.ids
    assert found.ids == (*stream.prompt_ids, *kept)
    assert found.prompt_tokens == len(stream.prompt_ids)
    assert found.states.dtype == np.float32
    assert np.abs(found.states - reference(tiny, list(found.ids))[1]).max() < 1e-3
    assert engine.tokenizer.decode(found.ids[found.asked]) == "How are you?"
    assert len(found.dialogue()) == found.asked.stop - found.asked.start + len(kept)
    assert engine.stream(CHATS[2], max_new_tokens=8).embeddings is None


def test_embeddings_are_whole_after_reuse_and_tell_their_adapter(engine, tiny):
    chat, _ = turns(engine, "How are you?", adapter="a")
    second = answer(engine, [*chat, Turn("user", "thank you!")], adapter="a", embeddings=True)
    assert second.reused > 0
    assert second.embeddings.adapter == {"a": 1.0}
    assert np.abs(second.embeddings.states - reference(tiny, list(second.embeddings.ids), A(tiny))[1]).max() < 1e-3


def test_token_embeddings_are_of_the_base_model(engine, tiny):
    engine.attach("a")
    text = "I feel happy today <|im_end|>"
    ids = engine.tokenizer("I feel happy today < |im_end|>")["input_ids"]
    found = engine.token_embeddings(text, 100)
    assert found.shape == (len(ids), engine.width)
    assert np.abs(found - reference(tiny, ids)[1]).max() < 1e-3
    assert len(engine.token_embeddings(text, 3)) == 3
    with pytest.raises(InputError, match="it is empty"):
        engine.token_embeddings("", 10)


def test_a_graph_without_hidden_states(tmp_path):
    engine = Engine.open(write_bundle(tmp_path, hidden_states=False), threads=1)
    assert answer(engine, CHATS[0]).embeddings is None
    for ask in (
        lambda: engine.token_embeddings("a", 5),
        lambda: engine.stream(CHATS[0], max_new_tokens=1, embeddings=True),
    ):
        with pytest.raises(InputError, match="gives no hidden states"):
            ask()


def test_a_session_observes_and_synthesises_with_it(shared_bundle, tmp_path):
    engine = Engine.open(shared_bundle, threads=1)
    with Session(tmp_path / "s", Config(), lm=engine) as session:
        decisions = list(session.observe_all([Dialogue(f"what of my cat {n}", "it sleeps") for n in range(3)]))
    assert [d.action for d in decisions] == ["kept"] * 3
    asked = Synthesis(min_rouge1=0, max_rouge1=1, max_new_tokens=8)
    pytest.importorskip("rouge_score")
    made = list(synthesis.synthesise(engine, [Example((Turn("user", "the cat"),), "sat", "1")], asked))
    assert len(made[0]["1"]) == 3


# Measures


def test_losses_are_those_of_the_formulas(engine, tiny):
    examples = [
        Example(chat, text) for chat, text in zip(CHATS, ("Soup.", "Hello! " * 5, "fine", "x", ""), strict=True)
    ]
    for adapter, tensors in ((None, None), ("a", A(tiny))):
        found = engine.nll(examples, adapter=adapter)
        for example, loss in zip(examples, found, strict=True):
            encoded = engine.encode(example, 512)
            scores = reference(tiny, encoded.ids, tensors)[0]
            chances = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
            own = [-chances[at - 1, encoded.ids[at]] for at in range(encoded.prompt_tokens, len(encoded.ids))]
            assert loss == pytest.approx(np.mean(own), rel=1e-4)
    ids = engine.tokenizer("How are you?")["input_ids"]
    scores = reference(tiny, ids)[0]
    chances = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = -np.mean([chances[i, ids[i + 1]] for i in range(len(ids) - 1)])
    assert engine.text_nll("How are you?", None) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError, match="0 token"):
        engine.text_nll("")


# Adapters that would do nothing


def test_an_adapter_that_would_be_inactive_is_refused(engine, tiny, tmp_path):
    whole = A(tiny)
    name = "lora.0.q_proj"
    faults = {
        "has no input lora.0.Q.A": {"lora.0.Q.A" if n == f"{name}.A" else n: t for n, t in whole.items()},
        "holds only lora.0.q_proj.A": {n: t for n, t in whole.items() if n != f"{name}.B"},
        "every B is zero": {n: t * 0 if n.endswith("B") else t for n, t in whole.items()},
        r"has the shape \[64, 4\], not \[64, 3\]|shape \[4, 64\], not \[3, 64\]": {
            **whole,
            f"{name}.A": whole[f"{name}.A"][:, :3],
        },
        "not finite": {**whole, f"{name}.B": whole[f"{name}.B"] * np.nan},
    }
    for says, tensors in faults.items():
        with pytest.raises(InputError, match=f"adapter inactive: .*({says})"):
            engine.load_adapter("c", write_adapter(tmp_path / "c.onnx_adapter", tensors))
    with pytest.raises(InputError, match="another base"):
        engine.load_adapter("c", write_adapter(tmp_path / "c.onnx_adapter", whole, fingerprint="c" * 64))
    (tmp_path / "d.onnx_adapter").write_bytes(b"not an adapter" * 99)
    for file in ("d.onnx_adapter", "missing.onnx_adapter"):
        with pytest.raises(InputError, match=file):
            engine.load_adapter("c", tmp_path / file)
    assert set(engine.adapters) == {"a", "b"}


def test_an_adapter_that_is_not_there(engine):
    for asked in ("c", {"a": 1, "c": 1}):
        with pytest.raises(InputError, match="use adapter c: there are a, b"):
            engine.stream(CHATS[0], max_new_tokens=1, adapter=asked)
        with pytest.raises(InputError, match="use adapter c"):
            engine.attach(asked)
    with pytest.raises(InputError, match="scale is nan"):
        engine.logits(IDS, {"a": float("nan")})
    engine.unload_adapter("b")
    engine.unload_adapter("b")
    with pytest.raises(InputError, match="use adapter b: there are a"):
        engine.logits(IDS, "b")


def test_the_active_adapter(engine):
    assert engine.active is None
    engine.attach("a")
    assert np.array_equal(engine.logits(IDS), engine.logits(IDS, "a"))
    assert answer(engine, CHATS[0], adapter=ACTIVE).adapter == {"a": 1.0}
    assert answer(engine, CHATS[0], adapter=None).adapter == {}
    engine.attach({"a": 0.5, "b": 1})
    assert np.array_equal(engine.logits(IDS), engine.logits(IDS, {"a": 0.5, "b": 1}))
    assert not np.array_equal(engine.logits(IDS), engine.logits(IDS, None))


def test_a_bundles_own_adapters(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    tiny = random_tiny(vocabulary=bundles.load(folder).graph.vocabulary)
    file = write_adapter(folder / "adapters" / "mine.onnx_adapter", A(tiny))
    ours = bundles.load(folder)
    mine = AdapterEntry(
        name="mine",
        file=bundles.entry(folder, "adapters/mine.onnx_adapter"),
        rank=4,
        scale=1.0,
        base_fingerprint=ours.base_fingerprint,
        source_sha256="0" * 64,
    )
    bundles.write(folder, ours.model_copy(update={"adapters": (mine,), "active": "mine"}))
    engine = Engine.open(folder, threads=1)
    assert np.abs(engine.logits(IDS) - reference(tiny, IDS, A(tiny))[0]).max() < 1e-3
    assert (engine.adapters["mine"].rank, engine.adapters["mine"].size_bytes) == (
        4,
        sum(t.nbytes for t in A(tiny).values()),
    )
    write_adapter(file, B(tiny))
    with pytest.raises(InputError, match="not the file that was exported"):
        Engine.open(folder)
    other = mine.model_copy(
        update={"base_fingerprint": "c" * 64, "file": bundles.entry(folder, "adapters/mine.onnx_adapter")}
    )
    bundles.write(folder, ours.model_copy(update={"adapters": (other,)}))
    with pytest.raises(InputError, match="trained on the model cccccccccccc"):
        Engine.open(folder)


# Opening


def test_facts(engine):
    assert (engine.name, engine.width, engine.context, engine.device.type) == ("tiny", 64, 512, "cpu")
    assert engine.fingerprint == "b" * 64
    assert (engine.provider, engine.provider_reason) == ("cpu", "recipe onnxruntime-cpu")


def test_a_broken_bundle(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match=r"manifest\.json"):
        Engine.open(tmp_path)
    ours = bundles.load(folder)
    (folder / "model.onnx").rename(folder / "other.onnx")
    with pytest.raises(InputError, match="there is no such file"):
        Engine.open(folder)
    (folder / "model.onnx").write_bytes(b"\x08\x09")
    with pytest.raises(InputError, match="open graph"):
        Engine.open(folder)
    (folder / "other.onnx").replace(folder / "model.onnx")
    site = ours.graph.sites[0].model_copy(update={"lora_a": "lora.9.A"})
    bundles.write(folder, ours.model_copy(update={"graph": ours.graph.model_copy(update={"sites": (site,)})}))
    with pytest.raises(InputError, match=r"has no lora\.9\.A"):
        Engine.open(folder)
    bundles.write(folder, ours)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Engine.open(folder)


def test_a_provider_that_is_not_there(shared_bundle, monkeypatch):
    with pytest.raises(ConfigError, match="there are cpu, cuda"):
        Engine.open(shared_bundle, provider="abacus")
    for key in ("tensorrt", "coreml", "qnn"):
        if providers.PROVIDERS[key].name in ort.get_available_providers():
            continue
        with pytest.raises(BackendUnavailable, match=f"provider {key}: .*pip install onnxruntime"):
            Engine.open(shared_bundle, provider=key)
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(BackendUnavailable, match="onnxruntime-gpu"):
            Engine.open(shared_bundle, provider="cuda")
        listed = [*ort.get_available_providers(), "CUDAExecutionProvider"]
        monkeypatch.setattr(ort, "get_available_providers", lambda: listed)
        with pytest.raises(BackendUnavailable, match="onnxruntime-gpu"):  # it falls back, with a warning at most
            Engine.open(shared_bundle, provider="cuda")


def test_auto_says_what_it_took(tmp_path):
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("there is a GPU")
    folder = write_bundle(tmp_path, recipe="jetson-orin-jp6")
    engine = Engine.open(folder, threads=1)
    assert engine.provider == "cpu"
    assert "run on provider cuda" in engine.provider_reason


def test_the_provider_of_a_recipe():
    recipes = ("onnxruntime-cpu", "jetson-thor", "qnn-htp", "coreml", "tensorrt", "anything")
    assert [providers.of_recipe(r) for r in recipes] == ["cpu", "cuda", "qnn", "coreml", "tensorrt", "cpu"]


def test_defaults_of_the_models_makers(tmp_path):
    folder = write_bundle(tmp_path)
    assert Engine.open(folder).defaults.temperature == 0
    says = '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "eos_token_id": [5, 7]}'
    (folder / "generation_config.json").write_text(says)
    engine = Engine.open(folder)
    assert dataclasses.astuple(engine.defaults) == (0.6, 0.9, 40, 1.0)
    assert {5, 7} <= engine.chat.stop_ids
    ours = bundles.load(folder).model_copy(update={"stop_ids": (9,)})
    bundles.write(folder, ours)
    assert not {5, 7} & Engine.open(folder).chat.stop_ids


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"repetition_penalty": 0},
     {"max_new_tokens": 0}, {"stop": ("",)}],
)  # fmt: skip
def test_settings_out_of_range(shared_bundle, wrong):
    engine = Engine.open(shared_bundle, threads=1)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        engine.stream(CHATS[0], **{"max_new_tokens": 2, **wrong})


def test_neither_torch_nor_transformers(shared_bundle):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from edge_sdss.runtime import Engine\n"
        "from edge_sdss.types import Turn\n"
        "print(len(list(Engine.open(Path(sys.argv[1]), threads=1).stream([Turn('user', 'Hi')], max_new_tokens=3))))\n"
        "assert not {'torch', 'transformers', 'peft', 'onnx', 'scipy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(shared_bundle)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
