"""A bundle's tokenizer and chat template, by the tokenizers library and Jinja alone.

`Tokenizer` has what `lm.chat.Chat` asks of a transformers tokenizer, so that both give the same ids. Knows nothing
of the graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from edge_sdss.errors import BackendUnavailable, InputError, message
from edge_sdss.lm.chat import Chat

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """tokenizer.json with what tokenizer_config.json and chat_template.jinja say of it.

    `chat_template` is the Jinja source, None where there is none; `special_tokens` maps names such as bos_token
    to tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Raises InputError where a file is absent or broken, BackendUnavailable without the tokenizers library."""
        try:
            from tokenizers import AddedToken
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            found = f"the package {error.name} is not installed"
            do = "run `pip install onnxruntime tokenizers`"
            raise BackendUnavailable(message("run a bundle", found, do)) from error
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(message(f"open bundle {folder}", "there is no tokenizer.json in it", "export it anew"))
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise InputError(message(f"read {file}", str(error).rstrip("."), "export the bundle anew")) from error
        self._backend.no_truncation()
        self._backend.no_padding()
        settings = read_json(folder / "tokenizer_config.json")
        self.special_tokens = _special(settings) or _special(read_json(folder / "special_tokens_map.json"))
        known = {token.content for token in self.added_tokens_decoder.values()}
        entries = settings.get("added_tokens_decoder", {})
        for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
            if entry["content"] not in known:
                flags = {key: bool(value) for key, value in entry.items() if key != "content"}
                self._backend.add_tokens([AddedToken(entry["content"], **flags)])
        self.chat_template = _template(folder, settings)
        self.eos_token_id: int | None = self._backend.token_to_id(self.special_tokens.get("eos_token", ""))

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Returns {"input_ids": ids}."""
        return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Returns the text of ids; spaces are never cleaned up."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The added tokens by id, each with `content` and `special`."""
        tokens: Mapping[int, Any] = self._backend.get_added_tokens_decoder()
        return tokens

    def cut(self, text: str, max_tokens: int) -> tuple[list[int], list[int]]:
        """Returns at most `max_tokens` ids and the rows of them that are of the text itself, not put around it."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        encoding.truncate(max(max_tokens - self._backend.num_special_tokens_to_add(False), 0))
        encoding = self._backend.post_process(encoding, None, True)
        return encoding.ids, [row for row, special in enumerate(encoding.special_tokens_mask) if not special]

    def apply_chat_template(
        self, chat: Sequence[Mapping[str, str]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """Returns the text of a conversation. Raises jinja2.TemplateError where the template refuses it."""
        from jinja2 import TemplateError

        given = {"messages": list(chat), "tools": None, "documents": None, **self.special_tokens}
        try:
            text: str = self._compiled.render(**given, add_generation_prompt=add_generation_prompt)
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # of the template's own expressions
            raise TemplateError(str(error)) from error
        return text

    @cached_property
    def _compiled(self) -> Any:
        """The template as chat templates are defined: sandboxed, blocks trimmed, with these functions and filters."""
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %} marks what an assistant writes; it is shown as it is."""

            tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

            def parse(self, parser: Any) -> list[nodes.Node]:
                next(parser.stream)
                body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return body

        def raise_exception(text: str) -> NoReturn:
            raise TemplateError(text)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.chat_template or "")


def rows_of(text: str, prompt: Sequence[int], chat: Chat) -> slice:
    """Returns the rows of a turn's text in a prompt: the last place where its tokens stand; else all rows."""
    ids = chat.tokenizer(chat.plain(text).strip(), add_special_tokens=False)["input_ids"]
    for own in (ids, ids[1:]):  # its first token may be another one behind a newline
        for start in range(len(prompt) - len(own), -1, -1):
            if own and list(prompt[start : start + len(own)]) == own:
                return slice(start, start + len(own))
    return slice(0, len(prompt))


def read_json(file: Path) -> dict[str, Any]:
    """Returns what a JSON file of a bundle holds, {} where it is absent. Raises InputError where it is broken."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(message(f"read {file}", str(error), "export the bundle anew")) from error
    return value if isinstance(value, dict) else {}


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is: Jinja's own filter would write HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _special(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _NAMES:
        value = settings.get(name)
        if value is not None:
            found[name] = value["content"] if isinstance(value, dict) else value
    if several := settings.get("additional_special_tokens"):
        found["additional_special_tokens"] = [v["content"] if isinstance(v, dict) else v for v in several]
    return found


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template or None
