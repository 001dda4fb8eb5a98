"""Checks the site that `mkdocs build --strict` wrote: complete pages, a working search, nothing from other hosts.

python .ci/check_site.py SITE
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import panfpn_fast
from panfpn_fast import ops

# Markdown that Python-Markdown leaves as text although GitHub renders it: a list or a table right after a paragraph.
_UNRENDERED = re.compile(r"\n\s*(?:[-*] |\d+\. |\|)|\]\(|&gt;&gt;&gt; ")
_PARAGRAPH = re.compile(r"<(?:p|li|dd)>((?:(?!</p>|</li>|</dd>|<p>|<ul>|<ol>).)*)", re.DOTALL)
_LOADED = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="((?:https?:)?//[^"]+)"')


def problems(site: Path) -> Iterator[str]:
    """Yields one line for each problem."""
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("index.html")}
    search = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {entry["location"].partition("#")[0] for entry in search if entry["text"]}
    for name, text in pages.items():
        article = re.sub(r"<(pre|code)\b.*?</\1>", "", text.partition("<article")[2], flags=re.DOTALL)
        for paragraph in _PARAGRAPH.findall(article):
            if _UNRENDERED.search(paragraph):
                yield f"{name}: Markdown was not rendered: {paragraph[:80]!r}"
        for address in _LOADED.findall(text):
            yield f"{name} loads {address}"
        if name.removesuffix("index.html") not in found:
            yield f"{name} is not in the search index"
    for name in ops.__all__:
        if not inspect.isfunction(getattr(ops, name)):
            continue
        page = pages.get(f"ops/{name}/index.html", "")
        for part in ("Parameters:", "Returns:", "Examples:", 'id="benchmark"'):
            if part not in page:
                yield f"ops/{name}: no {part}"
    reference = pages.get("reference/index.html", "")
    for name in panfpn_fast.__all__:
        if name == "__version__" or inspect.ismodule(getattr(panfpn_fast, name)):
            continue
        if not re.search(rf'href="[^"]*#panfpn_fast[\w.]*\.{name}"', reference):
            yield f"panfpn_fast.{name} is not documented"


def main() -> int:
    """Returns the exit code."""
    lines = list(problems(Path(sys.argv[1])))
    print("\n".join(lines) or "the site is complete")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
