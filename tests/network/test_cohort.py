"""Clients on the network train as simulated ones do."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peers import Commands, eventually, free_port, last_figures, losses, saved_step
from safetensors.torch import load_file

import mocosfl
from mocosfl.config import Config
from mocosfl.encoder import Encoder
from tiny import digits

CALM = {"train.lr": 3e-5, "train.epochs": 0.13, "contrast.momentum": 0.5, "sync.every": 3}
"""14 steps in which rounding does not grow; any other order of updates shows a hundred times above the tolerances."""


def half(run: Path) -> torch.Tensor:
    weights = load_file(run / "encoder.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights) if name.startswith("client.")])


def assert_equal_runs(ours: Path, theirs: Path, config: Config) -> None:
    """Losses of every step, and how far the client half has moved."""
    one, two = losses(ours), losses(theirs)
    assert one.keys() == two.keys()
    assert len(one) > 10
    for step, loss in two.items():
        assert one[step] == pytest.approx(loss, rel=2e-5), f"step {step}"
    if config.clients.frozen:
        assert torch.equal(half(ours), half(theirs))
        return
    start = Encoder(config.model, 1, 8, config.seed).client.state_dict()
    moved = half(theirs) - torch.cat([start[name].flatten() for name in sorted(start)])
    assert moved.norm() > 1e-4
    assert (half(ours) - half(theirs)).norm() < 1e-3 * moved.norm()


def test_separate_processes_train_as_simulated_clients_do(
    start: Commands, data: Callable[..., Path], tmp_path: Path
) -> None:
    config, folder = digits(**CALM), data()
    server = start.serve(config)
    port = server.port()
    clients = [start.join(port, folder / f"client-{number}", "--client", number) for number in range(3)]
    mocosfl.train(config, tmp_path / "simulated")
    for client in clients:
        assert "the run is over" in client.ends_well()
        assert "14 steps; " in client.said
    server.ends_well()
    assert_equal_runs(tmp_path / "run", tmp_path / "simulated", config)
    figures = last_figures(tmp_path / "run")
    assert figures["latents"] == 3 * 14
    assert figures["stragglers"] == figures["late"] == figures["violations"] == 0


POOLED = {"clients.number": 6, "clients.pool": 3, "clients.round": 3, "sync.every": 2}
RUNS = {
    "one-way": {"contrast.symmetric": False, "sync.momentum": False},
    "pooled": POOLED,
    "pooled-one-way": POOLED | {"sync.momentum": False, "contrast.symmetric": False},
    "both-views-median": {"contrast.both_views": True, "model.client_norm": "batch", "sync.average": "median"},
    "frozen": {"clients.frozen": True},
    "int8": {"traffic.latents": "int8", "traffic.gradients": "int8", "traffic.zstd": True},
    "bf16-topk": {"traffic.latents": "bf16", "traffic.gradients": "topk"},
    "frozen-int4": {"clients.frozen": True, "traffic.latents": "int4"},
    "frozen-cache": {"clients.frozen": True, "clients.batch": 32, "cache.views": 4, "train.epochs": 2.6},
    "rest": {"clients.batch": 32, "traffic.loss_threshold": 99.0, "train.epochs": 3.8},
    "numpy": {"model.bottleneck": "C4S2"},
    "numpy-cut3-pooled": POOLED | {"model.cut": 3, "sync.momentum": False},
    "numpy-both-views": {"contrast.both_views": True},
    "numpy-frozen": {"clients.frozen": True},
    "numpy-frozen-cache": {"clients.frozen": True, "clients.batch": 32, "cache.views": 4, "train.epochs": 2.6},
}
"""By name; those of numpy with clients that need no PyTorch."""


@pytest.fixture(scope="module")
def networked(data: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple]]:
    """All runs over the network, in two server processes and two processes of clients, and their simulation."""
    folder = tmp_path_factory.mktemp("networked")
    mocosfl.train(digits(**{"train.epochs": 0.05}), folder / "half")
    done: dict[str, tuple] = {}
    served: dict[str, list] = {"torch": [], "numpy": []}
    joined: dict[str, list] = {"torch": [], "numpy": []}
    for name, changes in RUNS.items():
        start = {"clients.init": str(folder / "half")} if "frozen" in name else {}
        config, port = digits(**CALM | changes | start), free_port()
        (folder / f"{name}.yaml").write_text(config.to_yaml())
        kind = "numpy" if name.startswith("numpy") else "torch"
        served[kind].append([str(folder / f"{name}.yaml"), str(folder / name), port])
        number = config.clients.number
        joined[kind].append([port, str(data(**{"clients.number": number})), 0, number, kind])
        done[name] = folder / name, folder / f"{name}-simulated", config
    commands = Commands(folder)
    started = [commands.hall(*runs) for runs in served.values()] + [commands.crew(*runs) for runs in joined.values()]
    for _, simulated, config in done.values():
        mocosfl.train(config, simulated)
    for command in started:
        command.ends_well()
    yield done
    commands.stop()


@pytest.mark.parametrize("name", RUNS)
def test_a_networked_run_equals_a_simulated_one(name: str, networked: dict[str, tuple]) -> None:
    assert_equal_runs(*networked[name])


def test_clients_whose_latents_are_all_there_are_let_go(networked: dict[str, tuple]) -> None:
    run, simulated, _ = networked["frozen-cache"]
    asked = json.loads((run / "result.json").read_text())["asked"]
    assert asked == json.loads((simulated / "result.json").read_text())["asked"]
    assert min(asked["upload"], asked["nothing"]) > 5
    assert last_figures(run)["latents"] == 3 * asked["upload"]
    assert last_figures(run)["clients"] == 0


def test_clients_that_rest_send_nothing_and_stay(networked: dict[str, tuple]) -> None:
    run, simulated, _ = networked["rest"]
    asked = json.loads((run / "result.json").read_text())["asked"]
    assert asked == json.loads((simulated / "result.json").read_text())["asked"]
    assert min(asked.values()) > 5
    assert last_figures(run)["latents"] == 3 * (asked["learn"] + asked["upload"])
    assert last_figures(run)["clients"] == 3


def test_a_server_that_has_all_latents_goes_on_without_clients(
    start: Commands, data: Callable[..., Path], tmp_path: Path
) -> None:
    mocosfl.train(digits(**{"train.epochs": 0.05}), tmp_path / "half")
    config = digits(
        **CALM
        | RUNS["frozen-cache"]
        | {"clients.init": str(tmp_path / "half"), "train.epochs": 300, "train.log_every": 5}
        | {"train.checkpoint_every": 10**6}
    )
    folder = data()
    server = start.serve(config)
    port = server.port()
    clients = [start.join(port, folder / f"client-{number}", "--client", number) for number in range(3)]
    for client in clients:
        assert "the server has all latents that it needs" in client.ends_well()
    late = start.join(port, folder / "client-0", "--client", 0)
    assert "the server has all latents that it needs" in late.ends_well()
    server.kill()  # what clients have sent was kept before they were let go
    step = saved_step(tmp_path / "run")
    assert step == math.ceil(config.cache.views // 2 * 432 / 32)
    step = last_figures(tmp_path / "run")["step"]
    again = start.serve(None)
    eventually(lambda: last_figures(tmp_path / "run")["step"] > step + 20)
    again.process.kill()


def test_frozen_clients_are_sent_their_half_once_and_no_gradient(networked: dict[str, tuple]) -> None:
    run, simulated, config = networked["frozen"]
    weights = load_file(Path(config.clients.init) / "encoder.safetensors")
    halves = 3 * 4 * sum(weights[name].numel() for name in weights if name.startswith("client."))
    statistics = 3 * 2 * 4
    assert last_figures(run)["tensor_bytes_out"] == halves + statistics
    facts = json.loads((run / "data.json").read_text())
    assert [facts["mean"], facts["std"]] == json.loads((simulated / "data.json").read_text())["input"]
