"""Markdown tables and the generated parts of README.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Formats a Markdown table whose first `left` columns are left-aligned; omits empty columns."""
    kept = [number for number in range(len(header)) if any(line[number] for line in lines)]
    rows = [header, ["---" if number < left else "--:" for number in range(len(header))], *lines]
    return [f"| {' | '.join(row[number] for number in kept)} |" for row in rows]


def replace_between(text: str, part: str, write: Callable[[str], Sequence[str]]) -> str:
    """Replaces the text between the markers of a part of README.md.

    Args:
        text: The text of README.md, with `<!-- begin <part>: <source> -->` or `<!-- begin <part> -->`, and
            `<!-- end <part> -->`.
        part: The name of the part.
        write: Takes the source, or an empty string, and returns the new lines.

    Returns:
        The new text.
    """
    markers = re.compile(rf"(<!-- begin {part}(?:: (\S+))? -->\n).*?(<!-- end {part} -->)", re.DOTALL)

    def written(match: re.Match[str]) -> str:
        body = "\n".join(write(match[2] or ""))
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return markers.sub(written, text)
