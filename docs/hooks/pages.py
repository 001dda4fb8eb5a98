"""Generates the pages of the site that are not in docs/, and makes the links of the repository work on the site.

MkDocs calls the functions whose names begin with `on_`. Links in Markdown files are written for the repository and are
relative to the file. On the site, a link to a file that has a page leads to the page. A link to any other file leads to
the repository if its address is known (`repo_url`), and becomes plain text otherwise. A link to nothing ends the build.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # for `benchmarks`; an installed panfpn_fast comes first

from benchmarks.scripts.report.ops_table import REPLACED, op_names  # noqa: E402
from benchmarks.scripts.report.ops_table import summary as op_summary  # noqa: E402
from benchmarks.scripts.report.pages import op_figures  # noqa: E402
from benchmarks.scripts.report.results import committed, read_runs  # noqa: E402
from benchmarks.scripts.report.tables import table  # noqa: E402

# Pages that are files outside docs/.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "benchmarks.md": "benchmarks/README.md",
    "native_code.md": "csrc/README.md",
}
# The reference has a page for each package with an `__all__`, and these pages.
MODULES = {
    "export": (
        "panfpn_fast.inference.export.export",
        "panfpn_fast.models.padded.PaddedPanopticFPN",
        "panfpn_fast.models.padded.unpad",
        "panfpn_fast.models.conv_fusion.for_prediction",
    ),
    "distributed": ("panfpn_fast.distributed",),
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|!?\[[^\[\]]*\](?:\([^()]*\))?)*)\]\(([^()\s]+)\)")
_ATTRIBUTE = re.compile(r'\b(src|srcset|href)="([^"\s]+)"')
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills the empty sections of the navigation."""
    filled: dict[str, list[str]] = {
        "Ops": ["ops/index.md", *(f"ops/{name}.md" for name in op_names())],
        "Examples": [f"examples/{path.stem}.md" for path in _examples()],
    }

    def fill(items: list[dict[str, object] | str]) -> None:
        for item in items:
            for title, children in item.items() if isinstance(item, dict) else ():
                if isinstance(children, list):
                    children.extend(filled.pop(title, []) if not children else [])
                    fill(children)

    fill(config.nav or [])
    if filled:
        raise PluginError(f"mkdocs.yml: nav has no empty section {' and '.join(filled)}")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for name, text in generated_pages():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page that is a file of the repository."""
    name = page.file.src_uri
    source = OUTSIDE.get(name, f"docs/{name}")
    if not (ROOT / source).is_file():
        return markdown
    return rewrite_links(markdown, source, page.file, files, config.repo_url or "")


def rewrite_links(text: str, source: str, here: File, files: Files, repository: str) -> str:
    """Rewrites the links of a Markdown file from targets in the repository to targets on the site.

    Args:
        text: The text of the file.
        source: The file, relative to the root of the repository.
        here: The file's page.
        files: All files of the site.
        repository: The address of the repository, or an empty string.

    Returns:
        The text with new links. Code is unchanged.

    Raises:
        PluginError: If a link leads to a file that does not exist.
    """
    pages = _pages_of_sources()

    def find(target: str) -> tuple[File | None, str]:
        """Returns the file on the site, if there is one, or else the address in the repository, if it is known."""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise PluginError(f"{source}: the link to {target} leads to no file")
        file = files.get_file_from_path(pages.get(path, path.removeprefix("docs/")))
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return file, f"{repository.rstrip('/')}/{kind}/main/{path}" if repository else ""

    def link(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        label = _LINK.sub(link, label)  # an image that is a link
        path, mark, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return f"{image}[{label}]({target})"
        file, address = find(path)
        if file is not None:
            address = posixpath.relpath(file.src_uri, posixpath.dirname(here.src_uri) or ".")
        return f"{image}[{label}]({address}{mark}{anchor})" if address else label

    def attribute(match: re.Match[str]) -> str:
        name, target = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or "://" in target:
            return match[0]
        file, address = find(path)
        if file is not None:
            address = get_relative_url(file.url, here.url)
        return f'{name}="{address}{mark}{anchor}"' if address else f'data-{name}=""'

    parts, end = [], 0
    for code in _CODE.finditer(text):
        # Inline code may be the label of a link, so only its own characters are kept out of the search for attributes.
        if code[0].startswith(("```", "~~~")):
            parts += [_LINK.sub(link, _ATTRIBUTE.sub(attribute, text[end : code.start()])), code[0]]
            end = code.end()
    return "".join([*parts, _LINK.sub(link, _ATTRIBUTE.sub(attribute, text[end:]))])


def generated_pages() -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each page that has no file."""
    yield "ops/index.md", _ops_page()
    runs = [run for path in committed() for run in read_runs(path)]
    for name in op_names():
        figures = op_figures(runs, name)
        if not figures:
            figures = [
                "No recorded run has timed this op on its own. [Performance](../performance.md) has the networks."
            ]
        replaced = [f"`{name}` replaces {REPLACED[name]}.", ""] if name in REPLACED else []
        # The module has the same name as the function that `ops` exports.
        reference = [f"::: panfpn_fast.ops.{name}.{name}", f'    options: {{heading: "ops.{name}"}}', ""]
        page = [f"# {name}", "", *replaced, *reference, "## Benchmark", "", *figures, "", *_errors(name)]
        yield f"ops/{name}.md", "\n".join(page)
    for package in _packages():
        module = f"panfpn_fast.{package}"
        names = _exports(ROOT / "panfpn_fast" / package / "__init__.py")
        yield (
            f"reference/{package}.md",
            _reference_page(package, [module], [f"{module}.{name}" for name in names]),
        )
    for title, objects in MODULES.items():
        yield f"reference/{title}.md", _reference_page(title, [], objects)
    exported = [
        name for name in _exports(ROOT / "panfpn_fast" / "__init__.py") if name not in ("__version__", "ops")
    ]
    links = [f"- [`panfpn_fast.{name}`][panfpn_fast.{name}]" for name in exported]
    yield "reference/index.md", "\n".join([_reference_page("panfpn_fast", ["panfpn_fast"], []), *links, ""])
    yield "reference/commands.md", _commands_page()
    for path in _examples():
        code = path.read_text(encoding="utf-8")
        description = ast.get_docstring(ast.parse(code)) or ""
        title = path.stem.replace("_", " ").capitalize()
        yield f"examples/{path.stem}.md", f"# {title}\n\n{description}\n\n```python\n{code}```\n"


def _pages_of_sources() -> dict[str, str]:
    """Returns the page of each file and directory outside docs/ that has one."""
    pages = {path: name for name, path in OUTSIDE.items()}
    pages |= {f"examples/{path.name}": f"examples/{path.stem}.md" for path in _examples()}
    pages |= {"examples": f"examples/{_examples()[0].stem}.md", "panfpn_fast/ops": "ops/index.md"}
    pages |= {f"panfpn_fast/ops/{name}.py": f"ops/{name}.md" for name in op_names()}
    return pages | {f"panfpn_fast/{package}": f"reference/{package}.md" for package in _packages()}


def _packages() -> list[str]:
    """Returns the packages with an `__all__`, except the ops, which have their own pages."""
    paths = sorted((ROOT / "panfpn_fast").glob("*/__init__.py"))
    return [path.parent.name for path in paths if path.parent.name != "ops" and _exports(path)]


def _examples() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.py"))


def _exports(path: Path) -> list[str]:
    """Returns the list `__all__` of a module without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def _ops_page() -> str:
    rows = [(f"[`{name}`]({name}.md)", REPLACED.get(name, ""), op_summary(name)) for name in op_names()]
    lines = ["# Ops", "", "Import them with `from panfpn_fast import ops`.", ""]
    lines += table(("op", "replaces", "computes"), rows, left=3)
    segments = [
        "::: panfpn_fast.ops.panoptic_merge.PanopticSegments",
        '    options: {heading: "ops.PanopticSegments"}',
    ]
    return "\n".join([*lines, "", *segments, ""])


def _errors(name: str) -> list[str]:
    """Returns the rows of docs/numerics.md about an op, as a section."""
    lines = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8").splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("| op |"))
    rows = [line for line in lines if re.match(rf"\| {name}[ ,]", line)]
    if not rows:
        return []
    text = "The root-mean-square error and the largest error: ours · PyTorch's. [More about them](../numerics.md)."
    return ["## Rounding error", "", text, "", *lines[header : header + 2], *rows, ""]


def _reference_page(title: str, modules: list[str], objects: list[str] | tuple[str, ...]) -> str:
    lines = [f"# {title}", ""]
    for module in modules:
        lines += [
            f"::: {module}",
            "    options: {members: false, show_root_heading: false, show_root_toc_entry: false}",
            "",
        ]
    for name in objects:
        lines += [f"::: {name}", ""]
    return "\n".join(lines)


def _commands_page() -> str:
    """Formats the help texts of all commands and of their actions."""
    lines = ["# Commands", "", "```text", f"{_help()}```"]
    pending: list[tuple[str, ...]] = [(command,) for command in _subcommands(_help())]
    if not pending:
        raise PluginError("panfpn-fast --help lists no commands")
    while pending:
        command = pending.pop(0)
        text = _help(*command)
        lines += [
            "",
            f"{'#' * (1 + len(command))} panfpn-fast {' '.join(command)}",
            "",
            "```text",
            f"{text}```",
        ]
        pending = [(*command, action) for action in _subcommands(text)] + pending
    return "\n".join([*lines, ""])


def _subcommands(text: str) -> list[str]:
    """Returns the commands that a help text lists below COMMAND or ACTION."""
    listed = re.search(r"^  (?:COMMAND|ACTION)\n((?:    .*\n)+)", text, flags=re.MULTILINE)
    return re.findall(r"^    ([\w-]+)", listed[1], flags=re.MULTILINE) if listed else []


def _help(*command: str) -> str:
    from panfpn_fast.cli.main import main

    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*command, "--help"])
    return printed.getvalue()
