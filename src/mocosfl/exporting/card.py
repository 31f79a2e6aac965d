"""The model card of a run: what the encoder is, what it was trained on, who saw which images, how good it is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mocosfl import __version__
from mocosfl.config import Config
from mocosfl.data.sources import hub_id
from mocosfl.encoder import Encoder
from mocosfl.errors import SettingError
from mocosfl.models.foreign import is_foreign, without_paths
from mocosfl.models.vit import HEADS
from mocosfl.run import Run

PAPER = "https://openreview.net/forum?id=2QGJXyMNoPz"
UNCHOSEN = "unknown"
"""The hub's word for a licence that nobody has named."""

FIGURES = {"knn": "kNN", "linear_probe": "linear probe"}


def model_card(run: Run, encoder: Encoder, license: str | None) -> str:
    """A model card in Markdown, with the hub's header of YAML.

    Paths of this machine are not in it: of a folder only its name is told.

    Args:
        run: finished.
        encoder: of the run.
        license: identifier of the weights' licence. Unset: ``unknown``.

    Raises:
        SettingError: ``license`` is no identifier.
    """
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise SettingError(f"license={license}: expected an SPDX identifier, such as apache-2.0 or cc-by-4.0")
    settings = _public(run.config)
    figures = (run.read_json("result.json") or {}) | (run.read_json("evaluation.json") or {})
    name = f"{settings.model.title}, {settings.recipe}"
    sections = {
        "Use": _use(encoder),
        "Data": _data(run, settings, encoder, figures),
        "Clients": _clients(run, settings, encoder),
        "Who saw what": _seen(run, settings, figures),
        "Figures": _figures(run, settings, figures),
        "All settings": f"```yaml\n{settings.to_yaml()}```",
    }
    text = [f"---\n{_header(run, settings, figures, license)}\n---", f"# {name}"]
    text.append(
        f"An image encoder, trained without labels by [MocoSFL]({PAPER}) with mocosfl {__version__}. "
        + (
            f"The licence of the weights is {license}."
            if license
            else "Nobody has said yet under which licence the weights may be used."
        )
    )
    text += [f"## {title}\n\n{body}" for title, body in sections.items()]
    return "\n\n".join(text) + "\n"


def _header(run: Run, settings: Config, figures: dict[str, Any], license: str | None) -> str:
    trained_on, tested_on = _trained_on(run, run.config), _tested_on(run, run.config)
    results = [
        EvalResult(
            task_type="image-classification",
            task_name=f"{name} on frozen features",
            dataset_type=(tested_on and hub_id(tested_on)) or shown_source(tested_on or "unknown"),
            dataset_name=shown_source(tested_on or "unknown"),
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"accuracy of the {name}",
            metric_value=round(figures[key] / 100, 6),
        )
        for key, name in FIGURES.items()
        if key in figures
    ]
    known = sorted({hub for source in trained_on if (hub := hub_id(source))})
    data = ModelCardData(
        license=license.lower() if license else UNCHOSEN,
        library_name="mocosfl",
        pipeline_tag="image-feature-extraction",
        tags=["mocosfl", "self-supervised-learning", "federated-learning", "split-learning", "contrastive-learning"],
        datasets=known or None,
        metrics=["accuracy"] if results else None,
        model_name=settings.recipe if results else None,
        eval_results=results or None,
    )
    return data.to_yaml(line_break="\n").rstrip()


def _trained_on(run: Run, config: Config) -> list[str]:
    """Sources of the images that this run trained on, as far as it has them."""
    if run.clients_elsewhere:
        return []
    if run.command == "pretrain":
        own = [config.pretrain.source] if config.pretrain.source else []
        return own + [config.data.source] * (config.pretrain.target_share > 0)
    return [config.data.source]


def _tested_on(run: Run, config: Config) -> str | None:
    return (run.data_facts() or {}).get("evaluate_on") if run.clients_elsewhere else config.data.source


def shown_source(source: str) -> str:
    """A source as others may see it: of a folder its name alone."""
    known = source == "digits" or hub_id(source) is not None
    return source if known else Path(os.path.abspath(os.path.expanduser(source))).name


def _public(config: Config) -> Config:
    """Settings without paths."""
    paths = {"data.source": config.data.source, "pretrain.source": config.pretrain.source}
    changes = {name: shown_source(path) for name, path in paths.items() if path is not None}
    if config.clients.init is not None:
        changes["clients.init"] = Path(os.path.abspath(config.clients.init)).name
    return config.updated(changes).model_copy(update={"model": without_paths(config.model)})


def _use(encoder: Encoder) -> str:
    shape = f"{encoder.channels}, {encoder.size}, {encoder.size}"
    return (
        "```python\n"
        "import torch\n"
        "from mocosfl import Encoder\n\n"
        'encoder = Encoder.from_pretrained("PATH-OR-HUB-ID")\n'
        f"images = torch.rand(8, {shape})  # float32 in [0, 1]; normalisation is inside\n"
        f"features = encoder(images)  # (8, {encoder.features})\n"
        "```"
    )


def _rows(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _data(run: Run, settings: Config, encoder: Encoder, figures: dict[str, Any]) -> str:
    facts = run.data_facts() or {}
    if run.clients_elsewhere:
        source = "the clients' own"
    else:
        source = " and ".join(shown_source(name) for name in _trained_on(run, run.config))
    return _rows(
        {
            "training images": f"{facts['images']:,}" if "images" in facts else None,
            "source": source,
            "size": f"{encoder.size}x{encoder.size} pixels, {encoder.channels} channel{'s' * (encoder.channels > 1)}",
            "mean of the channels": ", ".join(f"{value:.4f}" for value in encoder.mean.tolist()),
            "standard deviation": ", ".join(f"{value:.4f}" for value in encoder.std.tolist()),
            "augmentation": f"{settings.augment.policy}",
            "test images": f"{figures['test_images']:,}" if "test_images" in figures else None,
        }
    )


def _clients(run: Run, settings: Config, encoder: Encoder) -> str:
    clients, model, partition = settings.clients, settings.model, settings.partition
    how = {
        "iid": "IID",
        "classes": f"{partition.classes_per_client} classes a client",
        "dirichlet": f"Dirichlet with alpha {partition.alpha:g}",
    }[partition.kind]
    has_norms = not is_foreign(model.backbone) and model.backbone not in HEADS  # else it has its own
    norms = {"group": "GroupNorm with weight standardisation", "batch": "BatchNorm"}
    rows: dict[str, Any] = {}
    if run.command == "pretrain":
        rows["clients"] = f"none yet: pre-training on the server, for {clients.number:,} clients"
    else:
        where = {"serve": "over the network", "flower": "connected by Flower"}.get(
            run.command, "simulated on one machine"
        )
        rows |= {
            "clients": f"{clients.number:,}, {where}",
            "partition": None if run.clients_elsewhere else how,
            "active in a round": f"{settings.pool:,}",
            "images of one client in a step": clients.batch,
            "client halves": "frozen" if clients.frozen else _averaged(settings),
            "started from": f"the run {clients.init}" if clients.init else None,
            "defence of the latents": settings.defence.kind,
        }
    return _rows(
        rows
        | {
            "backbone": model.title,
            "cut": f"{model.place}, bottleneck {model.bottleneck}; latents "
            f"of {'x'.join(map(str, encoder.latent_shape))} numbers",
            "client half": norms[model.client_norm] if has_norms else None,
            "server half": norms[model.server_norm] if has_norms else None,
        }
    )


def _averaged(settings: Config) -> str:
    every, sampled = settings.sync.every, settings.pool < settings.clients.number
    if every == 0:
        return "averaged whenever others take their turn, and at the end" if sampled else "averaged at the end alone"
    return "averaged every step" if every == 1 else f"averaged every {every:,} steps"


def _seen(run: Run, settings: Config, figures: dict[str, Any]) -> str:
    lines = []
    if run.command == "pretrain":
        if settings.pretrain.source:
            lines.append(f"- The server's own images were those of {settings.pretrain.source}.")
        if settings.pretrain.target_share > 0:
            lines.append(
                f"- The server saw a share of {settings.pretrain.target_share:g} of the clients' images of "
                f"{settings.data.source}, none of client {settings.pretrain.spare_client}."
            )
    elif run.clients_elsewhere:
        lines.append("- The images stayed with the clients; the server saw their latents, and sums over their pixels.")
    else:
        what = "The server half was trained on latents alone; who reads latents can try to turn them back into images."
        if settings.clients.holds == "network":
            what = "Each client trained the whole network; the server averaged the clients' weights."
        lines.append(f"- Clients were simulated: all images were on one machine. {what}")
        if "knn_held_out" in figures:
            lines.append(
                f"- A share of {settings.data.held_out:g} of the training split was with no client: the server had it, "
                "with labels, to watch the training."
            )
    if settings.clients.init:
        seen = len(run.fingerprints())
        whom = f"{seen:,} images, which its server saw" if seen else "no images that its server saw directly"
        lines.append(f"- It started from the run {settings.clients.init}, pre-trained on {whom}.")
    audit = run.read_json("privacy.json")
    if settings.clients.holds == "network":
        pass  # there are no latents to attack
    elif audit is None:
        lines.append("- Nobody has tried by `mocosfl attack` how much of an image its latents give away.")
    else:
        worst = {score: audit["worst"][score]["value"] for score in ("mse", "ssim", "identified")}
        lines.append(
            f"- `mocosfl attack` turned latents of {audit['images']} images back: worst MSE {worst['mse']:.4f}, worst "
            f"SSIM {worst['ssim']:.3f}, {worst['identified']:.0f} % recognised among {audit['gallery']:,}."
        )
    return "\n".join(lines)


def _figures(run: Run, settings: Config, figures: dict[str, Any]) -> str:
    if not any(key in figures for key in FIGURES):
        return "None: there were no labelled images to evaluate on."
    names = {"knn_untrained": "kNN of the untrained encoder", **FIGURES}
    rows = {name: f"{figures[key]:.2f} %" for key, name in names.items() if key in figures}
    evaluation = settings.evaluation.model_copy(update=figures.get("how", {}).get("settings", {}))
    # Of the run's end, or of the call that measured it: a later one without a probe leaves it as it is.
    probe_epochs = figures.get("probe", {}).get("epochs", settings.evaluation.probe_epochs)
    test = shown_source(_tested_on(run, run.config) or "")
    how = (
        f"Accuracy on all {figures['test_images']:,} test images of {test}. kNN with k = {evaluation.k}, "
        f"T = {evaluation.temperature:g} and {figures['bank_images']:,} labelled training images"
        + (f"; linear probe of {probe_epochs} epochs on the same" if "linear_probe" in figures else "")
        + ". One run."
    )
    made = []
    if "training_seconds" in figures:
        made.append(f"Trained in {figures['training_seconds'] / 60:.0f} min on {figures.get('device', 'unknown')}")
    if "versions" in figures:
        made.append(f"PyTorch {figures['versions']['torch']}")
    return "\n\n".join([_rows(rows), how, *([f"{', '.join(made)}."] if made else [])])
