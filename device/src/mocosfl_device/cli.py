"""The command ``mocosfl-client``: takes part in a run on a device without PyTorch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mocosfl_device import __version__
from mocosfl_device.client import Client
from mocosfl_device.errors import MocosflError
from mocosfl_device.images import SETTLED, Source, source_of
from mocosfl_device.settings import JoinSettings
from mocosfl_device.worker import NumpyWorker

LARGEST = 32 * 2**20
"""Bytes of the largest message that the server may send: weights of a client half for a small device."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="mocosfl-client",
        description="Take part in the run of a mocosfl server, with images that stay here. Needs no PyTorch.",
        allow_abbrev=False,
    )
    add = options.add_argument
    add("server", metavar="HOST:PORT")
    add("--data", type=Path, required=True, help="folder of images or of parquet files, or a parquet file")
    add("--grows", action="store_true", help="images are added to the folder meanwhile, by a camera say: use them too")
    add("--image-column", help="of parquet files, that holds the images; default: the only one that does")
    add("--skip-corrupt", action="store_true", help="leave out images that cannot be decoded, and say so")
    add("--client", type=int, help="number to join as, where the server asks for no token; default: any free one")
    add("--token", help="of mocosfl enroll; default: the file's, or MOCOSFL_TOKEN in the environment")
    add("--token-file", type=Path, help="file that holds the token")
    add("--tls-ca", type=Path, help="certificate that signs the server's, PEM; default: those that the system trusts")
    add("--tls-cert", type=Path, help="the client's own certificate, PEM, where the server asks for one")
    add("--tls-key", type=Path, help="its private key, PEM")
    add("--plain", action="store_true", help="without TLS: whoever is on the way can read the token and the latents")
    add("--give-up", type=float, metavar="SECONDS", help="end after so long without a run; default: try for ever")
    add("--half", metavar="SHA256", help="of the frozen client half that the server prints: let no other see an image")
    add("--version", action="version", version=f"mocosfl-client {__version__}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name. Unset: those of this process.

    Returns:
        Exit status: 0, or 1 for an error that the message explains, 130 after Ctrl-C. Wrong usage exits with 2.
    """
    given = vars(parser().parse_args(argv))
    data, grows, column, skip = (given.pop(name) for name in ("data", "grows", "image_column", "skip_corrupt"))
    begun = time.monotonic()
    try:
        settings = JoinSettings(**given)
        source = source_of(data, grows, column, _say)
        _await_first(source, data)
        worker = NumpyWorker(source, skip, grows, _say)
        client = Client(settings, worker, _say, LARGEST)
        finished = False
        try:
            client.run()
            finished = True
        finally:
            _report(client, worker, time.monotonic() - begun, finished)
    except (MocosflError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _await_first(source: Source, data: Path) -> None:
    if not len(source):
        _say(f"waiting for the first image in {data}")
    while not len(source):
        time.sleep(SETTLED / 2)
        source.look()


def _report(client: Client, worker: NumpyWorker, seconds: float, finished: bool) -> None:
    """What the client has spent; that of tensors, which takes another step, where the run has ended well."""
    traffic, cpu = client.traffic, time.process_time()
    images = client.steps * worker.batch if client.steps else 0
    each = f", {1000 * cpu / images:.1f} ms an image" if images else ""
    _say(f"{client.steps:,} steps, {images:,} images in {seconds:,.1f} s; {cpu:,.1f} s of CPU{each}")
    peak, tensors = peak_memory(), worker.measure() if finished else 0
    of_tensors = f"{tensors / 1e6:.3f} MB of tensors in a step, " if tensors else ""
    _say(f"memory: {of_tensors}{peak / 2**20:.1f} MiB the whole process")
    _say(
        f"traffic: {traffic.sent / 1e6:,.3f} MB sent and {traffic.received / 1e6:,.3f} MB received across the socket; "
        f"tensors alone are {traffic.tensors_sent / 1e6:,.3f} and {traffic.tensors_received / 1e6:,.3f} MB"
    )


def peak_memory() -> int:
    """Most bytes of memory that this process has had in use (resident) so far."""
    with suppress(OSError):  # Linux; getrusage there counts whoever started this process too
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
