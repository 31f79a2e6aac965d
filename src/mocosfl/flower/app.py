"""The Flower app: what ``[tool.flwr.app.components]`` of pyproject.toml names."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from mocosfl.cli import print_figures
from mocosfl.flower import client as node
from mocosfl.flower.serving import serve
from mocosfl.flower.settings import FlowerSettings

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Make a run with Flower's nodes as clients."""
    console = Console(width=160)
    result = serve(FlowerSettings.of(context.run_config), grid, console=console)
    if not result.finished:
        console.print(
            "stopped; everything up to here is saved. Go on with: "
            f"flwr run . --run-config 'resume=true out=\"{result.run}\"'",
            highlight=False,
            soft_wrap=True,
        )
        return
    print_figures(result.metrics, console)
    console.print(f"run folder: {result.run}", highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    print(line, flush=True)


def _answer(
    compute: Callable[[RecordDict, node.NodeConfig, Callable[[str], None]], RecordDict],
    message: Message,
    context: Context,
) -> Message:
    return Message(compute(message.content, context.node_config, _say), reply_to=message)


@client.query("join")
def join(message: Message, context: Context) -> Message:
    """Say which client this is, and what it has."""
    return _answer(node.tell, message, context)


@client.query("latents")
def latents(message: Message, context: Context) -> Message:
    """Send the latents of many steps."""
    return _answer(node.latents, message, context)


@client.train()
def learn(message: Message, context: Context) -> Message:
    """Learn for a round, and return the client half."""
    return _answer(node.learn, message, context)
