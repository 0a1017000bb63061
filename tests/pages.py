"""What tests of the HTML reports share: a page as a reader's program sees it, and records with a value changed."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any, TypeVar

from pydantic import BaseModel

Record = TypeVar("Record", bound=BaseModel)


class Outline(HTMLParser):
    """The tags, attributes and visible text of a page; fails where tags are not closed in order."""

    VOID = frozenset({"meta", "br", "col", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def changed(record: Record, **changes: Any) -> Record:
    """A copy in which a/0/b=value replaces record.a[0].b, validated anew."""
    value = record.model_dump(mode="json")
    for path, new in changes.items():
        *outer, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        inside: Any = value
        for key in outer:
            inside = inside[key]
        inside[last] = new
    return type(record).model_validate(value)
