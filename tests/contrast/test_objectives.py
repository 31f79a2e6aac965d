"""Every objective equals its definition, a query at a time."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mocosfl.config import Config, ContrastSettings
from mocosfl.contrast import Batch, objective_of, score
from mocosfl.errors import SettingError

T = 0.3


def objective(name: str):
    return objective_of(ContrastSettings(objective=name, temperature=T, symmetric=True, both_views=name == "simclr"))


def batch(n: int, ways: int = 2, clients: list[int] | None = None, dim: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(n)
    q, k = (torch.randn(ways, n, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return Batch(q.requires_grad_(), k, None, None if clients is None else torch.tensor(clients))


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a / a.norm()) @ (b / b.norm())


def may_meet(b: Batch, i: int, j: int) -> bool:
    return b.clients is None or bool(b.clients[i] == b.clients[j])


def naive_mocov3(b: Batch) -> list[list[torch.Tensor]]:
    n, losses = b.queries.shape[1], []
    for q, k in zip(b.queries, b.keys, strict=True):
        way = []
        for i in range(n):
            scores = {j: torch.exp(cosine(q[i], k[j]) / T) for j in range(n) if may_meet(b, i, j)}
            way.append(-2 * T * torch.log(scores[i] / sum(scores.values())))
        losses.append(way)
    return losses


def naive_simclr(b: Batch) -> list[list[torch.Tensor]]:
    n, losses = b.queries.shape[1], []
    for way in (0, 1):
        row = []
        for i in range(n):
            z, total = b.queries[way, i], torch.zeros((), dtype=torch.float64)
            for other in (0, 1):
                for j in range(n):
                    if (other, j) != (way, i) and may_meet(b, i, j):
                        total = total + torch.exp(cosine(z, b.queries[other, j]) / T)
            positive = torch.exp(cosine(z, b.queries[1 - way, i]) / T)
            row.append(-torch.log(positive / total) / 2)
        losses.append(row)
    return losses


def naive_byol(b: Batch) -> list[list[torch.Tensor]]:
    unit = [[x / x.norm() for x in way] for way in b.queries], [[x / x.norm() for x in way] for way in b.keys]
    return [[(q - k).square().sum() for q, k in zip(*way, strict=True)] for way in zip(*unit, strict=True)]


@pytest.mark.parametrize("clients", [None, [0, 0, 1, 1, 1], [2, 7, 2, 2, 7]], ids=str)
@pytest.mark.parametrize(("name", "naive"), [("mocov3", naive_mocov3), ("simclr", naive_simclr), ("byol", naive_byol)])
def test_losses_and_gradients_equal_the_definition(name: str, naive, clients: list[int] | None) -> None:
    given = batch(5, clients=clients)
    losses, hits = objective(name)(given)
    expected = torch.stack([torch.stack(way) for way in naive(given)])
    torch.testing.assert_close(losses, expected)
    ours, theirs = (
        torch.autograd.grad(total.sum(), given.queries, retain_graph=True)[0] for total in (losses, expected)
    )
    torch.testing.assert_close(ours, theirs)
    assert hits.shape == losses.shape
    assert hits.dtype == torch.bool


@pytest.mark.parametrize("n", [2, 3, 64])
def test_known_values(n: int) -> None:
    """Where all outputs are one and the same, every image among the rest is a guess."""
    same = Batch(torch.ones(2, n, 4), torch.ones(2, n, 4))
    assert objective("mocov3")(same)[0].numpy() == pytest.approx(2 * T * math.log(n), rel=1e-5)
    assert objective("simclr")(same)[0].sum(0).mean() == pytest.approx(math.log(2 * n - 1), rel=1e-5)
    assert objective("byol")(same)[0].abs().max() < 1e-6
    away = Batch(torch.ones(1, n, 4), -torch.ones(1, n, 4))
    assert objective("byol")(away)[0].numpy() == pytest.approx(4.0)


def test_one_way_is_enough_for_those_with_keys() -> None:
    given = batch(4, ways=1)
    for name in ("mocov3", "byol"):
        assert objective(name)(given)[0].shape == (1, 4)


def test_moco_v3_recognises_what_is_nearest() -> None:
    keys = F.one_hot(torch.arange(4)).float()[None]
    queries = keys[:, [0, 1, 3, 2]]  # the last two are mistaken for each other
    for name in ("mocov3", "byol"):
        assert objective(name)(Batch(queries, keys))[1].tolist() == [[True, True, False, False]]


OWN = '''
import torch.nn.functional as F
from mocosfl.contrast import Objective


class Far(Objective):
    """Distance of query and key."""

    def __call__(self, batch):
        losses = (batch.queries - batch.keys).square().mean(dim=2)
        return losses, losses < 1


number = 3
'''


def test_an_objective_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    with pytest.raises(SettingError, match=r"mine\.py:Far: this runs code of yours, which nobody has allowed here"):
        objective_of(ContrastSettings(objective=f"{file}:Far"))
    names = (f"{file}:Far", f"{file}:Near", f"{file}:number", f"{tmp_path}/yours.py:Far")
    monkeypatch.setenv("MOCOSFL_TRUST_CODE", ",".join(names))
    found = objective_of(ContrastSettings(objective=f"{file}:Far"))
    given = batch(3)
    torch.testing.assert_close(found(given)[0], (given.queries - given.keys).square().mean(dim=2))
    for name, message in {
        f"{file}:number": "has no class number that derives from mocosfl.contrast.Objective",
        f"{file}:Near": "has no class Near",
        f"{tmp_path}/yours.py:Far": "there is no file",
    }.items():
        with pytest.raises(SettingError, match=message):
            objective_of(ContrastSettings(objective=name))
    file.write_text("1 / 0")
    with pytest.raises(SettingError, match=r"mine\.py cannot be loaded: ZeroDivisionError"):
        objective_of(ContrastSettings(objective=f"{file}:Far"))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("losses.mean(), losses < 1", r"it returned \(\) float64, \(2, 3\) bool; .* \(2, 3\) float and \(2, 3\) bool"),
        ("losses", r"it returned \(2, 3\) float64; expected are losses and hits"),
        ("losses, losses", r"it returned \(2, 3\) float64, \(2, 3\) float64; expected"),
        ("losses, losses < 1, 7", r"float64, \(2, 3\) bool, int; expected"),
        ("losses, batch.hits", r"mine\.py:Far: AttributeError in its call: 'Batch' object has no attribute 'hits'"),
    ],
)
def test_mistakes_of_the_users_own_are_named(
    returned: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{tmp_path}/mine.py:Far"
    (tmp_path / "mine.py").write_text(OWN.replace("losses, losses < 1", returned))
    monkeypatch.setenv("MOCOSFL_TRUST_CODE", name)
    with pytest.raises(SettingError, match=message):
        score(objective_of(ContrastSettings(objective=name)), batch(3), name)


def test_a_queue_needs_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{tmp_path}/mine.py:Far"
    (tmp_path / "mine.py").write_text(
        OWN.replace("    def __call__", "    keys, queue = False, True\n\n    def __call__")
    )
    monkeypatch.setenv("MOCOSFL_TRUST_CODE", name)
    with pytest.raises(SettingError, match=r"mine\.py:Far: a queue is made of keys; queue=True needs keys=True"):
        objective_of(ContrastSettings(objective=name, both_views=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrast.objective": "moko"}, r"contrast\.objective=moko: expected moco, mocov3, simclr, byol or FILE\.py"),
        ({"contrast.objective": "simclr"}, r"contrast\.objective=simclr: both views train the clients"),
        ({"contrast.objective": "byol", "clients.number": 1}, r"clients\.batch times the active clients must be at le"),
        ({"contrast.objective": "mocov3", "contrast.feature_sharing": False}, r"clients\.batch must be at least 2"),
        (
            {"contrast.concatenate": False, "model.head": "large"},
            r"model\.head=large: BatchNorm has nothing to average",
        ),
        (
            {"contrast.objective": "simclr", "contrast.both_views": True, "clients.frozen": True},
            r"accepted with it are m",
        ),
        ({"contrast.feature_sharing": False, "contrast.queue": 50}, r"each of the 100 clients needs at least one key"),
        ({"clients.holds": "network"}, r"contrast\.feature_sharing=True: clients that hold the whole network .* False"),
    ],
)
def test_impossible_combinations(changes: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Config().updated(changes)
