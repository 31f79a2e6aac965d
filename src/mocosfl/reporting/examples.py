"""What the encoder of a run makes of a few images: nearest neighbours, and a map of its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mocosfl.config import Config
from mocosfl.data.federation import set_aside
from mocosfl.data.images import ImageSet
from mocosfl.data.sources import balanced, load
from mocosfl.encoder import load_encoder
from mocosfl.errors import MocosflError
from mocosfl.evaluation.features import extract_from
from mocosfl.reporting.report import Missing
from mocosfl.run import Run

IMAGES = 1000
"""Images at most, of every class equally many: as many as t-SNE places in about five seconds of one core."""
QUERIES, NEIGHBOURS = 8, 5
LEAST = 2 * NEIGHBOURS
"""Of fewer images nothing can be said."""
COMPONENTS, PERPLEXITY, UMAP_NEIGHBOURS = 50, 30, 15
SAME = 1e-5
"""Features of norm 1 that differ by less differ by rounding alone."""


@dataclass(frozen=True)
class Examples:
    """Images that no client trained on, and their features.

    Attributes:
        what: which images these are.
        total: how many of them there are; the others are not looked at.
        images: (n, C, H, W) uint8.
        labels: (n,) class numbers; None without.
        classes: names of the classes.
        queries: (q,) numbers among the images, drawn at random, of every class alike.
        neighbours: (q, 5) the nearest others of each, by the cosine of their features.
        similarity: (q, 5) that cosine.
        places: (n, 2) of a map of the features, by PCA and t-SNE, or why there is no map.
    """

    what: str
    total: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]
    queries: NDArray[np.int64]
    neighbours: NDArray[np.int64]
    similarity: NDArray[np.float32]
    places: NDArray[np.float32] | Missing


def examples(path: Path, device: torch.device, say: Callable[[str], None]) -> Examples | Missing:
    """Load some of a run's images again, and look at them through its encoder.

    Test images where there are some, else held-out ones; never images that a client trained on.

    Args:
        path: the run folder.
        device: where to compute.
        say: told what takes time.

    Returns:
        The images and what became of them, or why there are none.
    """
    try:
        return _examples(path, device, say)
    except (MocosflError, OSError) as error:
        return Missing(str(error))


def _examples(path: Path, device: torch.device, say: Callable[[str], None]) -> Examples | Missing:
    encoder = load_encoder(path, device)
    chosen = _chosen(Run.open(path), say)
    if isinstance(chosen, Missing):
        return chosen
    what, images, rows = chosen
    if images.shape != (encoder.channels, encoder.size, encoder.size):
        return Missing(f"the images are now of another size than those that {path} was trained on")
    if len(rows) < LEAST:
        return Missing(f"there are only {len(rows)} {what}")
    rng = np.random.default_rng(0)  # not the run's: runs beside each other show the same images
    total, rows = len(rows), balanced(rows, images.labels, min(IMAGES, len(rows)), rng)
    say(f"features of {len(rows):,} {what} ({path})")
    features = F.normalize(extract_from(encoder, images, rows, batch=250), dim=1).cpu()
    labels = None if images.labels is None else images.labels[rows]
    queries = balanced(np.arange(len(rows)), labels, min(QUERIES, len(rows)), rng)
    similarity = features[queries] @ features.T
    similarity[torch.arange(len(queries)), torch.from_numpy(queries)] = -2  # none is its own neighbour
    nearest = similarity.topk(NEIGHBOURS, dim=1)
    return Examples(
        what,
        total,
        images.gather(rows),
        labels,
        images.classes or (),
        queries,
        nearest.indices.numpy(),
        nearest.values.numpy(),
        placed(features.numpy()),
    )


def placed(features: NDArray[np.float32], method: Literal["tsne", "umap"] = "tsne") -> NDArray[np.float32] | Missing:
    """Places on a map, (n, 2), such that images with like features are near each other: PCA, then t-SNE or UMAP.

    ``Missing`` where the features, of norm 1, are the same up to rounding, or not finite: t-SNE crashes on such.
    """
    if not np.isfinite(features).all():
        return Missing("some features are not finite")
    if np.ptp(features, axis=0).max() < SAME:
        return Missing("all images have the same features")
    from sklearn.decomposition import PCA  # takes a second to import
    from sklearn.manifold import TSNE

    count, width = features.shape
    fewer = PCA(min(COMPONENTS, count, width), random_state=0).fit_transform(features)
    if method == "umap":
        from umap import UMAP

        return UMAP(n_neighbors=min(UMAP_NEIGHBOURS, count - 1), random_state=0, n_jobs=1).fit_transform(fewer)
    return TSNE(perplexity=min(PERPLEXITY, (count - 1) / 3), init="pca", random_state=0).fit_transform(fewer)


def _chosen(run: Run, say: Callable[[str], None]) -> tuple[str, ImageSet, NDArray[np.int64]] | Missing:
    """Which images these are, the set they are in, and their rows."""
    config: Config = run.config
    data = config.data
    if run.clients_elsewhere:  # the clients' images are not here; those of the server may be
        own = (run.data_facts() or {}).get("evaluate_on")
        if own is None:
            return Missing("the run was served without evaluate_on: there are no images here to look at")
        data = data.model_copy(update={"source": own})
    splits = load(data, config.seed, say)
    if splits.test is not None:
        return "test images", splits.test, np.arange(len(splits.test))
    train = splits.train
    _, held_out = set_aside(config.data.held_out, np.arange(len(train)), train.labels, config.seed)
    if not len(held_out):
        return Missing("clients trained on every image there is: there is no test split, and none was held out")
    return "held-out images", train, held_out
