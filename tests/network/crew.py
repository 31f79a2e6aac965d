"""Several real clients in one process, for one run after the other: [PORT, FOLDER, FIRST, LAST, KIND], as JSON, for
each. KIND is torch or numpy; torch if it is left out."""

import asyncio
import json
import sys
from pathlib import Path

import torch

from mocosfl.network.worker import TorchWorker
from mocosfl_device.client import Client
from mocosfl_device.images import Folder
from mocosfl_device.settings import JoinSettings
from mocosfl_device.worker import NumpyWorker


async def main(port: int, folder: str, first: int, last: int, kind: str = "torch") -> None:
    clients = []
    for number in range(first, last):
        images = f"{folder}/client-{number}"
        if kind == "numpy":
            worker = NumpyWorker(Folder(Path(images)), False, False, print)
        else:
            worker = TorchWorker(images, torch.device("cpu"), print)
        settings = JoinSettings(server=f"127.0.0.1:{port}", client=number)
        clients.append(Client(settings, worker, lambda text: print(text, flush=True)))
    await asyncio.gather(*(client.take_part() for client in clients))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in sys.argv[1:]:
        asyncio.run(main(*json.loads(run)))
