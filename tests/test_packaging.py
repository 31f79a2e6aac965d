"""What is built from the source tree: sdists, and the wheels that are built from those."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both distributions, built as `make wheels` does: first the sdist, then the wheel from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for part in ("", "device"):
        folder = source / part
        folder.mkdir(exist_ok=True)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part / name, folder)
        leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / part / "src", folder / "src", ignore=leave_out)
        done = subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(folder)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return out


def sources(package: Path) -> set[str]:
    """Files of a package in the source tree, relative to the folder that it lies in."""
    files = (file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(package.parent).as_posix() for file in files}


def metadata(dist: Path, name: str) -> Message:
    with zipfile.ZipFile(next(dist.glob(f"{name}-*.whl"))) as wheel:
        place = next(path for path in wheel.namelist() if path.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(place).decode())


@pytest.mark.parametrize(
    ("name", "package"),
    [("mocosfl", ROOT / "src/mocosfl"), ("mocosfl_client", ROOT / "device/src/mocosfl_device")],
)
def test_all_files_of_the_package_are_in_wheel_and_sdist(dist: Path, name: str, package: Path) -> None:
    expected = sources(package)
    assert f"{package.name}/py.typed" in expected
    with zipfile.ZipFile(next(dist.glob(f"{name}-*.whl"))) as wheel:
        found = {path for path in wheel.namelist() if ".dist-info/" not in path}
        assert any(path.endswith("/licenses/LICENSE") for path in wheel.namelist())
    assert found == expected
    with tarfile.open(next(dist.glob(f"{name}-*.tar.gz"))) as sdist:
        packed = {path.partition("/src/")[2] for path in sdist.getnames() if "/src/" in path}
    assert expected <= packed


def test_metadata_is_complete(dist: Path) -> None:
    for name in ("mocosfl", "mocosfl_client"):
        found = metadata(dist, name)
        assert found["License-Expression"] == "Apache-2.0"
        assert found["Description-Content-Type"] == "text/markdown"
        for field in ("Summary", "Author", "Keywords", "Requires-Python", "Project-URL"):
            assert found[field], field
        assert "Typing :: Typed" in found.get_all("Classifier")
        assert found["Version"] == metadata(dist, "mocosfl")["Version"]
        assert len(found.get_payload()) > 500
    assert set(metadata(dist, "mocosfl").get_all("Provides-Extra")) >= {"device", "flower", "onnx", "docs", "dev"}
    assert metadata(dist, "mocosfl_client").get_all("Provides-Extra") == ["parquet"]
