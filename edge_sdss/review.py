"""The review at a terminal: shows one kept dialogue at a time and takes the user's answer."""

from __future__ import annotations

import os
import sys

import click
import typer

from edge_sdss import console
from edge_sdss.errors import InputError, message
from edge_sdss.session import Session
from edge_sdss.types import Annotation, Exemplar

QUESTION = "Was that right? [a]ccept, [e]dit, [s]kip, [f]orget, [q]uit"


def ask(session: Session) -> None:
    """Asks about what is pending today. Raises InputError where nobody sits at the terminal."""
    pending = session.pending()
    if not pending:
        console.note("Nothing to review today.")
        return
    if not sys.stdin.isatty():
        do = "run it in a terminal, or answer with `edge-sdss review ID --accept`"
        raise InputError(message("review", "stdin is no terminal", do))
    for number, exemplar in enumerate(pending, start=1):
        _show(exemplar, f"{number} of {len(pending)}")
        answer = ""
        while answer not in tuple("aesfq"):
            answer = typer.prompt(QUESTION, err=True).strip().lower()
        if answer == "q":
            return
        _apply(session, exemplar, answer)


def _show(exemplar: Exemplar, title: str) -> None:
    d = exemplar.dialogue
    turns = [f"{turn.role}: {turn.text}" for turn in d.messages]
    console.panel(f"{title}, {exemplar.domain}, {d.id}", "\n".join([*turns, f"assistant: {d.response or '(none)'}"]))


def _apply(session: Session, exemplar: Exemplar, answer: str) -> None:
    dialogue = exemplar.dialogue
    if answer == "f":
        session.forget(dialogue.id)
    elif answer == "e":
        session.annotate(dialogue.id, Annotation("edit", _edited(dialogue.response)))
    else:
        session.annotate(dialogue.id, Annotation("accept" if answer == "a" else "skip"))


def _edited(response: str) -> str:
    """The preferred response, from $EDITOR where there is one, else from one line."""
    if os.environ.get("VISUAL") or os.environ.get("EDITOR"):
        return (click.edit(response) or "").strip()
    text: str = typer.prompt("It should have been", err=True)
    return text.strip()
