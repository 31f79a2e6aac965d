"""Several real clients in one process, for one run after the other: [PORT, FOLDER, FIRST, LAST], as JSON, for each."""

import asyncio
import json
import sys

import torch

from mocosfl.network.worker import TorchWorker
from mocosfl_device.client import Client
from mocosfl_device.settings import JoinSettings


async def main(port: int, folder: str, first: int, last: int) -> None:
    clients = []
    for number in range(first, last):
        worker = TorchWorker(f"{folder}/client-{number}", torch.device("cpu"), print)
        settings = JoinSettings(server=f"127.0.0.1:{port}", client=number)
        clients.append(Client(settings, worker, lambda text: print(text, flush=True)))
    await asyncio.gather(*(client.take_part() for client in clients))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in sys.argv[1:]:
        asyncio.run(main(*json.loads(run)))
