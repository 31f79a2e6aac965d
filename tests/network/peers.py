"""What the tests of the network share: servers, clients, and what stands between them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from torch import nn
from workers import SHAPE, FakeWorker

from mocosfl.config import Config
from mocosfl.network.cohort import RemoteCohort
from mocosfl.network.settings import ServeSettings
from mocosfl_device.client import Client
from mocosfl_device.protocol_pb2 import ClientMessage, Join, Latents, Ready, ServerMessage
from mocosfl_device.settings import JoinSettings
from mocosfl_device.wire import METHOD, PROTOCOL, Coder, channel_options

PATIENCE = 150
"""Seconds after which something hangs. Nothing is expected to take nearly as long."""
SOAK = bool(os.environ.get("MOCOSFL_SOAK"))
"""Whether there is time: the long version of the tests."""
ENVIRONMENT = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def eventually(done: Callable[[], Any], what: str = "it") -> Any:
    """Wait until something is true; returns it."""
    deadline = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.socket() as handle:
        handle.bind(("127.0.0.1", 0))
        return handle.getsockname()[1]


# Processes


class Command:
    """``mocosfl ...`` in a process of its own, and what it prints."""

    def __init__(self, log: Path, *args: object, script: Path | None = None, **more: Any) -> None:
        self.log = log
        what = ["-m", "mocosfl"] if script is None else [str(script)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *what, *map(str, args)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT | more.pop("environment", {}),
                **more,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until it has printed something so many times; returns the last."""

        def found() -> re.Match[str] | None:
            matches = list(re.finditer(pattern, self.said))
            if len(matches) >= times:
                return matches[times - 1]
            assert self.process.poll() is None, f"ended without {pattern!r}:\n{self.said[-3000:]}"
            return None

        return eventually(found, f"{pattern!r} in {self.log.name}:\n{self.said[-3000:]}")

    def port(self) -> int:
        return int(self.until(r"listening on \S*:(\d+)")[1])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def end(self) -> int:
        """Wait for its end; returns the exit status."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.log.name} does not end:\n{self.said[-3000:]}") from None

    def ends_well(self) -> str:
        assert self.end() == 0, self.said[-3000:]
        return self.said


class Commands:
    """Starts processes in a folder; none outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []

    def __call__(self, *args: object, **more: Any) -> Command:
        name = f"{len(self.started)}-{more['script'].stem if 'script' in more else args[0]}.log"
        command = Command(self.folder / name, *args, **more)
        self.started.append(command)
        return command

    def serve(self, config: Config | None, *args: object, port: int = 0, out: str = "run", **more: Any) -> Command:
        """A server; without a configuration it resumes its run."""
        patience = ["--step-timeout", 5, "--heartbeat", 3, "--listen", f"127.0.0.1:{port}"]
        if config is None:
            return self("serve", "--resume", self.folder / out, *patience, *args, **more)
        path = self.folder / f"{out}.yaml"
        path.write_text(config.to_yaml())
        return self("serve", path, "--out", self.folder / out, *patience, *args, **more)

    def join(self, port: int, data: Path, *args: object, **more: Any) -> Command:
        return self("join", f"127.0.0.1:{port}", "--data", data, *args, **more)

    def crew(self, *runs: list) -> Command:
        """Several real clients in one process: PyTorch is imported once."""
        return self(*map(json.dumps, runs), script=Path(__file__).parent / "crew.py")

    def fakes(self, port: int, *numbers: int) -> Command:
        """Clients that compute nothing, in one process."""
        return self(port, *numbers, script=Path(__file__).parent / "workers.py")

    def hall(self, *runs: list) -> Command:
        """A server process for several runs, one after the other."""
        return self(*map(json.dumps, runs), script=Path(__file__).parent / "hall.py")

    def stop(self) -> None:
        for command in self.started:
            if command.process.poll() is None:
                command.process.send_signal(signal.SIGCONT)
                command.process.kill()
            command.process.wait()


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON log; the last may be half-written."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line}


def last_figures(run: Path) -> dict[str, float]:
    """The network's figures in the last line that has them."""
    return [line for line in lines(run / "metrics.jsonl") if "socket_bytes_in" in line][-1]


def saved_step(run: Path) -> int:
    steps = [int(path.stem[5:]) for path in run.glob("checkpoints/step-*.pt")]
    return max(steps, default=-1)


# A loop in a thread, and what lives in it


class Loop:
    """An asyncio loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.start(work).result(PATIENCE)

    def stop(self) -> None:
        async def cancel() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Proxy:
    """Carries TCP to a port, and does to it what networks do.

    Attributes:
        delay: returns the seconds that a piece waits, either way.
        hole: what arrives is swallowed, and nobody is told.
        shut: nobody is let in.
        source: address that it connects from.
        connections: so far.
    """

    def __init__(self, loop: Loop, target: int) -> None:
        self.loop, self.target = loop, target
        self.delay: Callable[[], float] = lambda: 0.0
        self.hole = False
        self.shut = False
        self.source: str | None = None
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self.server = loop.run(asyncio.start_server(self._carry, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        own = None if self.source is None else (self.source, 0)
        try:
            if self.shut:
                raise ConnectionError
            there, back = await asyncio.open_connection("127.0.0.1", self.target, local_addr=own)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        try:
            await asyncio.gather(self._pipe(reader, back, writer), self._pipe(there, writer, back))
        finally:
            self._writers -= {writer, back}
            for end in (writer, back):
                end.transport.abort()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: Any) -> None:
        try:
            while piece := await reader.read(2**16):
                if pause := self.delay():
                    await asyncio.sleep(pause)
                if not self.hole:
                    writer.write(piece)
                    await writer.drain()
            if not self.hole:
                writer.write_eof()
        except OSError:
            writer.transport.abort()
            other.transport.abort()

    def stop(self) -> None:
        async def close() -> None:
            self.server.close()

        self.loop.run(close())

    def cut(self, chance: random.Random | None = None) -> None:
        """Reset every connection, or some: RST both ways. To be called in the loop."""
        for end in list(self._writers):
            if chance is None or chance.random() < 0.5:
                handle = end.get_extra_info("socket")
                handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.transport.abort()


# A server whose client half is one linear layer


class Host:
    """A real ``RemoteCohort`` in this process, and the loop that ``Trainer`` would run around it."""

    def __init__(
        self, changes: Mapping[str, object] | None = None, half: nn.Module | None = None, **settings: Any
    ) -> None:
        config = {"data.channels": 1, "clients.number": 3, "clients.batch": 2, "partition.kind": "iid"}
        self.config = Config().updated(config | dict(changes or {}))
        self.told: list[dict[str, Any]] = []
        self.settings = ServeSettings(
            **({"listen": "127.0.0.1:0", "heartbeat": 1.0, "step_timeout": 60.0, "insecure": False} | settings)
        )
        torch.manual_seed(0)
        self.cohort = RemoteCohort(
            half or nn.Linear(2, 3), self.config, self.settings, SHAPE, 1, 8, torch.device("cpu"), self._note
        )
        self.exchange = self.cohort.exchange
        self.service = self.exchange.service
        try:
            self.cohort.start()
        except BaseException:
            self.cohort.stop(False)
            raise
        self.port = self.service.port
        self.steps = 0
        self.stopping, self.deadline = False, time.monotonic() + PATIENCE
        self.follow(2**40)
        self._stopped = False

    def _note(self, event: str, **facts: Any) -> None:
        self.told.append({"event": event} | facts)

    def events(self, event: str, **facts: Any) -> list[dict[str, Any]]:
        wanted = {"event": event} | facts
        return [told for told in list(self.told) if wanted.items() <= told.items()]

    @property
    def counts(self) -> Mapping[str, int]:
        return self.exchange.counts + self.service.counts

    def follow(self, steps: int) -> None:
        self.cohort.follow(steps, None, lambda: self.stopping or time.monotonic() > self.deadline)

    def begin(self, clients: int) -> None:
        """Wait for so many clients, and let them begin."""
        self.deadline = time.monotonic() + PATIENCE
        _, mean, std = self.cohort.gather(clients)
        self.cohort.begin(mean, std)

    def step(self, sync: bool = False) -> Any:
        """One step; the gradient at an image's latent is that latent."""
        self.deadline = time.monotonic() + PATIENCE
        latents = self.cohort.forward()
        if not self.exchange.frozen:
            self.cohort.backward(latents.query.clone(), 0.5)
        self.steps += 1
        if sync:
            self.cohort.synchronise()
        return latents

    def stop(self, finished: bool = True) -> None:
        if not self._stopped:
            self._stopped = True
            self.cohort.stop(finished)


class Member:
    """A real client, with a worker that computes nothing, in a loop."""

    def __init__(self, loop: Loop, port: int, worker: Any = None, **settings: Any) -> None:
        self.loop, self.worker = loop, worker or FakeWorker()
        self.said: list[str] = []
        self.client = Client(JoinSettings(server=f"127.0.0.1:{port}", **settings), self.worker, self.said.append)
        self.future = loop.start(self.client.take_part())

    def end(self) -> None:
        """Wait until it ends; raises what ended it."""
        self.future.result(PATIENCE)

    def leave(self) -> None:
        self.future.cancel()


class Raw:
    """A peer that says what it likes. Use as ``async with Raw(port) as peer``."""

    def __init__(self, port: int, compression: grpc.Compression | None = None) -> None:
        self.port, self.compression = port, compression

    async def __aenter__(self) -> Raw:
        options = [*channel_options(2**30), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options, self.compression)
        self.stream: Any = self.channel.stream_stream(METHOD)()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stream.cancel()
        await self.channel.close()

    async def say(self, message: ClientMessage | bytes) -> None:
        raw = message if isinstance(message, bytes) else message.SerializeToString()
        await asyncio.wait_for(self.stream.write(raw), PATIENCE)

    async def hear(self) -> ServerMessage | None:
        """The next message; None at the end of the stream."""
        raw = await asyncio.wait_for(self.stream.read(), PATIENCE)
        return None if raw is grpc.aio.EOF else ServerMessage.FromString(raw)

    async def goodbye(self) -> Any:
        """What it is told at the end; nothing but orders may come before."""
        while (message := await self.hear()) is not None:
            if message.HasField("goodbye"):
                assert await self.hear() is None
                return message.goodbye
            assert message.HasField("order"), message
        raise AssertionError("the stream ended without a goodbye")

    async def join(self, client: int | None = 0, **changes: Any) -> ServerMessage:
        """Say hello and who it is; returns the answer."""
        self.hello = (await self.hear()).hello
        await self.say(join_of(self.hello, client, **changes))
        return await self.hear()

    async def enter(self, client: int | None = 0, **changes: Any) -> ServerMessage:
        """Join and be ready; returns the welcome."""
        answer = await self.join(client, **changes)
        assert answer.HasField("welcome"), answer
        await self.say(READY)
        return answer

    async def draw(self) -> int:
        """Wait to be asked for latents; returns the step."""
        while not (order := (await self.hear()).order).HasField("draw"):
            assert order.HasField("weights") or order.HasField("gradients") or order.HasField("collect"), order
        return order.draw.step


def join_of(hello: Any, client: int | None, **changes: Any) -> ClientMessage:
    facts = {"protocol": PROTOCOL, "nonce": hello.nonce, "images": 10, "capabilities": ["learn", "forward"]}
    return ClientMessage(join=Join(**(facts | {"client": client, "software": "test"} | changes)))


READY = ClientMessage(ready=Ready(images=10, sums=[64_000], squares=[12_800_000]))


def latents_of(step: int, query: np.ndarray | None = None, key: np.ndarray | None = None) -> ClientMessage:
    good = np.ones((1, 2, *SHAPE), np.float32)
    pair = {"query": Coder().pack(good if query is None else query), "key": Coder().pack(good if key is None else key)}
    return ClientMessage(latents=Latents(step=step, **pair))
