"""What mkdocs does beside turning pages to HTML (a hook, see mkdocs.yml).

Pages that lie elsewhere in the repository take part in the site, links between files become links between pages, and
reference pages are filled from the code: settings from the types in ``mocosfl.config``, commands from the command
line. Nothing of that is kept in a file, so nothing can grow old.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

ELSEWHERE = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff",
    "examples/digits.ipynb": "examples/digits.ipynb",
    "examples/claims.yaml": "examples/claims.yaml",
}
"""Files of the repository that take part in the site, and their places in it."""

WIDTH = 80
"""Characters of a line of help."""

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add what does not lie in ``docs/``."""
    for source, place in ELSEWHERE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Mend the links of a page, and fill it if it is generated."""
    place = page.file.src_uri
    source = next((file for file, to in ELSEWHERE.items() if to == place), f"docs/{place}")
    markdown = outside_fences(markdown, lambda text: LINK.sub(lambda link: linked(link, source, place), text))
    for mark, make in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def outside_fences(markdown: str, change: typing.Callable[[str], str]) -> str:
    """Change all but the blocks of code."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def linked(link: re.Match[str], source: str, place: str) -> str:
    """A link from one file of the repository to another, as one from page to page."""
    before, target, anchor, after = link[1], link[2], link[3] or "", link[4]
    if "://" in target or target.startswith("mailto:"):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    page = ELSEWHERE.get(path, path.removeprefix("docs/"))
    return f"{before}{posixpath.relpath(page, posixpath.dirname(place) or '.')}{anchor}{after}"


# Settings


def settings_page() -> str:
    """All settings, group by group."""
    from mocosfl.config import Config, Settings

    lines = ["## Of the whole run", "", *rows(Config, "")]
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            lines += [f"## {name}", "", prose(kind.__doc__ or ""), "", *rows(kind, f"{name}.")]
    return "\n".join(lines)


def rows(settings: Any, prefix: str) -> list[str]:
    """The settings of one group, without groups within it, as a table."""
    from mocosfl.config import Settings

    lines = ['<div class="settings" markdown>', "", "| setting | accepts | default | |", "| --- | --- | --- | --- |"]
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            continue
        full = prefix + name
        default = f"`{shown(field.default)}`" if field.default is not None else "unset"
        cells = (
            f'<span id="{full}"></span>`--{full.replace("_", "-")}`',
            accepted(field.annotation, field.metadata),
            default,
            prose(field.description or ""),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return [*lines, "", "</div>", ""]


def accepted(kind: Any, limits: list[Any]) -> str:
    """What a setting takes, in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        limits = [*limits, *getattr(inner[1], "metadata", inner[1:])]
        return accepted(inner[0], limits)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(accepted(part, limits) for part in inner if part is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is tuple:
        return f"{len(inner)} of: {accepted(inner[0], limits)}"
    if kind is bool:
        return "on (`--x`) or off (`--no-x`)"
    name = {int: "whole number", float: "number", str: "text"}.get(kind, getattr(kind, "__name__", str(kind)))
    return ", ".join([name, *(words for limit in limits for words in bound(limit))])


def bound(limit: Any) -> Iterator[str]:
    """One bound of a number, in words."""
    signs = {"ge": "{} or more", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}
    for name, words in {**signs, "multiple_of": "a multiple of {}"}.items():
        if (value := getattr(limit, name, None)) is not None:
            yield words.format(f"2{'⁶³'}" if value == 2**63 else f"{value:g}")


def shown(value: Any) -> str:
    """A default as one types it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def prose(text: str) -> str:
    """A docstring on one line; pages that it names are linked."""
    text = " ".join(text.split()).replace("<", "&lt;").replace("*", r"\*")
    return re.sub(r"docs/([a-z-]+)\.md", r"[\1](../\1.md)", text)


# Commands


def commands_page() -> str:
    """The help of every command, as printed."""
    from mocosfl.cli import COMMANDS
    from mocosfl_device.cli import parser

    lines = []
    for name, (_, what) in COMMANDS.items():
        help_, settings = without_settings(printed(name))
        lines += [f"## mocosfl {name}", "", f"{what[0].upper()}{what[1:]}.", "", "```text", help_, "```", ""]
        if settings:
            lines += ["And [every setting of a run](settings.md), as `--group.name`.", ""]
    with terminal():
        text = parser().format_help()
    lines += ["## mocosfl-client", "", "Be a client on a small device, without PyTorch.", "", "```text", text, "```"]
    return "\n".join(lines)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """A terminal of fixed width, without colours."""
    wanted = {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def printed(command: str) -> str:
    """What ``mocosfl COMMAND --help`` prints."""
    from mocosfl.cli import main

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # so that boxes are drawn as they are in a terminal
    with terminal(), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    out.seek(0)
    return out.read().rstrip()


def without_settings(text: str) -> tuple[str, bool]:
    """A help without the boxes of the settings of a run, and whether it had any."""
    from mocosfl.config import Config, Settings

    groups = [
        name
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
    ]
    box = re.compile(rf"^╭─ (?:{'|'.join(groups)}) options ─.*?^╰─*╯\n?", re.MULTILINE | re.DOTALL)
    shorter, count = box.subn("", text)
    return shorter.rstrip(), count > 0


GENERATED = {"<!-- generated: settings -->": settings_page, "<!-- generated: commands -->": commands_page}
