"""The site is built without a complaint, asks nobody for anything, and its references are complete."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mocosfl
from mocosfl.cli import COMMANDS
from mocosfl.config import setting_names

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def page(site: Path, name: str) -> str:
    """A page, without its tags."""
    text = (site / f"{name}.html").read_text(encoding="utf-8")
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    """Links may lead away; what is shown and run may not."""
    loaded = re.compile(
        r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//"""
    )
    styles = re.compile(r"""(?:@import|url\()\s*["']?(?:https?:)?//""")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for path in pages:
        assert not loaded.search(path.read_text(encoding="utf-8")), path
    for path in site.rglob("*.css"):
        assert not styles.search(path.read_text(encoding="utf-8")), path


def test_every_setting_is_in_the_reference(site: Path) -> None:
    text = page(site, "reference/settings")
    for name in setting_names():
        assert f"--{name.replace('_', '-')}\n" in text, name
    assert "whole number, 1 or more" in text
    assert "resnet18, resnet34, resnet50" in text


def test_every_command_is_in_the_reference(site: Path) -> None:
    text = page(site, "reference/commands")
    for name in COMMANDS:
        assert f"usage: mocosfl {name}" in text, name
    for words in ("usage: mocosfl-client", "--evaluate-on", "--half SHA256", "--export"):
        assert words in text
    assert "--model.width" not in text  # once, in the settings


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = page(site, "reference/python")
    for name in mocosfl.__all__:
        assert f"mocosfl.{name}" in text, name
