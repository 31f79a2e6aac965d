"""The command ``mocosfl``: each sub-command parses, calls one function, and prints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from mocosfl import study
from mocosfl.config import AttackSettings, Config, DataSettings, EvaluationSettings, ModelSettings
from mocosfl.errors import MocosflError, ReportedElsewhere, SettingError, nearest
from mocosfl.network.settings import ServeSettings
from mocosfl.recipes import recipe
from mocosfl.trust import trust_code
from mocosfl_device.settings import JoinSettings

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

console = Console()
errors = Console(stderr=True)

Settings = Annotated[Config, tyro.conf.arg(name="")]


@dataclass
class TrainArguments:
    """Train an encoder. RECIPE is a name from `mocosfl recipes` (default: digits) or a YAML file."""

    config: Settings
    out: Path | None = None
    """Run folder. Unset: runs/RECIPE-DATE-TIME."""
    resume: Path | None = None
    """Go on with this run folder from its last checkpoint, with its own settings."""
    overwrite: bool = False
    """Delete the run in the folder first."""
    dashboard: Annotated[str | None, tyro.conf.arg(metavar="[HOST:]PORT")] = None
    """Show the run while it is under way at http://127.0.0.1:PORT/, to this machine alone; with HOST, to whoever
    reaches that address, without a password and without pictures. PORT 0: any free one. Unset: nowhere."""


@dataclass
class PretrainArguments(TrainArguments):
    """Train both halves on the server so that the client half resists inversion (TAResSFL). RECIPE is a name from
    `mocosfl recipes` or a YAML file."""


@dataclass
class EvaluateArguments:
    """How good an encoder is on labelled test images: kNN before and after training, linear probes by SGD and by
    L-BFGS, alignment and uniformity of augmented views; fine-tuning with few labels, and a map of the features, where
    asked for. Figures of a run go to evaluation.json in its folder. Nothing is chosen on test images."""

    run: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="RUN|FOLDER|FILE")]] = None
    """A run folder; a folder that `mocosfl export` has written; or a file of weights: of one of those, or of
    others (.safetensors, .pt or .pth, named as in torchvision, timm or here), with --arch, --size, --mean and --std."""
    data: str | None = None
    """Other labelled images, or those for an encoder without a run, as --data.source of training: cifar100, a folder
    and so on. They are brought to the encoder's size and channels. Unset: those of the run."""
    image_column: str | None = None
    """Column of the images in --data. Unset: the one column that holds images."""
    label_column: str | None = None
    """Column of the labels in --data. Unset: label, labels, fine_label or the one class column."""
    semi_supervised: bool = False
    """Also fine-tune the whole encoder with 10 % and with 1 % of the labels."""
    map: Literal["tsne", "umap"] | None = None
    """Also draw test images as points, placed by their features with t-SNE or UMAP (pip install 'mocosfl[umap]'), as
    evaluation.png, or evaluation-transfer-SET.png with --data; beside the file of --out under its name."""
    out: Path | None = None
    """File for the figures instead (.json). Without a run folder, unset: they are printed only."""
    seed: int | None = None
    """Of probe, labelled images, fine-tuning and views. Unset: the run's, or 0. Without a run folder it is needed where
    --data has no test split: the seed of the run that the encoder is of, so that the same images are set aside."""
    arch: str | None = None
    """Of weights of others: resnet18, vgg11, mobilenetv2, vit_tiny and so on, as model.backbone."""
    size: int | None = None
    """Height and width of its images in pixels."""
    mean: tuple[float, ...] = ()
    """Mean of each channel that it was trained with, for pixels in [0, 1]: 0.485 0.456 0.406 of ImageNet. Unset: that
    in the file, if it is of a whole Encoder of this package."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel: 0.229 0.224 0.225 of ImageNet."""
    stem: Literal["32", "64", "224"] | None = None
    """How it begins, as model.stem. Unset: of a ResNet 224 or 32, by its first convolution; of a MobileNetV2 224; of a
    vision transformer by its patches; with names of this package by the size of the images."""
    prefix: str | None = None
    """Of its names in the file, such as module.encoder_q. with the dot. Unset: found, if there is but one network."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto."""


@dataclass
class AttackArguments:
    """Try to turn the latents of a run back into images; privacy.json and reconstructions.png in its folder tell."""

    attack: Annotated[AttackSettings, tyro.conf.arg(name="")]
    run: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="RUN")]] = None
    """The run folder."""
    compare: tuple[Path, ...] = ()
    """Instead: put runs that have been attacked side by side, as a table and a picture."""
    out: Path = Path("privacy.png")
    """Picture of --compare."""


@dataclass
class ExportArguments:
    """Write the encoder of a finished run for use elsewhere: with a model card in the layout of the Hugging Face hub,
    as ONNX, for ResNets of torchvision and timm; and the client half alone."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    out: Path | None = None
    """Folder to write. Unset: export in the run folder."""
    formats: tuple[Literal["huggingface", "onnx", "client", "torchvision"], ...] = ()
    """What to write. Unset: all that this encoder can have; what it cannot is said."""
    license: str | None = None
    """Licence of the weights for the model card, such as apache-2.0. Unset: unknown."""
    overwrite: bool = False
    """Replace the export in the folder."""


@dataclass
class EmbedArguments:
    """Compute features of your images with a trained encoder, and write them to a parquet file."""

    run: tyro.conf.Positional[Path]
    """The run folder, or a folder that `mocosfl export` has written."""
    data: str
    """The images: a folder of images, a parquet file or folder, or anything else that --data.source takes."""
    out: Path = Path("features.parquet")
    """File to write."""
    image_column: str | None = None
    """Column of the images. Unset: the one column that holds images."""
    label_column: str | None = None
    """Column of the labels. Unset: label, labels, fine_label or the one class column."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, and count them. Off: the first one ends the command, with its path."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto."""
    overwrite: bool = False
    """Replace the file if it is there."""


@dataclass
class ReportArguments:
    """Write one page that shows a run, or several beside each other: settings, curves, who holds what, bytes, time,
    figures, examples, privacy. It needs no network. Examples are test images, or else held-out ones; the privacy audit
    shows training images of the client that was attacked."""

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
    """The run folders. A run may be under way."""
    out: Path | None = None
    """The page. Unset: report.html in the run folder, or here for several runs."""
    images: bool = True
    """Put pictures into the page. Off: none, for pages that go to others; settings stay, with the paths in them."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto."""


@dataclass
class ServeArguments:
    """Train with clients that join over the network. RECIPE is a name from `mocosfl recipes` or a YAML file."""

    config: Settings
    serve: Annotated[ServeSettings, tyro.conf.arg(name="")]
    out: Path | None = None
    """Run folder. Unset: runs/RECIPE-serve-DATE-TIME."""
    resume: Path | None = None
    """Go on with this run folder from its last checkpoint, with its own settings; clients come back by themselves."""
    overwrite: bool = False
    """Delete the run in the folder first."""
    dashboard: Annotated[str | None, tyro.conf.arg(metavar="[HOST:]PORT")] = None
    """Show the run and its clients while it is under way at http://127.0.0.1:PORT/, to this machine alone; with HOST,
    to whoever reaches that address, without a password and without pictures. PORT 0: any free one. Unset: nowhere."""


@dataclass
class JoinArguments:
    """Take part in the run of a server, with images that stay here."""

    join: Annotated[JoinSettings, tyro.conf.arg(name="")]
    data: str
    """This client's images: a folder of images or of parquet files, or anything else that --data.source takes."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto."""
    threads: int = 1
    """CPU threads; a client half is small."""


@dataclass
class EnrollArguments:
    """Give clients tokens to join with. They are printed once; the file holds their hashes alone."""

    clients: tyro.conf.Positional[tuple[str, ...]]
    """Numbers of clients, such as 0 7 or 0-99."""
    file: Path = Path("clients.json")
    """The clients' file of `mocosfl serve --clients-file`. A server that runs notices changes."""
    out: Path | None = None
    """Write each token to a file client-NUMBER.token in this folder, readable by its owner alone, instead of printing
    it."""
    revoke: bool = False
    """Strike the clients off instead. Who is connected stays until it leaves."""


@dataclass
class PartitionArguments:
    """Print and draw how the images of a recipe are spread over its clients."""

    config: Settings
    out: Path = Path("partition.png")
    """Picture to write."""
    export: Path | None = None
    """Write every client's images as PNG files to a folder client-NUMBER in this one, to try `mocosfl join` with."""


@dataclass
class CostArguments:
    """What a run costs each client and the server, before it is made, beside full federated learning (FL-BYOL). RECIPE
    is a name from `mocosfl recipes` (default: digits) or a YAML file."""

    config: Settings
    device: str = "pi4"
    """What clients run on: pi4, pi5, pi-zero-2w or jetson-nano."""
    link: float | None = None
    """Mbit a second, either way. Unset: the device's own network at its best."""
    images: int | None = None
    """Training images of all clients together. Unset: those of data.source, which must be a folder or well known."""
    paper: bool = False
    """Instead: the paper's table 1 and figure 7, counted anew."""
    json: Path | None = None
    """Write all figures to this file too."""


@dataclass
class ModelsArguments:
    """What each cut of a backbone leaves on the client: parameters and FLOPs of the forward pass on either side, and
    the latents. NAME is a backbone as model.backbone takes it; without one: a line for each that has a name."""

    size: int = 32
    """Height and width of the images in pixels."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    width: int = 64
    """As model.width."""
    stem: Literal["32", "64", "224"] | None = None
    """As model.stem."""
    bottleneck: str = "none"
    """As model.bottleneck."""
    pooling: Literal["token", "mean"] | None = None
    """As model.pooling."""
    json: Path | None = None
    """Write all figures to this file too."""


def _base(args: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration that the flags change, and the flags: a recipe, a YAML file, or a run to resume."""
    rest = list(args)
    given = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if given is not None:
        return (Config.from_yaml(given) if given.endswith((".yaml", ".yml")) else recipe(given)), rest
    for flag in ("--resume", "--clients.init"):
        for place, word in enumerate(rest):
            folder = word.partition("=")[2] if word.startswith(f"{flag}=") else None
            if word == flag and place + 1 < len(rest):
                folder = rest[place + 1]
            if folder is not None:
                from mocosfl.run import Run

                return Run.open(folder).config, rest
    return recipe("digits"), rest


def _train(args: Sequence[str]) -> int:
    from mocosfl.experiment import train

    return _run(args, "train", TrainArguments, train)


def _pretrain(args: Sequence[str]) -> int:
    from mocosfl.experiment import pretrain

    return _run(args, "pretrain", PretrainArguments, pretrain)


def _run(args: Sequence[str], command: str, arguments: type[TrainArguments], run: Callable[..., Any]) -> int:
    """Train or pre-train; both are called alike."""
    config, flags = _base(args)
    given = tyro.cli(arguments, prog=f"mocosfl {command} [RECIPE]", args=flags, default=arguments(config))
    return _to_the_end(command, given, run)


def _to_the_end(command: str, given: TrainArguments | ServeArguments, run: Callable[..., Any]) -> int:
    """Make a run, and print what came of it."""
    if given.resume is not None and (given.out is not None or given.overwrite):
        errors.print("--resume goes on in its own folder: leave out --out and --overwrite", highlight=False)
        return 2
    suffix = "" if command == "train" else f"-{command}"
    default = Path("runs") / f"{given.config.recipe}{suffix}-{datetime.now():%Y%m%d-%H%M%S}"
    out = given.resume or given.out or default
    with contextlib.ExitStack() as stack:
        dashboard = None
        if given.dashboard is not None and not console.quiet:  # of several processes the first one shows the run
            from mocosfl.reporting.dashboard import Dashboard

            say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
            dashboard = stack.enter_context(Dashboard(given.dashboard, out, say))
        result = run(
            given.config,
            out=out,
            resume=given.resume is not None,
            overwrite=given.overwrite,
            console=console,
            callbacks=() if dashboard is None else (dashboard,),
        )
        status = _tell(command, result)
        if dashboard is not None:
            dashboard.finish()
    return status


def _tell(command: str, result: Any) -> int:
    """Print what came of a run."""
    if not result.finished:
        if not console.quiet:
            errors.print(
                f"stopped; everything up to here is saved. Go on with: mocosfl {command} --resume {result.run}",
                highlight=False,
                soft_wrap=True,
            )
        return INTERRUPTED
    print_figures(result.metrics)
    console.print(f"run folder: {result.run}", highlight=False, soft_wrap=True)
    if command == "pretrain":
        console.print(
            f"next: mocosfl train --clients.init {result.run} --clients.frozen", highlight=False, soft_wrap=True
        )
    return 0


def _evaluate(args: Sequence[str]) -> int:
    parsed = partial(tyro.cli, EvaluateArguments, prog="mocosfl evaluate", args=args)
    given = parsed()
    if given.run is None:
        errors.print("name a run, or another encoder", highlight=False)
        return 2
    from mocosfl.evaluating import evaluate
    from mocosfl.foreign import open_encoder
    from mocosfl.run import Run

    if (given.run / "config.yaml").is_file():  # its settings are those that the flags change
        given = parsed(default=EvaluateArguments(evaluation=Run.open(given.run).config.evaluation))
    of_weights = {name: getattr(given, name) for name in ("arch", "size", "mean", "std", "stem", "prefix")}
    figures = evaluate(
        open_encoder(given.run, **of_weights) if any(of_weights.values()) else given.run,
        console,
        given.device,
        data=given.data,
        image_column=given.image_column,
        label_column=given.label_column,
        settings=given.evaluation,
        semi_supervised=given.semi_supervised,
        feature_map=given.map,
        out=given.out,
        seed=given.seed,
    )
    print_figures(figures)
    return 0


def _report(args: Sequence[str]) -> int:
    given = tyro.cli(ReportArguments, prog="mocosfl report", args=args)
    if not given.runs:
        errors.print("name a run, or several to see them beside each other", highlight=False)
        return 2
    from mocosfl.experiment import choose_device
    from mocosfl.reporting.examples import examples
    from mocosfl.reporting.page import check_replaceable, names_of, page, write
    from mocosfl.reporting.report import Reader
    from mocosfl.reporting.sections import Shown

    names = names_of(given.runs)
    out = given.out or (given.runs[0] if len(given.runs) == 1 else Path()) / "report.html"
    if out.is_dir():
        raise SettingError(f"out={out}: that is a folder; name a file, such as {out / 'report.html'}")
    if out != given.runs[0] / "report.html":  # that one is the run's own, whatever version wrote it
        check_replaceable(out)
    device = choose_device(given.device)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    contents = [Reader(path).read() for path in given.runs]
    shown = [Shown(name, found, examples(found.path, device, say)) for name, found in zip(names, contents, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write(page(shown, images=given.images), out)
    say(f"report: {out}")
    return 0


def _attack(args: Sequence[str]) -> int:
    given = tyro.cli(AttackArguments, prog="mocosfl attack", args=args, default=AttackArguments(AttackSettings()))
    from mocosfl.privacy.audit import audit, compare
    from mocosfl.reporting import privacy

    if (given.run is None) == (not given.compare):
        errors.print("name one run to attack, or several after --compare", highlight=False)
        return 2
    if given.run is None:
        rows = compare(given.compare)
        console.print(privacy.comparison(rows))
        if any(row["audit"] != rows[0]["audit"] for row in rows):
            console.print(
                "note: the runs were not attacked with the same settings, or not as many images; see privacy.json"
            )
        given.out.parent.mkdir(parents=True, exist_ok=True)
        privacy.draw_comparison(rows, given.out)
        console.print(f"picture: {given.out}", highlight=False, soft_wrap=True)
        return 0
    from mocosfl.experiment import choose_device, prepared
    from mocosfl.run import Run

    device = choose_device(given.attack.device)
    with prepared(device):
        found = audit(
            given.run, given.attack, device, partial(console.print, highlight=False, markup=False, soft_wrap=True)
        )
    run = Run.open(given.run)
    run.write_json("privacy.json", found.report)
    picture = run.path / "reconstructions.png"
    privacy.draw_reconstructions(found.originals, found.reconstructions, found.report, picture)
    console.print(privacy.table(found.report))
    console.print(f"picture: {picture}", highlight=False, soft_wrap=True)
    return 0


def _export(args: Sequence[str]) -> int:
    given = tyro.cli(ExportArguments, prog="mocosfl export", args=args)
    from mocosfl.exporting.export import export

    done = export(given.run, given.out, given.formats, given.license, given.overwrite)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for path, what in done.files.items():
        say(f"{path}: {what}")
    for name, reason in done.left_out.items():
        say(f"left out, {name}: {reason}")
    return 0


def _embed(args: Sequence[str]) -> int:
    given = tyro.cli(EmbedArguments, prog="mocosfl embed", args=args)
    from mocosfl.embedding import embed

    embed(
        given.run,
        given.data,
        given.out,
        image_column=given.image_column,
        label_column=given.label_column,
        skip_corrupt=given.skip_corrupt,
        device=given.device,
        overwrite=given.overwrite,
        console=console,
    )
    return 0


def print_figures(metrics: dict[str, Any], console: Console = console) -> None:
    """The accuracies of a run, as a table, if it has any."""
    rows = [
        ("kNN of the untrained encoder", "knn_untrained"),
        ("kNN", "knn"),
        ("linear probe", "linear_probe"),
        ("linear probe by L-BFGS", "logistic_probe"),
        ("fine-tuned with 10 % of the labels", "finetune_10"),
        ("fine-tuned with 1 % of the labels", "finetune_1"),
    ]
    if not any(key in metrics for _, key in rows):
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"on {metrics['test_images']:,} test images")
    table.add_column("accuracy", justify="right")
    for label, key in rows:
        if key in metrics:
            table.add_row(label, f"{metrics[key]:.2f} %")
    console.print(table)
    if metrics.get("uniformity") is not None:
        console.print(
            f"alignment {metrics['alignment']:.4f}, uniformity {metrics['uniformity']:.4f} (less is better)",
            highlight=False,
        )


def _recipes(args: Sequence[str]) -> int:
    return study.recipes(args, console)


def _sweep(args: Sequence[str]) -> int:
    return study.sweep(args, console, errors)


def _compare(args: Sequence[str]) -> int:
    return study.compare(args, console, errors)


def _partition(args: Sequence[str]) -> int:
    config, flags = _base(args)
    given = tyro.cli(
        PartitionArguments,
        prog="mocosfl partition [RECIPE]",
        args=flags,
        default=PartitionArguments(config),
    )
    from mocosfl.data.federation import federate
    from mocosfl.reporting.partition import draw, table

    federation = federate(given.config, partial(console.print, highlight=False, markup=False, soft_wrap=True))
    counts, classes = federation.counts
    if counts is None:
        counts = federation.partition.sizes[:, None]
    console.print(table(counts, classes))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw(counts, classes, given.out, f"{given.config.data.source}, {len(counts)} clients")
    console.print(f"picture: {given.out}", highlight=False, soft_wrap=True)
    if given.export is not None:
        from mocosfl.data.federation import export

        folders = export(federation, given.export)
        console.print(f"images: {folders[0]} to {folders[-1].name}", highlight=False, soft_wrap=True)
    return 0


def _cost(args: Sequence[str]) -> int:
    config, flags = _base(args)
    given = tyro.cli(CostArguments, prog="mocosfl cost [RECIPE]", args=flags, default=CostArguments(config))
    from mocosfl.footprint import cost, devices
    from mocosfl.reporting.cost import server_table, table

    device = devices.device(given.device, given.link)
    found = cost.of_paper(device) if given.paper else cost.of_recipe(given.config, device, given.images)
    console.print(table(found))
    if found.server is not None:
        console.print(server_table(found.server))
    for note in found.notes:
        console.print(f"- {note}", highlight=False, markup=False)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found.facts(), indent=1) + "\n", encoding="utf-8")
        console.print(f"figures: {given.json}", highlight=False, soft_wrap=True)
    return 0


def _models(args: Sequence[str]) -> int:
    flags = list(args)
    name = flags.pop(0) if flags and not flags[0].startswith("-") else None
    given = tyro.cli(ModelsArguments, prog="mocosfl models [NAME]", args=flags)
    DataSettings(size=given.size)  # raises what training would
    from mocosfl.footprint.backbones import all_cuts, cuts_of
    from mocosfl.reporting.backbones import overview, table

    settings = ModelSettings(
        backbone=name or "resnet18",
        width=given.width,
        stem=given.stem if name is not None else None,
        bottleneck=given.bottleneck,
        pooling=given.pooling if name is not None else None,
    )
    if name is None:
        if given.stem or given.pooling:
            raise SettingError("--stem and --pooling do not mean something to every backbone; name one")
        found = all_cuts(settings, given.channels, given.size)
        if not found:
            raise SettingError(f"bottleneck={given.bottleneck}: fits no backbone on images of {given.size} pixels")
        console.print(overview(found))
        facts: Any = [cuts.facts() for cuts in found]
    else:
        cuts = cuts_of(settings, given.channels, given.size)
        console.print(table(cuts))
        facts = cuts.facts()
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        console.print(f"figures: {given.json}", highlight=False, soft_wrap=True)
    return 0


def _serve(args: Sequence[str]) -> int:
    config, flags = _base(args)
    given = tyro.cli(
        ServeArguments, prog="mocosfl serve [RECIPE]", args=flags, default=ServeArguments(config, ServeSettings())
    )
    from mocosfl.serving import serve

    return _to_the_end("serve", given, partial(serve, settings=given.serve))


def _join(args: Sequence[str]) -> int:
    given = tyro.cli(JoinArguments, prog="mocosfl join HOST:PORT", args=_positional(args, "--server"))
    import torch

    from mocosfl.experiment import choose_device
    from mocosfl.network.worker import TorchWorker
    from mocosfl_device.client import Client

    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    torch.set_num_threads(given.threads)
    client = Client(given.join, TorchWorker(given.data, choose_device(given.device), say), say)
    try:
        client.run()
    finally:
        traffic = client.traffic
        say(
            f"{client.steps:,} steps; {traffic.sent / 1e6:,.2f} MB sent and {traffic.received / 1e6:,.2f} MB received "
            f"across the socket; tensors alone are {traffic.tensors_sent / 1e6:,.2f} and "
            f"{traffic.tensors_received / 1e6:,.2f} MB"
        )
    return 0


def _positional(args: Sequence[str], flag: str) -> list[str]:
    """A first argument that is no flag, as the value of ``flag``."""
    return [flag, *args] if args and not args[0].startswith("-") else list(args)


def _enroll(args: Sequence[str]) -> int:
    given = tyro.cli(EnrollArguments, prog="mocosfl enroll", args=args)
    from mocosfl.network.enrolment import Registry

    numbers: list[int] = []
    for text in given.clients:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise SettingError(f"clients={text}: expected a number such as 7, or a range such as 0-99")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    registry = Registry(given.file)
    if given.revoke:
        registry.strike_off(numbers)
        console.print(f"{given.file}: {len(registry)} clients are enrolled", highlight=False, soft_wrap=True)
        return 0
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    tokens = registry.enrol(numbers)
    for number, token in tokens.items():
        if given.out is None:
            print(token)
        else:
            path = given.out / f"client-{number}.token"
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(token + "\n")
    errors.print(f"{given.file}: {len(registry)} clients are enrolled", highlight=False, soft_wrap=True)
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "train an encoder, or resume a run"),
    "pretrain": (_pretrain, "train a client half that resists inversion, before any client takes part"),
    "evaluate": (_evaluate, "kNN, probes, fine-tuning and more of a run, or of an encoder of others"),
    "embed": (_embed, "features of your images by a trained encoder, as a parquet file"),
    "export": (_export, "a trained encoder for use elsewhere: Hugging Face layout, ONNX, torchvision, client half"),
    "attack": (_attack, "what the server could see of a client's images: reconstructions and scores"),
    "report": (_report, "one page that shows a run, or several beside each other"),
    "serve": (_serve, "train with clients that join over the network"),
    "join": (_join, "be such a client"),
    "enroll": (_enroll, "give clients tokens to join with"),
    "recipes": (_recipes, "list the named configurations"),
    "sweep": (_sweep, "make many runs from one file; skips what is finished, goes on with what was stopped"),
    "compare": (_compare, "runs side by side: settings that differ, figures, curves"),
    "cost": (_cost, "what a run costs a client in arithmetic, memory, bytes, time and energy, before it is made"),
    "models": (_models, "backbones, and what each cut of one leaves on the client"),
    "partition": (_partition, "print and draw the split of the images over the clients"),
}


def _usage() -> str:
    lines = [f"  mocosfl {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: mocosfl COMMAND [OPTIONS]", "", *lines, "", "mocosfl COMMAND --help tells more."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name. Unset: those of this process.

    Returns:
        Exit status: 0, or 1 for an error that the message explains, 2 for wrong usage, 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its remarks on every failed handshake are no news
    rank = os.environ.get("RANK", "0")  # set by torchrun
    console.quiet = rank != "0"
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        from mocosfl import __version__

        print(f"mocosfl {__version__}")
        return 0
    if args[0] not in COMMANDS:
        errors.print(f"unknown command {args[0]}; {nearest(args[0], COMMANDS)}".rstrip("; "), highlight=False)
        errors.print(_usage(), highlight=False)
        return 2
    for word in args:  # what is typed is asked for; what a folder or a file says is not
        for value in (word, word.partition("=")[2]):
            if match := re.fullmatch(r"python:(\S+)|(\S+\.py:\w+)", value):
                trust_code(match[1] or match[2])
    try:
        return COMMANDS[args[0]][0](args[1:])
    except (MocosflError, OSError) as error:
        if not isinstance(error, ReportedElsewhere):
            who = "" if rank == "0" else f"process {rank}: "
            errors.print(f"{who}error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted", highlight=False)
        return INTERRUPTED
