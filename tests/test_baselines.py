"""Clients that hold the whole network: one of them alone is central training, whatever the method."""

import copy
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import mocosfl
from mocosfl.baselines import METHODS, baseline, method_settings
from mocosfl.config import Config
from mocosfl.contrast import Batch, objective_of
from mocosfl.data.augment import augment, normalise, policy_of
from mocosfl.encoder import Encoder
from mocosfl.trainer import Callback, Trainer
from mocosfl_device.augment import AugmentParameters

sys.path.insert(0, str(Path(__file__).parent))
from test_trainer import MEAN, STD, parts, run, settings


@pytest.mark.parametrize("method", METHODS)
def test_one_client_alone_is_central_training(method: str) -> None:
    """10 steps: the same as one plain network, its target copy and its optimiser."""
    config = settings(
        **{"clients.number": 1, "clients.batch": 6, "sync.every": 3, "train.epochs": 2},
        **{"contrast.predictor": 16, "contrast.momentum": 0.9, "model.client_norm": "batch"},
        **method_settings(method),
    )
    losses, trainer = run(config)

    data, online, server, sampler = parts(config)
    target = copy.deepcopy(online.target)
    objective, policy = objective_of(config.contrast), policy_of(config.augment)
    train = config.train
    optimizer = torch.optim.SGD(online.parameters(), 1.0, train.momentum, weight_decay=train.weight_decay)
    queue, expected = server.queue.keys[0].clone(), []
    for step in range(trainer.steps):
        rows, draws = sampler.draw(np.arange(1), 6)
        views = []
        for view in (0, 1):
            parameters = AugmentParameters.draw(policy, 8, config.seed, np.zeros(6, np.int64), draws, view)
            views.append(normalise(augment(data.take(rows, "cpu"), parameters, policy), MEAN, STD))
        q = online(torch.cat(views)).unflatten(0, (2, 6))
        learned = dict(online.named_parameters())
        with torch.no_grad():
            for name, tensor in target.named_parameters():
                tensor.copy_(0.9 * tensor + 0.1 * learned[name])
            k = target(torch.cat(views[::-1])).unflatten(0, (2, 6))
        loss = objective(Batch(q, k, queue))[0].sum() / 6
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = trainer.rates_of(step)[1]
        optimizer.step()
        if objective.queue:
            queue = torch.cat([queue, *F.normalize(k, dim=2)])[-50:]
        expected.append(loss.item())

    assert trainer.steps == 10
    assert losses == pytest.approx(expected, rel=1e-9)
    weights = trainer.cohort.average()
    for name, tensor in online.named_parameters():
        torch.testing.assert_close(weights[name], tensor.detach(), atol=1e-9, rtol=1e-6)


def test_the_encoder_of_a_run_is_the_average_of_the_clients_networks(tmp_path: Path) -> None:
    config = Config().updated(
        {
            "data.size": 8,
            "data.channels": 1,
            "data.images": 200,
            "model.width": 4,
            "model.head": "small",
            "clients.number": 4,
            "clients.batch": 10,
            "train.epochs": 2,
            "evaluation.probe_epochs": 0,
            "evaluation.k": 5,
            "contrast.predictor": 16,
            "sync.every": 2,
            "partition.kind": "iid",
        }
        | method_settings("fedema")
    )
    noted: dict[str, torch.Tensor] = {}

    class Note(Callback):
        def after_training(self, trainer: Trainer) -> None:
            noted.update({name: stack.detach().clone() for name, stack in trainer.cohort.online.weights.items()})

    said = io.StringIO()
    result = mocosfl.train(config, tmp_path / "run", callbacks=(Note(),), console=Console(file=said, width=120))
    text = said.getvalue()
    assert "batch 10; each with the whole network\nnetwork: resnet18 of width 4, " in text
    assert "latents" not in text
    assert "server:" not in text
    assert mocosfl.evaluate(tmp_path / "run")["knn"] == result.metrics["knn"]
    encoder = mocosfl.load_encoder(tmp_path / "run")
    learned = dict(encoder.named_parameters())
    assert learned.keys() < noted.keys()  # the clients have heads besides
    for name, parameter in learned.items():
        torch.testing.assert_close(parameter, sum(noted[name]) / 4, rtol=1e-5, atol=1e-6)
    for client in range(4):  # none of them is the average
        assert any(not torch.allclose(learned[name], noted[name][client], rtol=1e-3) for name in learned)
    images = torch.rand(3, 1, 8, 8)
    untrained = Encoder(config.model, 1, 8, config.seed)
    torch.testing.assert_close(encoder(images), result.encoder(images))
    moved = [
        (a - b).abs().max() > 0 for a, b in zip(encoder.parameters(), untrained.parameters(), strict=True) if a.ndim > 1
    ]
    assert all(moved)  # also those of the server half, which is the clients' here
    assert {"knn", "loss", "divergence", "own_share"} <= result.metrics.keys()


@pytest.mark.parametrize("method", METHODS)
def test_recipes_average_after_local_epochs(method: str) -> None:
    config = baseline(method, "cifar10", 5)
    assert (config.clients.batch, config.sync.every) == (128, 5 * 77)  # 9,800 images a client
    assert baseline(method, "cifar100", 100, "iid").sync.every == 5 * 4
