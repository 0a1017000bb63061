"""What the documents say of the repository is true: links, targets of make, verbs, decisions."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").rglob("*.md"),
        *(REPOSITORY / "edge_sdss").rglob("*.md"),
    ]
)
DECISIONS = sorted((REPOSITORY / "docs" / "adr").glob("[0-9]*.md"))


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def anchor(heading: str) -> str:
    """The fragment that a heading of Markdown is linked by."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(document: Path) -> list[str]:
    """Relative links whose file, or whose heading in a document, does not exist."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    broken = []
    for link in re.findall(r"\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, fragment = link.partition("#")
        target = document.parent / file if file else document
        if not target.exists():
            broken.append(link)
        elif fragment and target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M)
            broken += [] if fragment in map(anchor, headings) else [link]
    return broken


def code(text: str) -> str:
    """All code of a document, inline and in blocks."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.S | re.M)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return "\n".join([*blocks, *inline])


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Add a `policy`, now\n", encoding="utf-8")
    text = (
        "# Own\n[a](other.md) [b](gone.md) [c](other.md#add-a-policy-now) [d](other.md#gone)\n"
        "[e](#own) [f](#x) [g](https://example.org/gone)\n```\n[h](in-code.md)\n```\n"
    )
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    assert broken_links(tmp_path / "a.md") == ["gone.md", "other.md#gone", "#x"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_make_target_named_exists(document: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    named = re.findall(r"^(?:\$ )?make ([a-z-]+)", code(document.read_text(encoding="utf-8")), flags=re.M)
    assert set(named) <= targets


def test_make_help_lists_every_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    listed = re.findall(r"^([a-z-]+):.*## \S", makefile, flags=re.M)
    phony = re.search(r"^\.PHONY: (.+)$", makefile, flags=re.M)
    assert phony is not None
    assert sorted(listed) == sorted(phony[1].split())


@pytest.mark.skipif(importlib.util.find_spec("edge_sdss.cli") is None, reason="no command line yet")
def test_the_documents_name_every_verb_and_no_other() -> None:
    from typer.main import get_command

    from edge_sdss import cli

    verbs = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    named = set(re.findall(r"\bedge-sdss ([a-z][a-z-]*)\b", code(text)))
    assert verbs - named == set(), "verbs that no document shows"
    assert named - verbs == set(), "verbs in the documents that do not exist"


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("decision", DECISIONS, ids=name)
def test_a_decision_has_the_sections_of_the_template(decision: Path) -> None:
    def sections(path: Path) -> list[str]:
        return re.findall(r"^## (.+)$", path.read_text(encoding="utf-8"), flags=re.M)

    # What was decided against may stand under Context, beside its figures.
    required = [s for s in sections(decision.parent / "template.md") if s != "Alternatives"]
    assert [s for s in sections(decision) if s != "Alternatives"] == required
    assert decision.read_text(encoding="utf-8").startswith(f"# {int(decision.name[:4])}. ")


def test_the_changelog_opens_with_what_is_unreleased_and_knows_the_version() -> None:
    import edge_sdss

    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?([\w.]+)\]?", text, flags=re.M)
    assert versions[0] == "Unreleased"
    assert versions[1:2] in ([], [edge_sdss.__version__])
