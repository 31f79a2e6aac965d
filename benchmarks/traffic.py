"""Accuracy against bytes: codecs, the latent cache, and clients that rest while the loss stands still.

Each case is a whole run of ``mocosfl.train`` with an evaluation, in a folder of its own under ``--runs``: finished ones
are not run again, and one that was stopped goes on. ``--init`` names a run of ``mocosfl pretrain`` that frozen clients
start from; without it only clients that learn are run. Bytes are those of latents and gradients, counted by the codecs
(``mocosfl cost`` counts the rest); what Zstandard would leave of them is measured on latents of the trained half.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import mocosfl
from benchmarks import common
from mocosfl.config import Config
from mocosfl.data.federation import federate
from mocosfl.encoder import load_encoder
from mocosfl.experiment import build, choose_device
from mocosfl.files import write_atomically
from mocosfl.latent_cache import Ask
from mocosfl.recipes import recipe
from mocosfl.run import Run
from mocosfl_device.wire import Coder

BASE = {"data.images": 5300, "data.held_out": 300 / 5300, "train.epochs": 24, "evaluation.every": 8, "model.cut": 3}
"""50 images a client, as in the paper's device setting."""
CODECS = ("fp32", "bf16", "int8", "int4", "topk")
VIEWS = (2, 4, 8, 16, 32)
FROZEN: dict[str, dict[str, Any]] = {
    **{f"{codec}, every step": {"traffic.latents": codec} for codec in CODECS},
    **{f"int8, V = {views}": {"traffic.latents": "int8", "cache.views": views} for views in VIEWS},
    "int4, V = 32": {"traffic.latents": "int4", "cache.views": 32},
    "int8, V = 8, a quarter anew": {"traffic.latents": "int8", "cache.views": 8, "cache.refresh": 0.25},
    "int8, V = 4, flip and noise": {
        "traffic.latents": "int8",
        "cache.views": 4,
        "cache.flip": 0.5,
        "cache.crop": 1,
        "cache.noise": 0.1,
    },
}
LEARNING: dict[str, dict[str, Any]] = {
    **{f"learning, {codec} both ways": {"traffic.latents": codec, "traffic.gradients": codec} for codec in CODECS},
    "learning, rests at 0.05": {"traffic.loss_threshold": 0.05},
}


def cases(args: Namespace) -> dict[str, Config]:
    """The runs that were asked for, by name."""
    found = {}
    for name, changes in {**FROZEN, **LEARNING}.items():
        frozen = name in FROZEN
        if (frozen and args.init is None) or (args.cases and name not in args.cases):
            continue
        base = BASE | ({"clients.init": args.init} if frozen else {"clients.frozen": False, "model.cut": 1})
        found[name] = recipe("taressfl-small").updated(
            base | {"data.source": args.source} | changes | common.changes(args.set) | {"recipe": name}
        )
    return found


def figures(config: Config, folder: Path) -> dict[str, Any]:
    """What a run reached, and what it cost a client."""
    result = None
    if (folder / "result.json").exists():
        earlier = Run.open(folder)
        earlier.check_resumable(config)
        result = earlier.read_json("result.json")
    if result is None:
        resume = (folder / "checkpoints").exists()
        done = mocosfl.train(config, folder, resume=resume, overwrite=not resume, console=common.console)
        if not done.finished:
            raise SystemExit(f"stopped; the same command goes on with {folder}")
        result = done.metrics
    steps = result["steps"]
    asked = result.get("asked", {Ask.LEARN.value: steps, Ask.UPLOAD.value: 0})
    sends = steps if config.clients.frozen and not config.recalls else asked[Ask.LEARN.value] + asked[Ask.UPLOAD.value]
    learns = 0 if config.clients.frozen else asked[Ask.LEARN.value]
    shape = (1, config.clients.batch, *load_encoder(folder).latent_shape)
    traffic = config.traffic
    up = 2 * sends * Coder(traffic.latents, traffic.topk).size(shape)
    down = learns * Coder(traffic.gradients, traffic.topk).size(shape)
    return {
        "changes": {**FROZEN, **LEARNING}.get(config.recipe, {}),
        "knn": result["knn"],
        "linear_probe": result["linear_probe"],
        "steps": steps,
        "steps_with_latents": sends,
        "steps_with_gradients": learns,
        "bytes_up_a_client": up,
        "bytes_down_a_client": down,
    }


def compressed(config: Config, folder: Path, images: int = 256) -> dict[str, dict[str, float]]:
    """Bytes of an image's latent by codec, and what Zstandard leaves of them, one message an image."""
    device = choose_device("cpu")
    federation = federate(config, lambda line: None)
    parts = build(config.updated({"traffic.latents": "fp32", "cache.views": 0}), federation, device)
    parts.cohort.load_state_dict(parts.cohort.state_dict() | {"half": load_encoder(folder).client.state_dict()})
    latents: list[Tensor] = []
    while sum(len(z) for z in latents) < images:
        latents.append(parts.cohort.forward().query[0])
    numbers = torch.cat(latents)[:images].numpy()
    sizes = {}
    for codec in CODECS:
        plain, packed = Coder(codec, config.traffic.topk), Coder(codec, config.traffic.topk, True)
        one = [len(packed.pack(np.ascontiguousarray(image[None, None])).data) for image in numbers]
        sizes[codec] = {"plain": plain.size((1, 1, *numbers.shape[1:])), "zstd": float(np.mean(one))}
    return sizes


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy against bytes of frozen clients, as a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    for key, marker in (("linear_probe", "o"), ("knn", "s")):
        for kept, label, fill in ((False, "new latents every step", "full"), (True, "latent cache", "none")):
            names = [n for n in results if n in FROZEN and ("cache.views" in FROZEN[n]) == kept]
            x = [results[n]["bytes_up_a_client"] / 1e6 for n in names]
            y = [results[n][key] for n in names]
            what = {"linear_probe": "linear probe", "knn": "kNN"}[key]
            colour = {"linear_probe": "C0", "knn": "C1"}[key]
            axes.plot(x, y, marker, color=colour, fillstyle=fill, label=f"{what}, {label}")
            if key == "linear_probe":
                for name, a, b in zip(names, x, y, strict=True):
                    place = (4, -9) if kept else (4, 4)
                    text = name.removesuffix(", every step")
                    axes.annotate(text, (a, b), place, textcoords="offset points", fontsize=6)
    axes.set_xscale("log")
    axes.set_xlabel("MB of latents a client sends")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def main() -> None:
    parser = common.parser(__doc__, repeats=1)
    parser.add_argument("--source", default="cifar10", help="the clients' images, as data.source")
    parser.add_argument("--init", help="run of mocosfl pretrain that frozen clients start from")
    parser.add_argument("--runs", type=Path, default=Path("runs/traffic"), help="where the runs are kept")
    parser.add_argument("--cases", nargs="+", help="names of cases; unset: all")
    parser.add_argument("--plot", type=Path, help="PNG of accuracy against bytes to write")
    args = parser.parse_args()
    device = common.begin(args)
    results: dict[str, dict[str, Any]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for name, config in cases(args).items():
        folder = args.runs / name.replace(" ", "").replace(",", "-").replace("=", "")
        results[name] = figures(config, folder)
        if config.clients.frozen and not sizes:
            sizes = compressed(config, folder)
        common.write("traffic", args, device, {"base": BASE, "results": results, "latent_bytes": sizes})
    rows = [
        [name, f"{r['knn']:.2f}", f"{r['linear_probe']:.2f}"]
        + [f"{r[f'bytes_{way}_a_client'] / 1e6:.3f}" for way in ("up", "down")]
        + [f"{r['steps_with_latents']:,} of {r['steps']:,}"]
        for name, r in results.items()
    ]
    columns = ("case", "kNN, %", "linear probe, %", "MB up a client", "MB down", "steps with latents")
    common.show("latents and gradients of one client", columns, rows)
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
