"""The documentation does what it says: blocks of code run, links resolve, and what is named exists."""

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from mocosfl.cli import COMMANDS, main
from mocosfl.config import Config, setting_names
from mocosfl.errors import SettingError
from mocosfl_device.cli import parser as client_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "device/README.md", "benchmarks/README.md"),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
    ]
)
SHELL, PYTHON = {"sh", "bash", "shell", "console"}, {"python", "py"}
FENCE = re.compile(r"^(?P<fence>```+)(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=fence)`*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<why>.+?) -->\n\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code of a page; ``why`` it is not run, if it is not."""

    page: str
    line: int
    language: str
    code: str
    why: str | None


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    found, text = [], text_of(page)
    for match in FENCE.finditer(text):
        mark = NOT_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], match["code"], mark and mark["why"]))
    return found


def commands_of(block: Block) -> str:
    """What is typed: of a console, what follows the prompt."""
    if block.language != "console":
        return block.code
    return "\n".join(line[2:] for line in block.code.splitlines() if line.startswith(("$ ", "> ")))


RUN = [page for page in PAGES if any(b.language in SHELL | PYTHON and not b.why for b in blocks(page))]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the commands of this interpreter."""
    folder = tmp_path_factory.mktemp("bin")
    for name, what in {
        "mocosfl": " -m mocosfl",
        "mocosfl-client": " -m mocosfl_device",
        "python": "",
        "python3": "",
    }.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{what} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in order, in one empty folder. Python runs in this process, where torch is imported."""
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.why or block.language not in SHELL | PYTHON:
            continue
        if block.language in PYTHON:
            exec(compile(block.code, where, "exec"), {"__name__": "__main__"})
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands_of(block)],
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=600,
        )
        assert done.returncode == 0, f"{where}\n{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_blocks_that_are_not_run_say_why() -> None:
    """And what looks like a command is in a block that has a language."""
    for page in PAGES:
        for block in blocks(page):
            where = f"{page}:{block.line}"
            assert block.why is None or len(block.why) > 5, where
            if not block.language:
                words = {line.split()[0] for line in block.code.splitlines() if line.strip()}
                assert not words & {"mocosfl", "mocosfl-client", "pip", "make", "python", "torchrun", "$"}, where
        assert len(re.findall("^<!-- not run:", text_of(page), re.MULTILINE)) == sum(
            b.why is not None for b in blocks(page)
        ), f"{page}: a mark stands before no block"


# Links


def prose_of(page: str) -> str:
    return FENCE.sub("", text_of(page))


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        other = file.resolve().relative_to(ROOT).as_posix()
        if anchor and "<!-- generated:" not in text_of(other):  # those are checked when the site is built
            assert anchor in anchors(other), f"{page}: {target}"


# What is named


@cache
def flags_of(command: str) -> frozenset[str]:
    """All flags of a command, as its help lists them."""
    if command == "mocosfl-client":
        return frozenset(flag for action in client_parser()._actions for flag in action.option_strings)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([command, "--help"])
    return frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", out.getvalue()))


def calls(page: str) -> Iterator[tuple[str, list[str]]]:
    """Every ``mocosfl COMMAND ...`` and ``mocosfl-client ...`` in code: the command and the flags after it."""
    code = [b.code.replace("\\\n", " ") for b in blocks(page)] + re.findall(r"`([^`\n]+)`", prose_of(page))
    for line in "\n".join(code).splitlines():
        for part in re.split(r"&&|[;&|]| #|`", line):
            if match := re.search(r"(?:^|[\s/])(?:-m )?mocosfl(-client)?(?:\s+([a-z]+\b))?(.*)$", part):
                name = "mocosfl-client" if match[1] else match[2]
                if name is not None:
                    yield name, re.findall(r"(?<![\w-])--[a-z][\w.-]*", match[3])


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_flags_exist(page: str) -> None:
    for command, flags in calls(page):
        assert command in {*COMMANDS, "mocosfl-client"}, f"{page}: mocosfl {command}"
        unknown = set(flags) - flags_of(command)
        assert not unknown, f"{page}: mocosfl {command} {' '.join(unknown)}"


def test_settings_that_are_named_exist() -> None:
    """``--group.name`` and ``group.name`` in code, also with a value."""
    known = set(setting_names())
    groups = {name.partition(".")[0] for name in known if "." in name}
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose_of(page)):
            for name in re.findall(r"(?<![\w./-])(?:--)?([a-z]+\.[a-z][a-z_-]*)(?![\w./(])", code):
                group, _, last = name.partition(".")
                if group in groups and last not in ("py", "md", "json", "npz", "png", "safetensors"):  # those are files
                    assert name.replace(".no-", ".").replace("-", "_") in known, f"{page}: {name}"


def test_flags_in_prose_exist() -> None:
    everywhere = frozenset().union(*(flags_of(command) for command in (*COMMANDS, "mocosfl-client")))
    others = {"--nproc-per-node", "--node-config", "--run-config", "--enable-supernode-auth"}  # torchrun, Flower
    for page in PAGES:
        benchmarks = page == "benchmarks/README.md"
        for code in re.findall(r"`(--[^`\n]+)`", prose_of(page)):
            flag = re.match(r"--[a-z][\w.-]*", code)
            known = flag and flag[0] in everywhere | others
            assert known or (benchmarks and benchmark_has(flag[0])), f"{page}: {code}"


def benchmark_has(flag: str) -> bool:
    return any(f'"{flag}"' in path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))


# Error messages


@cache
def templates() -> list[tuple[int, re.Pattern[str]]]:
    """Every string of the source: how many letters of it are fixed, and a pattern in which all else is anything."""
    found = []
    for root in ("src", "device/src"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts = [node.value]
                else:
                    continue
                letters = sum(len(part) for part in parts if part)
                pattern = "".join(".+" if part is None else re.escape(part) for part in parts)
                found.append((letters, re.compile(pattern, re.DOTALL)))
    return found


def is_in_source(text: str) -> bool:
    """Whether some string of the source can become this one, and not because it could become any."""
    return any(letters >= min(10, len(text)) and pattern.fullmatch(text) for letters, pattern in templates())


def quoted() -> list[str]:
    """The messages of the page on troubleshooting; lines that are indented go on with the one before."""
    messages: list[str] = []
    for block in blocks("docs/troubleshooting.md"):
        if block.language != "text":
            continue
        for line in block.code.splitlines():
            if line.startswith(("  ", "resume it")):
                messages[-1] += f"\n{line}"
            elif line:
                messages.append(line)
    return messages


@pytest.mark.parametrize("message", quoted())
def test_quoted_errors_are_in_the_source(message: str) -> None:
    said = message.partition(" says: ")
    for text in (message, said[2]) if said[1] else (message,):
        if ": input should be" in text:  # pydantic's words
            name, value = re.match(r"([\w.]+)=(\d+)", text).groups()
            with pytest.raises(SettingError, match=re.escape(text)):
                Config().updated({name: int(value)})
            continue
        assert is_in_source(text), text


def test_messages_that_nobody_wrote_are_not_found() -> None:
    text = "clients.pool=7: there is no such thing as a pool"
    assert not is_in_source(text)


# The rest


def test_citation_names_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license"} <= set(cited)
    paper = cited["preferred-citation"]
    assert paper["title"].startswith("MocoSFL")
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Lyu", "Iso", "Chakrabarti", "Spranger"]
    assert paper["url"] in text_of("README.md")
