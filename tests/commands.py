"""What the tests of verbs share."""

from __future__ import annotations

import json
from typing import Any


def document(found: tuple[int, str, str]) -> Any:
    """The one JSON document that a verb printed: (exit code, stdout, stderr)."""
    code, out, err = found
    assert code == 0, err
    assert out.count("\n") == 1, "one document on stdout"
    return json.loads(out)
