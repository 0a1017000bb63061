"""What the HTML reports share: templates, number formats, style, drawings. Knows no report.

A page needs nothing else: no script, no other file, no network. Every text of a record is escaped.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from edge_sdss.errors import BackendUnavailable, message
from edge_sdss.page import formats


def render(template: str, svg: dict[str, str], **values: Any) -> str:
    """Returns the page that `template`, a file below the package, makes of `values` and the drawings `svg`.

    Raises BackendUnavailable where jinja2 is missing.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        found = "jinja2 is not installed"
        raise BackendUnavailable(message("write report.html", found, "pip install 'edge_sdss[train]'")) from error
    pages = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FunctionLoader(_text),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update({name: getattr(formats, name) for name in formats.__all__})
    drawings = {name: Markup(drawing) for name, drawing in svg.items()}
    return pages.get_template(template).render(css=Markup(_text("page/style.css")), svg=drawings, **values)


def _text(name: str) -> str:
    return files("edge_sdss").joinpath(name).read_text(encoding="utf-8")
