import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mocosfl.clients import Latents
from mocosfl.config import Config
from mocosfl.contrast import Batch
from mocosfl.server import Server

CPU = torch.device("cpu")


def make(norm: type[nn.Module] = nn.Identity, **changes: object) -> Server:
    config = Config().updated({"clients.number": 3, "clients.batch": 2, "contrast.queue": 10} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        half = nn.Sequential(nn.Conv2d(4, 6, 3), norm(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        head = nn.Linear(6, 5)
    return Server(half, head, config, 5, CPU)


def latents(views: int = 1, clients: tuple[int, ...] = (0, 1, 2), batch: int = 2) -> Latents:
    shape = (views, len(clients) * batch, 4, 6, 6)
    sizes = np.full(len(clients), batch)
    return Latents(
        torch.randn(shape), torch.randn(shape), np.array(clients), sizes, np.zeros_like(sizes), (int(sizes.sum()),)
    )


def naive_step(server: Server, batch: Latents) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Algorithm 1's server side, a line at a time: loss, gradient at the query, new keys."""
    contrast = server.config.contrast
    momentum = copy.deepcopy(server.momentum)
    for m, o in zip(momentum.parameters(), server.online.parameters(), strict=True):
        m.data = contrast.momentum * m.data + (1 - contrast.momentum) * o.data
    query = batch.query.clone().requires_grad_()
    pairs = [(query[i], batch.key[i]) for i in range(len(query))]
    if contrast.symmetric and len(query) == 1:
        pairs.append((batch.key[0], query[0].detach()))
    loss, keys, ways = torch.zeros(()), [], len(pairs)
    with torch.no_grad():
        all_k = F.normalize(momentum(torch.cat([b for _, b in pairs])), dim=1)
    all_q = F.normalize(copy.deepcopy(server.online)(torch.cat([a for a, _ in pairs])), dim=1)
    for q, k in zip(all_q.chunk(ways), all_k.chunk(ways), strict=True):
        for i in range(len(q)):
            ring = 0 if contrast.feature_sharing else int(batch.clients[i // batch.sizes[0]])
            logits = torch.cat([(q[i] * k[i]).sum()[None], server.queue.keys[ring] @ q[i]]) / contrast.temperature
            loss = loss - F.log_softmax(logits, 0)[0] / len(q)
        keys.append(k)
    return loss.detach(), torch.autograd.grad(loss, query)[0], keys


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({"contrast.symmetric": False}, 1),
        ({"contrast.symmetric": True}, 1),
        ({"contrast.symmetric": True, "contrast.both_views": True}, 2),
        ({"contrast.feature_sharing": False, "contrast.queue": 12}, 1),
    ],
    ids=["one way", "symmetric", "both views", "own queues"],
)
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_a_step_equals_the_algorithm_written_out(changes: dict, views: int, norm: type[nn.Module]) -> None:
    server = make(norm, **changes, **{"clients.lr_scale": "batch_mean"})
    for clients in ((0, 1, 2), (2, 0), (1, 2)):
        batch = latents(views, clients)
        loss, gradient, keys = naive_step(server, batch)
        gradients, metrics = server.step(batch, lr=0.1)
        torch.testing.assert_close(metrics["loss"], loss)
        torch.testing.assert_close(gradients, gradient)
        if server.config.contrast.feature_sharing:
            newest = server.queue.keys[0].roll(-int(server.queue.next[0]), 0)
            torch.testing.assert_close(newest[-len(keys[-1]) :], keys[-1][-10:])
        else:
            for place, client in enumerate(clients):
                ring = server.queue.keys[client].roll(-int(server.queue.next[client]), 0)
                torch.testing.assert_close(ring[-2:], keys[-1][2 * place : 2 * place + 2])


def test_gradient_scales() -> None:
    """The client's own mean is as many times steeper as there are clients in the pool."""
    batch = latents()
    published, _ = make(**{"clients.lr_scale": "batch_mean"}).step(copy.deepcopy(batch), 0.1)
    own, _ = make(**{"clients.lr_scale": "per_client_mean"}).step(copy.deepcopy(batch), 0.1)
    torch.testing.assert_close(own, 3 * published)


def test_keys_enter_after_the_loss() -> None:
    server = make(**{"contrast.symmetric": False})
    before = server.queue.keys.clone()
    server.step(latents(), 0.1)
    assert int(server.queue.next[0]) == 6
    assert torch.equal(server.queue.keys[0, 6:], before[0, 6:])
    assert not torch.isclose(server.queue.keys[0, :6], before[0, :6]).all(dim=1).any()


def test_momentum_copy_learns_by_average_alone() -> None:
    server = make()
    before = [p.clone() for p in server.momentum.parameters()]
    online = [p.detach().clone() for p in server.online.parameters()]
    server.step(latents(), 0.1)
    for m, b, o in zip(server.momentum.parameters(), before, online, strict=True):
        assert m.grad is None
        torch.testing.assert_close(m, 0.99 * b + 0.01 * o)


def test_a_state_in_another_memory_layout_goes_on_alike() -> None:
    """As one that a GPU has saved: there the server half is not channels-last."""
    first, second = make(), make()
    for _ in range(3):
        first.step(latents(), 0.1)
    state = copy.deepcopy(first.state_dict())
    for kept in state["optimizer"]["state"].values():
        kept["momentum_buffer"] = kept["momentum_buffer"].contiguous()
    second.load_state_dict(state)
    for _ in range(3):
        batch = latents()
        losses = [server.step(copy.deepcopy(batch), 0.1)[1]["loss"] for server in (first, second)]
        assert torch.equal(*losses)


def test_state_survives_saving() -> None:
    first, second = make(), make()
    for _ in range(3):
        first.step(latents(), 0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    batch = latents()
    loss = [server.step(copy.deepcopy(batch), 0.1)[1]["loss"] for server in (first, second)]
    assert torch.equal(loss[0], loss[1])
    for a, b in zip(first.online.parameters(), second.online.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("objective", ["moco", "mocov3", "simclr", "byol"])
@pytest.mark.parametrize("sharing", [True, False])
def test_every_objective_trains_server_and_clients(objective: str, sharing: bool) -> None:
    """Loss and gradient of a step are those of the objective on plain outputs; the momentum copy has no predictor."""
    changes = {"contrast.objective": objective, "contrast.predictor": 7, "contrast.feature_sharing": sharing}
    server = make(**changes, **{"contrast.both_views": True, "contrast.momentum": 0.5})
    batch = latents(2)
    online, momentum = copy.deepcopy(server.online), copy.deepcopy(server.momentum)
    learned = dict(online.named_parameters())
    for name, m in momentum.named_parameters():
        m.data = 0.5 * m.data + 0.5 * learned[name].data
    query = batch.query.clone().requires_grad_()
    q = online(query.flatten(0, 1)).unflatten(0, (2, -1))
    k = None if objective == "simclr" else momentum(batch.key.flatten(0, 1)).unflatten(0, (2, -1)).detach()
    negatives = server.queue.keys[0] if sharing else server.queue.keys
    clients = None if sharing else torch.arange(3).repeat_interleave(2)
    loss = server.objective(Batch(q, k, negatives.clone(), clients))[0].sum() / 6
    gradients, metrics = server.step(batch, lr=0.1)
    torch.testing.assert_close(metrics["loss"], loss.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(loss, query)[0])
    assert len(server.online) == (3 if objective in ("mocov3", "byol") else 2)
    assert len(server.momentum) == (0 if objective == "simclr" else 2)
    fresh = make(**changes, **{"contrast.both_views": True, "contrast.momentum": 0.5})
    fresh.load_state_dict(copy.deepcopy(server.state_dict()))
    assert torch.equal(*(each.step(copy.deepcopy(batch), 0.1)[1]["loss"] for each in (server, fresh)))


def test_without_concatenation_the_server_takes_a_step_for_each_client() -> None:
    together, apart = (make(**{"contrast.concatenate": False, "contrast.queue": 20}) for _ in range(2))
    batch = latents()
    losses, gradients = [], []
    for client in range(3):
        piece, one = slice(2 * client, 2 * client + 2), np.array([2])
        alone = Latents(
            batch.query[:, piece].clone(), batch.key[:, piece], np.array([client]), one, np.zeros(1, np.int64), (2,)
        )
        gradient, metrics = apart.step(alone, 0.1)
        losses.append(metrics["loss"])
        gradients.append(gradient)
    found, metrics = together.step(batch, 0.1)
    torch.testing.assert_close(found, torch.cat(gradients, dim=1) / 3)  # in the scale of the concatenated batch
    assert 0 < float(metrics["spread"]) < 1
    assert float(metrics["loss"]) == pytest.approx(float(torch.stack(losses).mean()))
    for a, b in zip(together.online.parameters(), apart.online.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(together.queue.keys, apart.queue.keys)
