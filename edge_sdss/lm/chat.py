"""Turns and answers to token ids, by the tokenizer's chat template. Knows nothing of the model's weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edge_sdss.errors import InputError, message
from edge_sdss.types import Example, Turn

_MARK = "answer"


@dataclass(frozen=True)
class Encoded:
    """Token ids of an example: the prompt in its template, the answer, the end-of-turn token."""

    ids: list[int]
    prompt_tokens: int


class Chat:
    """The format in which a model reads a conversation.

    Special tokens inside a text are broken up by a space ("<|im_end|>" to "< |im_end|>"), so that no text
    can end a turn or open a new one. A system prompt that the template adds by itself is kept: the model
    was trained with it. A tokenizer without a template gets lines of "User: ...", "Assistant: ...".
    """

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int | None]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(i for i in (*stop_ids, tokenizer.eos_token_id) if i is not None)
        self._template = bool(tokenizer.chat_template)
        if not self.stop_ids:
            do = "set eos_token in its tokenizer_config.json"
            raise InputError(message("use this tokenizer", "it has no end-of-text token", do))

    def plain(self, text: str) -> str:
        """Returns the text with every special token in it broken up."""
        if self._special is None:
            return text
        return self._special.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)

    def prompt_ids(self, messages: Sequence[Turn], max_tokens: int) -> list[int]:
        """Returns the ids that ask for an answer, at most `max_tokens`; they end where the answer begins.

        Where they are more, the oldest turns go first (a system turn last), then the front of the last
        turn's text. Raises InputError where the template does not take such turns.
        """
        if not messages:
            raise InputError(message("ask the model", "there are no turns", "give a prompt"))
        turns = list(messages)
        while len(ids := self._ids(self._render(turns))) > max_tokens and len(turns) > 1:
            del turns[next((i for i, turn in enumerate(turns[:-1]) if turn.role != "system"), 0)]
        if len(ids) > max_tokens:
            last = turns[-1]
            text = self.tokenizer(last.text, add_special_tokens=False)["input_ids"]
            kept = self.tokenizer.decode(text[len(ids) - max_tokens :]).lstrip("\ufffd")
            ids = self._ids(self._render([Turn(last.role, kept)]))
        return ids[-max_tokens:]

    def encode(self, example: Example, max_tokens: int) -> Encoded:
        """Returns prompt, answer and end of turn as ids, at most `max_tokens`.

        Where they are more, the prompt is cut first (see `prompt_ids`) but keeps a quarter of the room;
        then the answer loses its end, and with it the end of turn: a cut answer must not teach to stop.
        """
        text = self.plain(example.answer if self._template else f" {example.answer}")
        answer = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_of_turn]
        prompt = self.prompt_ids(example.messages, max(max_tokens - len(answer), max_tokens // 4, 1))
        return Encoded(prompt + answer[: max(max_tokens - len(prompt), 1)], len(prompt))

    def answer(self, ids: Sequence[int]) -> str:
        """Returns the text of generated ids, special tokens left out."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if self._template else text.lstrip(" ")

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends an answer: the stop token that the template puts there, else EOS."""
        if self._template:
            rendered = self._render([Turn("user", _MARK), Turn("assistant", _MARK)], ask=False)
            for token in self._ids(rendered.rpartition(_MARK)[2]):
                if token in self.stop_ids:
                    return token
        eos = self.tokenizer.eos_token_id
        return min(self.stop_ids) if eos is None else int(eos)

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = sorted((re.escape(token.content) for token in added if token.special), reverse=True)
        return re.compile("|".join(tokens)) if tokens else None

    def _render(self, turns: Sequence[Turn], *, ask: bool = True) -> str:
        if not self._template:
            lines = [f"{turn.role.capitalize()}: {self.plain(turn.text)}" for turn in turns]
            return "\n".join([*lines, "Assistant:"] if ask else lines)
        from jinja2 import TemplateError

        chat = [{"role": turn.role, "content": self.plain(turn.text)} for turn in turns]
        try:
            text: str = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in turns)
            found = f"its chat template refuses the roles {roles} ({error})"
            raise InputError(message("ask the model", found, "give turns that it takes")) from error
        return text

    def _ids(self, text: str) -> list[int]:
        """A template writes its own BOS; for plain lines the tokenizer adds what it adds, an EOS excepted."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self._template)["input_ids"]
        while ids and not self._template and ids[-1] in self.stop_ids:
            ids.pop()
        return ids
