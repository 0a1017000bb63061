"""Tokenizer, chat template, sampling and text pieces of the runtime, against transformers where it is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from tiny import TEMPLATE, TEXT

from edge_sdss import default_model
from edge_sdss.errors import ConfigError, InputError
from edge_sdss.lm.chat import Chat
from edge_sdss.runtime.chat import Tokenizer
from edge_sdss.runtime.sampling import Sampling, choose, distribution, penalised
from edge_sdss.runtime.writer import Pieces
from edge_sdss.types import Turn

TEMPLATES = {
    "chatml": TEMPLATE,
    "trimmed blocks": """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}
S: {{ m['content'] | trim }}
    {%- else %}
  {{ m.role[0] | upper }}: {{ m.content }}{{ eos_token }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
A:
{%- endif %}
""",
    "json": "{% for m in messages %}{{ m | tojson }}\n{{ m.content | tojson(indent=1) }}{% endfor %}{{ tools }}",
    "loops": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index0 }}{{ m.content }}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{{ messages[1:] | length }}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m['content'] }}"
        "{% endfor %}{{ pad_token if pad_token is defined else 'none' }}{{ unk_token is defined }}"
    ),
}
CHATS = [
    [{"role": "user", "content": 'What should I cook? <b>&"ä" 🙂\n'}],
    [{"role": "system", "content": " Answer. "}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "I feel happy"},
        {"role": "assistant", "content": "thank you!"},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from bundles_fixture import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder)


def with_template(folder: Path, out: Path, template: str | None) -> Path:
    out.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_text((folder / name).read_text())
    if template is not None:
        (out / "chat_template.jinja").write_text(template)
    return out


# The template


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(folder, tmp_path, name):
    pytest.importorskip("transformers")
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(with_template(folder, tmp_path / "t", TEMPLATES[name]))
    ours = Tokenizer(tmp_path / "t")
    for chat in CHATS:
        for ask in (False, True):
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
            assert ours.apply_chat_template(chat, add_generation_prompt=ask) == text
            ids = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=ask)
            assert ours(text, add_special_tokens=False)["input_ids"] == list(ids)


def test_the_default_models_chat_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    try:
        folder = default_model.path(lambda *_: None)
    except Exception:
        pytest.skip("the default model is not here")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder)
    for chat in CHATS:
        ids = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        text = ours.apply_chat_template(chat, add_generation_prompt=True)
        assert ours(text, add_special_tokens=False)["input_ids"] == list(ids)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.eos_token_id == theirs.eos_token_id
    same_chats(Chat(theirs, [2]), Chat(ours, [2]))


def same_chats(theirs: Chat, ours: Chat) -> None:
    talk = [Turn(c["role"], c["content"]) for c in (*CHATS[1], *CHATS[2])]
    texts = [TEXT, "<|im_end|> a 🙂 ä", "", " x"]
    for n in (12, 20, 33, 400):
        for turns in (talk, talk[:1], [Turn("user", TEXT)]):
            assert ours.prompt_ids(turns, n) == theirs.prompt_ids(turns, n)
    for text in texts:
        ids = theirs.tokenizer(text)["input_ids"]
        assert ours.plain(text) == theirs.plain(text)
        assert ours.tokenizer(text)["input_ids"] == ids
        assert ours.answer(ids) == theirs.answer(ids)
        for n in (1, 2, 5, 1000):
            options = {"truncation": True, "max_length": n, "return_special_tokens_mask": True}
            cut = theirs.tokenizer(text, **options)
            rows = [i for i, special in enumerate(cut["special_tokens_mask"]) if not special]
            assert ours.tokenizer.cut(text, n) == (cut["input_ids"], rows)
    assert ours.end_of_turn == theirs.end_of_turn


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("bos", [False, True])
def test_chat_gives_the_same_ids_with_either_tokenizer(folder, tmp_path, template, bos):
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    out = with_template(folder, tmp_path / "t", template)
    if bos:
        backend = Backend.from_file(str(out / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", backend.token_to_id("<|im_start|>"))]
        )
        backend.enable_truncation(7)  # left in the file by whoever made it
        backend.save(str(out / "tokenizer.json"))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(out), Tokenizer(out)
    same_chats(Chat(theirs, []), Chat(ours, []))


def test_what_a_config_may_say(folder, tmp_path):
    out = with_template(folder, tmp_path / "t", None)
    says = {
        "eos_token": {"content": "<|im_end|>", "special": True},
        "bos_token": None,
        "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ eos_token }}!"}],
        "added_tokens_decoder": {"9999": {"content": "<|new|>", "special": True, "lstrip": False}},
    }
    (out / "tokenizer_config.json").write_text(json.dumps(says))
    tokenizer = Tokenizer(out)
    assert tokenizer.apply_chat_template([]) == "<|im_end|>!"
    assert "bos_token" not in tokenizer.special_tokens
    assert len(tokenizer("a<|new|>")["input_ids"]) == 2
    assert Chat(tokenizer, []).plain("<|new|>") == "< |new|>"
    (out / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        Tokenizer(out)


def test_a_template_that_refuses(folder, tmp_path):
    out = with_template(folder, tmp_path / "t", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"refuses the roles user \(roles must alternate\)"):
        Chat(Tokenizer(out), []).prompt_ids([Turn("user", "a")], 100)


def test_a_template_cannot_reach_out(folder, tmp_path):
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% include 'x' %}"):
        out = with_template(folder, tmp_path / "t", source)
        with pytest.raises(InputError, match="chat template refuses"):
            Chat(Tokenizer(out), []).prompt_ids([Turn("user", "a")], 100)


# Pieces of text


def pieces_of(ids, decode, stop=(), strip=False):
    """The shown pieces and how many tokens were taken."""
    pieces, shown = Pieces(decode, stop, strip=strip), []
    for taken, token in enumerate(ids, start=1):
        shown.append(pieces.push(token))
        if pieces.stopped:
            return shown, taken
    return [*shown, pieces.end()], len(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_are_the_text_of_the_answer(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, 390), max_size=30))
    shown, _ = pieces_of(ids, lambda some: tokenizer.decode(some, skip_special_tokens=True))
    assert "".join(shown) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20))
def test_no_half_characters(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown, _ = pieces_of(ids, lambda some: tokenizer.decode(some, skip_special_tokens=False))
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)


def test_a_decoder_that_falls_back_to_bytes():
    """Such a decoder turns a whole run of bytes into signs of replacement until the last one is there."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocabulary = {"<unk>": 0, "▁a": 1, **{f"<0x{n:02X}>": 2 + n for n in range(256)}}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    ids = [1, *(2 + byte for byte in "é🙂€".encode()), 1]
    shown, _ = pieces_of(ids, lambda some: backend.decode(list(some)))
    assert "".join(shown) == "aé🙂€ a"
    assert "🙂" in "".join(shown[:8])


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab c", max_size=30),
    stop=st.lists(st.text("ab c", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=30),
    strip=st.booleans(),
)
def test_stop_strings(text, stop, cuts, strip):
    """As if after each token the whole text so far were looked through."""
    tokens, at = [], 0
    for cut in [*cuts, *[1] * len(text)]:
        if text[at : at + cut]:
            tokens.append(text[at : at + cut])
        at += cut
    shown, taken = pieces_of(range(len(tokens)), lambda ids: "".join(tokens[i] for i in ids), stop, strip)
    expected, used = text.lstrip(" ") if strip else text, len(tokens)
    for n in range(1, len(tokens) + 1):
        so_far = "".join(tokens[:n])
        so_far = so_far.lstrip(" ") if strip else so_far
        if ends := [at for at in map(so_far.find, stop) if at >= 0]:
            expected, used = so_far[: min(ends)], n
            break
    assert "".join(shown) == expected
    assert taken == used
    assert all(expected.startswith("".join(shown[:n])) for n in range(len(shown)))


def test_text_is_not_held_back_for_longer_than_it_must():
    tokens = ["see", " US", "ER", "S and", " US", "ER:", "x"]
    shown, taken = pieces_of(range(7), lambda ids: "".join(tokens[i] for i in ids), ["USER:"])
    assert shown == ["see", " ", "", "USERS and", " ", ""]
    assert taken == 6


# Sampling


def by_the_book(logits, how, seen):
    """Probabilities by sorting the whole vocabulary, float64."""
    scores = logits.astype(np.float64)
    for token in set(seen):
        scores[token] *= how.repetition_penalty if scores[token] < 0 else 1 / how.repetition_penalty
    scores /= how.temperature
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    order = order[: how.top_k or len(order)]
    chances = np.exp(scores[order] - scores.max())
    chances /= chances.sum()
    mass, kept = 0.0, 0
    while kept < len(order) and mass < how.top_p:
        mass += chances[kept]
        kept += 1
    found = np.zeros(len(scores))
    found[order[:kept]] = chances[:kept] / chances[:kept].sum()
    return found


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([2, 7, 300, 1000]),
    temperature=st.floats(0.2, 4),
    top_p=st.floats(0.05, 1),
    top_k=st.integers(0, 40),
    penalty=st.floats(0.5, 2),
)
def test_chances_are_those_of_the_formulas(seed, size, temperature, top_p, top_k, penalty):
    draws = np.random.default_rng(seed)
    logits = draws.normal(0, 3, size).astype(np.float32)
    seen = {int(token) for token in draws.integers(0, size, 5)}
    how = Sampling(temperature, top_p, top_k, penalty)
    tokens, weights = distribution(penalised(logits, seen, penalty), how)
    found = np.zeros(size)
    found[tokens] = weights / weights.sum(dtype=np.float64)
    expected = by_the_book(logits, how, seen)
    assert np.abs(found - expected).max() < 1e-4 or abs(np.cumsum(np.sort(expected)[::-1]) - top_p).min() < 1e-5
    assert (np.diff(tokens) > 0).all()


def test_every_draw_finds_its_token():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    drawn = [choose(logits, Sampling(1.0), (), (n + 0.5) / 1000) for n in range(1000)]
    assert np.bincount(drawn, minlength=4).tolist() == [100, 400, 200, 300]
    assert drawn == sorted(drawn)
    for how, counts in (
        (Sampling(1.0, top_p=0.6), [0, 571, 0, 429]),
        (Sampling(1.0, top_k=3), [0, 444, 222, 334]),
        (Sampling(1.0, top_k=1), [0, 1000, 0, 0]),
        (Sampling(0.5), [33, 534, 133, 300]),
    ):
        found = np.bincount([choose(logits, how, (), (n + 0.5) / 1000) for n in range(1000)], minlength=4)
        assert np.abs(found - counts).max() <= 1
    assert choose(logits, Sampling(), (), 0.0) == 1
    assert choose(logits + 5, Sampling(repetition_penalty=3.0), {1}, 0.0) == 3
    assert choose(logits, Sampling(1.0), (), np.nextafter(1, 0)) == 3


def test_the_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)
    seen = [3, 9, 9, 40]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), torch.tensor(logits[None].copy()))
    before = logits.copy()
    assert np.allclose(penalised(logits, set(seen), 1.3), theirs[0].numpy())
    assert np.array_equal(logits, before)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"set top_p: it is 1\.5"):
        Sampling(1.0, 1.5)


# Against the language model


def test_engine_and_language_model_agree(tiny, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from bundles_fixture import hf_tiny, write_bundle

    from edge_sdss import config
    from edge_sdss.lm import LanguageModel
    from edge_sdss.runtime import Engine
    from edge_sdss.types import Example

    lm = LanguageModel.load(config.Model(name=str(tiny), device="cpu"))
    chats = [[Turn(c["role"], c["content"]) for c in chat] for chat in CHATS]
    examples = [Example(tuple(chat), text) for chat, text in zip(chats, ("Soup.", "of course", ""), strict=True)]
    for kind in ("growing", "shared"):
        folder = write_bundle(tmp_path / kind, tiny=hf_tiny(tiny), tokenizer=tiny, kv_cache=kind)
        engine = Engine.open(folder, threads=1)
        for options in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}, {"prefix": "[", "stop": ("e", "]")}):
            options["max_new_tokens"] = 20
            assert engine.generate(chats, **options) == lm.generate(chats, **options)
        prompt = lm.chat.prompt_ids(chats[0], 100)
        following, expected = engine.follow(prompt), lm.follow(prompt)
        assert [next(following) for _ in range(9)] == [next(expected) for _ in range(9)]
        assert engine.nll(examples) == pytest.approx(lm.nll(examples, max_tokens=512, batch_size=2), rel=1e-4)
        assert engine.text_nll(TEXT) == pytest.approx(lm.text_nll(TEXT), rel=1e-4)
        theirs = lm.token_embeddings(TEXT, 30).numpy()
        assert np.abs(engine.token_embeddings(TEXT, 30) - theirs).max() < 1e-4
        assert (engine.width, engine.context) == (lm.width, lm.context)
        assert [engine.encode(e, 40) for e in examples] == [lm.encode(e, 40) for e in examples]
