"""Who is enrolled may join, and the file does not tell their tokens."""

import os
from pathlib import Path

import pytest

from mocosfl.errors import RunError
from mocosfl.network.enrolment import TOKEN, Registry


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "clients.json"


def test_tokens_admit_their_client_alone(file: Path) -> None:
    tokens = Registry(file).enrol([3, 0, 12])
    assert all(TOKEN.fullmatch(token) for token in tokens.values())
    assert len(set(tokens.values())) == 3
    registry = Registry(file)
    assert registry.clients == [0, 3, 12]
    assert len(registry) == 3
    for client, token in tokens.items():
        assert registry.admits(token) == client
    secret = tokens[3].partition("-")[2]
    for wrong in ("", "3", secret, f"0-{secret}", f"03-{secret}x", tokens[3][:-1], tokens[3] + " ", f"999-{secret}"):
        assert registry.admits(wrong) is None


def test_no_token_is_in_the_file(file: Path) -> None:
    tokens = Registry(file).enrol(range(20))
    content = file.read_text()
    for token in tokens.values():
        number, _, secret = token.partition("-")
        assert secret not in content
        assert f'"{number}"' in content
    assert os.listdir(file.parent) == [file.name]


def test_a_client_that_is_struck_off_is_out(file: Path) -> None:
    tokens = Registry(file).enrol([0, 1])
    running = Registry(file)
    assert running.admits(tokens[1]) == 1
    Registry(file).strike_off([1])
    assert running.admits(tokens[1]) is None
    assert running.admits(tokens[0]) == 0
    with pytest.raises(RunError, match="client 1 is not enrolled"):
        Registry(file).strike_off([0, 1])
    assert running.admits(tokens[0]) == 0  # all of it or nothing


def test_enrolling_again_voids_the_older_token(file: Path) -> None:
    older = Registry(file).enrol([0, 1])
    running = Registry(file)
    newer = Registry(file).enrol([1])
    assert running.admits(older[1]) is None
    assert running.admits(newer[1]) == 1
    assert running.admits(older[0]) == 0


NO_HASHES = ['{"clients": 3}', '{"clients": {"x": "y"}}', '{"clients": null}', '{"clients": {"0": "\u00e9"}}']


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00\xff", *NO_HASHES])
def test_a_damaged_file_is_named_and_kept(file: Path, content: str) -> None:
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"clients\.json is not a clients' file as `mocosfl enroll` writes it"):
        Registry(file)
    assert file.read_bytes() == content.encode("latin-1")


def test_a_file_that_is_being_damaged_leaves_the_clients_as_they_were(file: Path) -> None:
    tokens = Registry(file).enrol([0])
    running = Registry(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    assert running.admits(tokens[0]) == 0
    with pytest.raises(RunError, match="is not a clients' file"):
        running.enrol([1])
    assert file.read_bytes() == whole[:20]
    file.write_bytes(whole)
    assert running.admits(tokens[0]) == 0


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot (read|write) the clients' file"):
        Registry(tmp_path / "file" / "clients.json").enrol([0])
