"""What the network costs: clients' latents in, gradients out, beside bare gRPC that carries as many bytes.

Processes of their own over the loopback device: a server, and two that hold the clients, each client with a connection
of its own. A message of latents has S bytes, half of them query, half key, and the client gets a gradient of S / 2
bytes with its next order; frozen clients get none, and are asked up to four steps ahead.

- ours: the server's door, cohort and checks (``RemoteCohort``), as the trainer calls them. The networks are missing:
  the gradient is the query latents. So are averages, and the clients compute nothing: they send the same latents again.
- bare: a ``grpc.aio`` server whose handler reads S bytes and writes S / 2 (frozen: 16), on as many connections. It
  looks at nothing, keeps nothing, and waits for nobody; ours waits for all clients in every step.

Whatever else the machine does disturbs the ratio of latents a second; that of processor time, of server and clients
together, it disturbs less. On a machine with a core or two the two are the same, if clients are many.

The clients need about as much of the processor as the server, and share it: the latents a second are those of both
together, and a server with a machine to itself is faster. The loopback device never loses or delays a packet.
"""

# torch is imported where it is needed: the processes that hold the clients do without.
from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from mocosfl_device.protocol_pb2 import ClientMessage, Join, Latents, Ready, ServerMessage
from mocosfl_device.wire import METHOD, PROTOCOL, Coder, channel_options

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
CHANNELS, SIZE, PIXEL = 3, 8, 100
"""Of the images that clients say they hold: one of this colour each."""
JOINING = 100
"""Clients of a process that join at a time."""
AHEAD = 4
"""Steps that frozen clients may be ahead."""
LIMIT = 120
"""Seconds after which a measurement has failed."""
GOALS = {"ratio": 0.70, "mib": 600}
"""Asked for: least share of bare gRPC's latents a second, and most memory of the server."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        clients: connections.
        kib: S, size of a message of latents in KiB.
        tls: whether connections are encrypted.
        frozen: clients get no gradient.
        bare: gRPC alone.
        warm_up, seconds: of a measurement.
        folder: of ``ca.pem``, ``cert.pem`` and ``key.pem``.
    """

    clients: int
    kib: int
    tls: bool
    frozen: bool
    bare: bool = False
    warm_up: float = 1.5
    seconds: float = 4
    folder: str = ""

    @property
    def up(self) -> int:
        """Bytes of a message of latents."""
        return self.kib * 2**10

    @property
    def down(self) -> int:
        """Bytes of the numbers in an answer."""
        return 16 if self.frozen else self.up // 2

    @property
    def numbers(self) -> int:
        """Of one latent: a quarter of the bytes of query or key."""
        return self.up // 8

    def read(self, name: str) -> bytes:
        return (Path(self.folder) / name).read_bytes()


# The server


class Meter:
    """Figures of a server over some seconds, and of its memory."""

    def __init__(self) -> None:
        self.rss = {"imported": memory("VmRSS")}
        self.times: list[float] = []

    def begin(self) -> None:
        """The measurement begins."""
        self.times = []
        say(begins=True)
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def report(self, latents: int, steps: int) -> None:
        """The measurement is over: print what came of it."""
        wall, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        p50, p99 = np.percentile(self.times, (50, 99))
        say(
            latents=latents,
            steps_per_second=steps / wall,
            latents_per_second=latents / wall,
            p50_ms=1e3 * p50,
            p99_ms=1e3 * p99,
            cpu_seconds_per_1000_latents=1e3 * cpu / latents,
            cpu_share=cpu / wall,
            peak_mib=memory("VmHWM"),
            rss_mib={**self.rss, "at the end": memory("VmRSS")},
        )


def serve_ours(case: Case) -> None:
    """A ``RemoteCohort``, driven as the trainer drives it, without networks."""
    import torch
    from torch import nn

    from mocosfl.compute import keep_freed_memory
    from mocosfl.config import Config
    from mocosfl.network.cohort import RemoteCohort
    from mocosfl.network.settings import ServeSettings

    keep_freed_memory()
    meter = Meter()
    frozen = {"clients.frozen": True, "clients.init": "elsewhere"} if case.frozen else {}
    config = Config().updated({"clients.number": case.clients, "clients.batch": 1, **frozen})
    folder = Path(case.folder)
    tls: dict[str, Any] = {"tls_cert": folder / "cert.pem", "tls_key": folder / "key.pem"} if case.tls else {}
    settings = ServeSettings(listen=f"{HOST}:0", quorum=1, step_timeout=LIMIT, heartbeat=LIMIT, ahead=AHEAD, **tls)
    half, device = nn.Conv2d(CHANNELS, 4, 3), torch.device("cpu")
    events = partial(complain, {"joined"})
    cohort = RemoteCohort(half, config, settings, (case.numbers,), CHANNELS, SIZE, device, events)
    cohort.start()
    say(port=cohort.exchange.service.port)
    _, mean, std = cohort.gather(case.clients)
    meter.rss["joined"] = memory("VmRSS")
    cohort.begin(mean, std)
    cohort.follow(2**40, None, lambda: False)

    def step() -> int:
        latents = cohort.forward()
        if latents.learning:
            cohort.backward(latents.query, 0.01)
        return int(latents.sizes.sum())

    def steps(seconds: float) -> int:
        count, end = 0, time.perf_counter() + seconds
        while (now := time.perf_counter()) < end:
            count += step()
            meter.times.append(time.perf_counter() - now)
        return count

    step()
    meter.rss["first step"] = memory("VmRSS")
    steps(case.warm_up)
    meter.begin()
    latents = steps(case.seconds)
    meter.report(latents, len(meter.times))


def serve_bare(case: Case) -> None:
    """gRPC alone."""
    asyncio.run(_serve_bare(case))


async def _serve_bare(case: Case) -> None:
    meter = Meter()
    answer, present, latents = bytes(case.down), 0, 0
    everybody = asyncio.Event()

    async def session(_: Any, context: Any) -> None:
        nonlocal present, latents
        await context.write(b"hello")
        await context.read()
        present += 1
        if present == case.clients:
            everybody.set()
        await everybody.wait()
        last = time.perf_counter()
        while (await context.read()) is not grpc.aio.EOF:
            latents += 1
            await context.write(answer)
            meter.times.append(-last + (last := time.perf_counter()))

    server = grpc.aio.server()
    service, name = METHOD.strip("/").split("/")
    handler: Any = grpc.stream_stream_rpc_method_handler(session)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    if case.tls:
        credentials = grpc.ssl_server_credentials([(case.read("key.pem"), case.read("cert.pem"))])
        port = server.add_secure_port(f"{HOST}:0", credentials)
    else:
        port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    say(port=port)
    await everybody.wait()
    meter.rss["joined"] = memory("VmRSS")
    await asyncio.sleep(case.warm_up)
    latents = 0
    meter.begin()
    await asyncio.sleep(case.seconds)
    meter.report(latents, latents // case.clients)


# The clients


def clients(case: Case, port: int, numbers: Sequence[int]) -> None:
    """Hold clients of these numbers, until the process is ended."""
    asyncio.run(_clients(case, port, numbers))
    assert "torch" not in sys.modules, "the clients were to be cheap"


async def _clients(case: Case, port: int, numbers: Sequence[int]) -> None:
    joining = asyncio.Semaphore(JOINING)
    kind = client_bare if case.bare else client_ours
    options: list[tuple[str, int]] = [("grpc.use_local_subchannel_pool", 1)]
    if not case.bare:
        options += channel_options(2**30)
    credentials = grpc.ssl_channel_credentials(case.read("ca.pem")) if case.tls else None

    async def client(number: int) -> None:
        where = f"{HOST}:{port}"
        channel = (
            grpc.aio.insecure_channel(where, options)
            if credentials is None
            else grpc.aio.secure_channel(where, credentials, options)
        )
        async with channel:
            await kind(channel.stream_stream(METHOD), case, number, joining)

    await asyncio.gather(*map(client, numbers))


async def client_bare(method: Any, case: Case, number: int, joining: asyncio.Semaphore) -> None:
    """Sends as soon as it has an answer."""
    message = bytes(case.up)
    async with joining:
        stream = method()
        await stream.read()
        await stream.write(b"join")
    for _ in range(AHEAD if case.frozen else 1):
        await stream.write(message)
    while (await stream.read()) is not grpc.aio.EOF:
        await stream.write(message)


async def client_ours(method: Any, case: Case, number: int, joining: asyncio.Semaphore) -> None:
    """Speaks the protocol. Its latents are always the same, and are put into a message once."""
    async with joining:
        stream = method()
        hello = ServerMessage.FromString(await stream.read()).hello
        join = Join(protocol=PROTOCOL, nonce=hello.nonce, client=number, images=1, capabilities=["learn"])
        await stream.write(ClientMessage(join=join).SerializeToString())
        assert ServerMessage.FromString(await stream.read()).HasField("welcome")
        pixels = SIZE**2
        ready = Ready(images=1, sums=[PIXEL * pixels] * CHANNELS, squares=[PIXEL**2 * pixels] * CHANNELS)
        await stream.write(ClientMessage(ready=ready).SerializeToString())
    latents = Coder().pack(np.full((1, 1, case.numbers), 0.5, np.float32))
    message = ClientMessage(latents=Latents(query=latents, key=latents)).SerializeToString()
    while (raw := await stream.read()) is not grpc.aio.EOF:
        order = ServerMessage.FromString(raw).order
        if order.HasField("draw"):
            step = ClientMessage(latents=Latents(step=order.draw.step))
            await stream.write(message + step.SerializeToString())  # two parts of a message are read as one


# Processes


def say(**facts: object) -> None:
    """Tell the process that started this one."""
    print(json.dumps(facts), flush=True)


def complain(expected: set[str], event: str, **facts: object) -> None:
    """Print events that are not expected."""
    if event not in expected:
        print(event, facts, file=sys.stderr)


def memory(name: str) -> float:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 2**10


def child(task: Mapping[str, Any]) -> None:
    """What a process of the benchmark does."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    case = Case(**task["case"])
    if "port" in task:
        return clients(case, task["port"], range(*task["range"]))
    serve = serve_bare if case.bare else serve_ours
    return serve(case)


def measure(case: Case) -> dict[str, Any]:
    """Start the processes, and wait for the server's figures.

    Raises:
        RuntimeError: a process ended too early.
    """
    processes: list[subprocess.Popen[str]] = []

    def start(**task: object) -> None:
        words = ["-m", "benchmarks.network", "--child", json.dumps({"case": asdict(case), **task})]
        processes.append(subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True))

    def told() -> dict[str, Any]:
        assert processes[0].stdout is not None
        if not (line := processes[0].stdout.readline()):
            raise RuntimeError(f"the server has ended: {case}")
        return json.loads(line)

    start()
    alarm = threading.Timer(LIMIT, processes[0].kill)
    alarm.start()
    try:
        port = told()["port"]
        middle = case.clients // 2 if case.clients >= 20 else 0
        for part in ((0, middle), (middle, case.clients)):
            if part[0] < part[1]:
                start(port=port, range=part)
        told()
        before = cpu_seconds(processes)
        figures = told()
        spent = cpu_seconds(processes) - before
        figures["cpu_seconds_of_all_per_1000_latents"] = 1e3 * spent / figures["latents"]
        if any(process.poll() is not None for process in processes[1:]):
            raise RuntimeError(f"clients have ended: {case}")
    finally:
        alarm.cancel()
        for process in processes:
            process.kill()  # all at once: nobody is to notice that another has gone
        for process in processes:
            process.communicate()
    return figures


def cpu_seconds(processes: Sequence[subprocess.Popen[str]]) -> float:
    """Processor time that processes have used, to a hundredth of a second each."""
    fields = [Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2] for process in processes]
    return sum(int(tick) for line in fields for tick in line.split()[11:13]) / os.sysconf("SC_CLK_TCK")


def certify(folder: Path) -> None:
    """Certificates for a server on this machine."""
    import trustme

    authority = trustme.CA()
    own = authority.issue_cert(HOST, "localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    own.private_key_pem.write_to_path(folder / "key.pem")
    own.cert_chain_pems[0].write_to_path(folder / "cert.pem")


# Results

FIGURES = (
    "steps_per_second",
    "latents_per_second",
    "p50_ms",
    "p99_ms",
    "cpu_seconds_of_all_per_1000_latents",
    "cpu_seconds_per_1000_latents",
    "cpu_share",
    "peak_mib",
)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(json.loads(sys.argv[2]))
    from benchmarks import common

    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 100, 1000], help="numbers of clients")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 256], help="KiB of a message of latents")
    parser.add_argument("--tls", choices=["on", "off", "both"], default="both", help="encrypted connections")
    parser.add_argument("--frozen", type=int, nargs="*", default=[100], help="numbers of clients that are frozen")
    parser.add_argument("--seconds", type=float, default=4, help="of a measurement, after a warm-up")
    parser.add_argument("--warm-up", type=float, default=1.5, help="seconds before a measurement")
    args = parser.parse_args()
    device = common.begin(args)
    found: dict[Case, list[dict[str, Any]]] = {}

    def latents(case: Case) -> float:
        figures = measure(case)
        found.setdefault(case, []).append(figures)
        return figures["latents_per_second"]

    with tempfile.TemporaryDirectory() as folder:
        certify(Path(folder))
        modes = [(count, False) for count in args.clients] + [(count, True) for count in args.frozen]
        cases = [
            Case(count, size, tls, frozen, warm_up=args.warm_up, seconds=args.seconds, folder=folder)
            for count, frozen in modes
            for size in args.sizes
            for tls in {"on": [True], "off": [False], "both": [False, True]}[args.tls]
        ]
        pairs = {case: replace(case, bare=True) for case in cases}
        both = [each for pair in pairs.items() for each in pair]
        rates = common.in_turn({each: partial(latents, each) for each in both}, args.repeats, warm_up=False)

    rows: list[list[object]] = []
    facts = []
    for case, bare in pairs.items():
        ratio = rates[case] / rates[bare]
        costs = [
            common.Timing(tuple(figures["cpu_seconds_of_all_per_1000_latents"] for figures in found[each]))
            for each in (bare, case)
        ]
        by_cpu = costs[0] / costs[1]
        fact: dict[str, Any] = {"clients": case.clients, "kib": case.kib, "tls": case.tls, "frozen": case.frozen}
        for each, name in ((case, "ours"), (bare, "bare")):
            timings = {figure: common.Timing(tuple(f[figure] for f in found[each])) for figure in FIGURES}
            rows.append(
                [
                    f"{case.clients:,} x {case.kib} KiB" + ", frozen" * case.frozen + ", TLS" * case.tls,
                    name,
                    *(f"{timings[figure].median:,.4g}" for figure in FIGURES),
                    *([ratio, f"{by_cpu.median:.3g}"] if each is case else ["", ""]),
                ]
            )
            fact[name] = {figure: timing.facts() for figure, timing in timings.items()}
            fact[name]["rss_mib"] = found[each][-1]["rss_mib"]
        facts.append(fact | {"ratio": ratio.facts(), "ratio_by_cpu": by_cpu.facts()})
    columns = (
        "clients x latents",
        "",
        "steps/s",
        "latents/s",
        "p50 ms",
        "p99 ms",
        "CPU s, all",
        "CPU s",
        "CPU",
        "peak MiB",
    )
    common.show(
        "latents over the network, and bare gRPC; CPU s: for 1,000 latents", (*columns, "ratio", "by CPU"), rows
    )
    figures = {
        "unit": "medians; of bare, a step is a latent of every client, and its time that between two of one client",
        "goals": GOALS,
        "seconds_of_a_repeat": args.seconds,
        "cases": facts,
    }
    common.write("network", args, device, figures)


if __name__ == "__main__":
    main()
