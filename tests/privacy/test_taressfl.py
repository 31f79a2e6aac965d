"""What pre-training under the attacker-aware loss does, on real images."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mocosfl.config import Config
from mocosfl.data.augment import Policy
from mocosfl.data.federation import federate
from mocosfl.experiment import pretrain
from mocosfl.privacy.attacks import Training, Victim, decode, train_decoder
from mocosfl.privacy.scores import mse, ssim
from mocosfl.recipes import recipe


def test_latents_tell_less_after_it(tmp_path: Path, photos) -> None:
    """A decoder sees clearly less after 100 steps with the loss than without. The server may use half of 800 images."""
    (tmp_path / "images").mkdir()
    for number, image in enumerate(photos(800, 32)):
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    config = recipe("taressfl-small").updated(
        {
            "data.source": str(tmp_path / "images"),
            "data.images": None,
            "partition.kind": "iid",
            "clients.number": 20,
            "model.width": 8,
            "model.head": "v1",
            "contrast.queue": 1000,
            "pretrain.source": None,
            "pretrain.images": None,
            "pretrain.target_share": 0.5,
            "pretrain.batch": 64,
            "pretrain.epochs": 17,
            "ressfl.warmup": 20,
            "ressfl.channels": 16,
        }
    )
    open_, open_error = seen(config.updated({"ressfl.weight": 0}), tmp_path / "open")
    closed, closed_error = seen(config.updated({"ressfl.weight": 10}), tmp_path / "closed")
    assert closed < open_ - 0.1
    assert closed_error > 1.3 * open_error


def seen(config: Config, run: Path) -> tuple[float, float]:
    """SSIM and MSE of what a decoder makes of the spare client's images."""
    encoder = pretrain(config, run).encoder
    federation = federate(config, lambda _: None)
    spare = federation.partition.client(config.pretrain.spare_client)
    others = np.setdiff1d(federation.train_rows, spare)[:300]
    images, known = (federation.splits.train.take(rows, "cpu").float() / 255 for rows in (spare, others))
    victim = Victim(encoder.client, encoder.mean, encoder.std, Policy.of(config.augment), bf16=True)
    decoder = train_decoder(victim, known, Training(2, 32, 200, lr=3e-3, loss="both"), seed=0)
    with torch.no_grad():
        made = decode(decoder, victim.send(images))
    return float(ssim(images, made).mean()), float(mse(images, made).mean())
