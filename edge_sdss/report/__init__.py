"""The report of a run: `report.json` for programs, `report.html` for people.

Knows nothing of how the figures came about; whoever runs the stages fills in the records of `schema`.
"""

from __future__ import annotations

from edge_sdss.report.files import load, write
from edge_sdss.report.html import headline, render
from edge_sdss.report.schema import RunReport, json_schema, thin

__all__ = ["RunReport", "headline", "json_schema", "load", "render", "thin", "write"]
