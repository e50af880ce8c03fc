"""Generated parts of a markdown page."""

from __future__ import annotations

from collections.abc import Mapping


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->`` for every part.

    Raises:
        ValueError: a marker is missing from the text.
    """
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"the markers of {name!r} must stand once each in the README")
        head, _, rest = text.partition(start)
        text = f"{head}{start}{part}\n{end}{rest.partition(end)[2]}"
    return text
