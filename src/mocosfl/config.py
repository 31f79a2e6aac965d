"""Every setting of a run: typed, validated, unknown keys rejected; to and from YAML.

Settings are grouped by the part that reads them. Defaults are the published ones (Li et al., MocoSFL, ICLR 2023)
unless the sentence beside a setting says otherwise.
"""

from __future__ import annotations

import math
import re
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mocosfl.errors import SettingError, nearest

Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """A group of settings: immutable, and strict about unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    group: ClassVar[str] = ""
    """Name of the group, in front of its settings."""

    def __init__(self, **values: Any) -> None:
        """Validate settings.

        Raises:
            SettingError: names the setting, the value found and what would be accepted.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingError(_explain(error, self.group)) from error


class DataSettings(Settings):
    """Where the images come from and how they are decoded."""

    group = "data"

    source: str = "digits"
    """digits, cifar10, cifar100, svhn, stl10, tiny-imagenet, imagenet12, any Hugging Face hub id, a parquet file or
    folder, or a folder of images (class sub-folders, or flat and unlabelled)."""
    size: Annotated[int, Field(ge=4, le=512)] | None = None
    """Height and width in pixels. Unset: the size of the first image, at most 224. Others are resized and cropped."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey. Images of the other kind are converted, and the run says so."""
    images: Count | None = None
    """Use this many training images, drawn in equal numbers from every class. Unset: all."""
    train_split: str = "train"
    """Name of the training split, in hub ids and local folders."""
    test_split: str | None = None
    """Name of the test split. Unset: test, validation, valid or val, whichever exists first."""
    label_split: str | None = None
    """Split whose labelled images evaluation compares with, where the training split has no labels: train, with
    train_split=unlabeled of stl10. Unset: the training split."""
    classes: tuple[str, ...] | None = None
    """Use the images of these classes alone, by name; the first of several names is enough. imagenet12 stands for its
    twelve (docs/data.md). Unset: all."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the images set aside as test set, class by class, where the source has no test split."""
    held_out: Share = 0.05
    """Share of the training images that no client holds: the queries of the kNN monitor during training."""
    image_column: str | None = None
    """Column of the images. Unset: the one column that holds images."""
    label_column: str | None = None
    """Column of the labels. Unset: label, labels, fine_label or the one class column."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, and count them. Off: the first one ends the run, with its path."""
    memory: Annotated[float, Field(gt=0)] = 8.0
    """GiB of decoded images kept in memory. A larger set is read from the cache on disk, step by step."""


class PartitionSettings(Settings):
    """How the training images are spread over the clients."""

    group = "partition"

    kind: Literal["iid", "classes", "dirichlet"] = "classes"
    """iid: equal random pieces. classes: a fixed number of classes a client, equal volume (the paper's non-IID).
    dirichlet: each class is spread in proportions drawn from a symmetric Dirichlet distribution."""
    classes_per_client: Count = 2
    """Classes that one client holds, with kind classes."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Concentration of kind dirichlet: the smaller, the more one-sided the clients."""
    quantity_skew: Annotated[float, Field(gt=0)] | None = None
    """Concentration of the symmetric Dirichlet distribution that the clients' shares of all images are drawn from: the
    smaller, the more unequal their numbers (quantity skew; Li et al., 2022). With iid and dirichlet. Unset: none."""

    @model_validator(mode="after")
    def _volumes_agree(self) -> Self:
        if self.quantity_skew is not None and self.kind == "classes":
            raise ValueError(
                f"partition.quantity_skew={self.quantity_skew:g}: partition.kind=classes gives all clients equal "
                "volume; accepted with it are iid and dirichlet"
            )
        return self


class AugmentSettings(Settings):
    """How the two views of an image are made. Unset values are the policy's."""

    group = "augment"

    policy: Literal["v1", "v2"] = "v2"
    """v1 is MoCo v1's; v2 is the paper's, which is MoCo v2's with crops down to 0.08 of the area."""
    crop_scale: tuple[Probability, Probability] | None = None
    """Least and greatest share of the image's area that a random crop keeps."""
    brightness: Annotated[float, Field(ge=0)] | None = None
    """Brightness is multiplied by a factor from [max(0, 1 - x), 1 + x]."""
    contrast: Annotated[float, Field(ge=0)] | None = None
    """Contrast, likewise."""
    saturation: Annotated[float, Field(ge=0)] | None = None
    """Saturation, likewise."""
    hue: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """Hue is turned by a share of the colour circle from [-x, x]."""
    jitter_p: Probability | None = None
    """Probability of the colour jitter (the four above, in random order)."""
    grey_p: Probability | None = None
    """Probability of turning grey."""
    blur_p: Probability | None = None
    """Probability of the Gaussian blur."""
    blur_sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Least and greatest standard deviation of the blur, in pixels."""
    flip_p: Probability | None = None
    """Probability of a horizontal flip."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for name in ("crop_scale", "blur_sigma"):
            value = getattr(self, name)
            if value is not None and value[0] > value[1]:
                raise ValueError(f"augment.{name}={list(value)}: the first number must not exceed the second")
        if self.crop_scale is not None and self.crop_scale[1] == 0:
            raise ValueError(f"augment.crop_scale={list(self.crop_scale)}: a crop must keep some of the image")
        return self


BACKBONES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("vgg11", "vgg13", "mobilenetv2", "vit_tiny", "vit_small"),
)
"""Backbones by name; ``mocosfl.models`` has one of each."""


class ModelSettings(Settings):
    """The backbone, where it is cut, and the projection head."""

    group = "model"

    backbone: str = "resnet18"
    """resnet18, resnet34, resnet50, resnet101, resnet152, vgg11, vgg13, mobilenetv2, vit_tiny or vit_small
    (docs/models.md). hf:SOURCE: a vision model of Hugging Face's transformers, in a folder or on the hub.
    python:MODULE:FUNCTION: a network of your own."""
    width: Annotated[int, Field(ge=4, multiple_of=4)] = 64
    """Channels of the first convolution of a ResNet or VGG; every stage scales with it. Of mobilenetv2 64 times the
    width multiplier; of a vision transformer the width of an attention head. Published: 64."""
    stem: Literal["32", "64", "224"] | None = None
    """First layer for images of this size. ResNets: 32 is 3x3 stride 1, 64 is 3x3 stride 2, 224 is 7x7 stride 2; no
    max-pool but in 224. mobilenetv2: the same strides. Vision transformers: patches of 4, 8 or 16 pixels. Unset: by the
    size of the images (up to 48, up to 128, larger)."""
    cut: int | str = 1
    """Convolutions on the client: 1 is the stem (MocoSFL-1), 3 adds the first basic block (MocoSFL-3), and so on. Of a
    vision transformer the patch embedding counts as one and each block as one. Of a backbone from elsewhere the name of
    the last layer on the client. `mocosfl models` lists the cuts."""
    bottleneck: str = "none"
    """Pair of convolutions around the cut: none, or CxSy for x channels at stride y, such as C4S2. Not for tokens."""
    client_norm: Literal["group", "batch"] = "group"
    """Normalisation in the client half: group (GroupNorm and weight standardisation) or batch. Vision transformers have
    LayerNorm, and backbones from elsewhere their own."""
    server_norm: Literal["group", "batch"] = "group"
    """Normalisation in the server half. batch averages over the concatenated batch of all clients, and over both ways
    of a symmetric loss."""
    pooling: Literal["token", "mean"] | None = None
    """How tokens become features: token is the class token's, mean the mean of all (a vision transformer then has no
    class token). Unset: token where there is a class token. Networks of convolutions always average."""
    pretrained: bool = False
    """Start from the weights of the Hugging Face source."""
    architecture: str | None = None
    """Configuration of the Hugging Face backbone, as JSON. A run fills it in when it begins; from then on the source is
    not needed."""
    head: Literal["v1", "small", "v2", "large"] = "v2"
    """Projection head: v1 is linear to 128; small linear to 512; v2 1024-1024 with ReLU; large 4096-2048 with
    BatchNorm and ReLU."""

    @field_validator("cut", mode="before")
    @classmethod
    def _cut_is_a_place(cls, value: Any) -> Any:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else value
        if isinstance(number, bool) or not isinstance(number, int | str) or number == "":
            raise ValueError(f"model.cut={value}: expected a number of convolutions, or the name of a layer")
        return number

    @model_validator(mode="after")
    def _settings_apply(self) -> Self:
        name = self.backbone
        elsewhere = re.fullmatch(r"hf:.+|python:[\w.]+:\w+", name) is not None
        if not elsewhere and name not in BACKBONES:
            raise ValueError(
                f"model.backbone={name}: expected {', '.join(BACKBONES)}, hf:FOLDER-OR-HUB-ID or "
                f"python:MODULE:FUNCTION; {nearest(name, BACKBONES)}".rstrip("; ")
            )
        if not elsewhere and isinstance(self.cut, int) and self.cut < 1:
            raise ValueError(f"model.cut={self.cut}: input should be greater than or equal to 1")
        fixed: dict[str, Any] = {}  # what cannot be chosen, and why
        if elsewhere:
            why = "a backbone from elsewhere has its own"
            fixed = {"width": 64, "stem": None, "client_norm": "group", "server_norm": "group"}
        elif name.startswith("vit"):
            why = f"{name} has LayerNorm alone"
            fixed = {"client_norm": "group", "server_norm": "group"}
        else:
            why = f"it means nothing to {name}"
            fixed = {"pooling": None} | ({"stem": None} if name.startswith("vgg") else {})
        if not name.startswith("hf:"):
            fixed |= {"pretrained": False, "architecture": None}
        for setting, value in fixed.items():
            if (found := getattr(self, setting)) != value:
                reason = "only hf: backbones have a source" if setting in ("pretrained", "architecture") else why
                raise ValueError(f"model.{setting}={found}: {reason}; leave it at {value}".replace("at None", "unset"))
        return self

    @property
    def title(self) -> str:
        """The backbone, in a few words."""
        return f"{self.backbone} of width {self.width}" if self.backbone in BACKBONES else self.backbone

    @property
    def place(self) -> str:
        """Where it is cut, in a few words."""
        if isinstance(self.cut, str):
            return f"after {self.cut}"
        if self.backbone.startswith("vit"):
            blocks = self.cut - 1
            return "after the patch embedding" + (f" and {blocks} block{'s' * (blocks > 1)}" if blocks else "")
        return f"after {self.cut} convolution{'s' * (self.cut > 1)}"


class ContrastSettings(Settings):
    """What the server makes of the latents of one step (published: MoCo)."""

    group = "contrast"

    objective: str = "moco"
    """moco: InfoNCE against a queue of keys (v1 and v2 differ in model.head and augment.policy). mocov3: against the
    other keys of the batch, behind a predictor. simclr: NT-Xent over both views of the batch, no momentum copy. byol:
    the distance of prediction and key, no negatives. FILE.py:NAME: a class of your own (docs/objectives.md)."""
    queue: Count = 6000
    """K: keys in the server's queue, with objective moco."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """T of the loss; byol has none."""
    predictor: Count = 1024
    """Hidden width of the predictor, with objectives mocov3 and byol: linear, BatchNorm, ReLU, linear."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.99
    """tau: the momentum copies keep this share of themselves each step."""
    symmetric: bool = True
    """Contrast the two views both ways, and sum the losses (MoCo v2 as published in the paper)."""
    both_views: bool = False
    """Let both views train the client half. Doubles what a client computes and sends; needs symmetric. Measured: no
    gain (docs/experiments.md)."""
    feature_sharing: bool = True
    """One queue for all clients, and negatives from all of them. Off: every client's keys are its own only negatives;
    with a queue, K / N keys each."""
    concatenate: bool = True
    """One step on the concatenated latents of all clients (vector concatenation). Off: the server takes a step for each
    client, one after another, as in split learning without it."""

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        if self.objective not in OBJECTIVES and not re.fullmatch(r".+\.py:\w+", self.objective):
            raise ValueError(
                f"contrast.objective={self.objective}: expected {', '.join(OBJECTIVES)} or FILE.py:NAME of a class of "
                "your own"
            )
        if self.both_views and not self.symmetric:
            raise ValueError(
                "contrast.both_views=True: only the symmetric loss uses both views; set contrast.symmetric=True too"
            )
        if self.objective == "simclr" and not self.both_views:
            raise ValueError(
                "contrast.objective=simclr: both views train the clients; set contrast.symmetric=True and "
                "contrast.both_views=True too"
            )
        return self


class ClientSettings(Settings):
    """The simulated clients."""

    group = "clients"

    holds: Literal["half", "network"] = "half"
    """half: the client half; the server has the rest. network: backbone, head and predictor, and the loss over the
    client's own images: federated learning without a server half, for the baselines (docs/baselines.md)."""

    number: Count = 100
    """N: clients, all with images of their own."""
    pool: Count | None = None
    """Clients active in a round, drawn at random for each round. Unset: all."""
    pool_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead of pool: the share of the clients that is active in a round."""
    round: Count | None = None
    """Steps of a round. Unset: as many as a pass over the average client's images takes."""
    batch: Count = 1
    """B: images of one client in one step."""
    rich_share: Share = 0
    """Share of the clients that are rich: the last ones by number, in the same share in every pool."""
    rich_batch_factor: Count = 1
    """So many times the batch of the others is that of a rich client."""
    rich_data_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the images that rich clients hold together. Unset: the partition does not tell rich from poor."""
    drop: Share = 0
    """Probability that an active client drops out between two averages, before a random step: it sends nothing more,
    has no part in the average, and is back when that is handed out."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the client halves. Unset: the server's."""
    lr_scale: Literal["batch_mean", "per_client_mean"] = "batch_mean"
    """batch_mean: a client's gradient is its share of the mean loss over the concatenated batch (as published).
    per_client_mean: it is that of the mean loss of its own images, as many times larger as the whole batch is larger
    than its own. Measured: batch_mean is better (docs/experiments.md)."""
    init: str | None = None
    """Run folder whose client half every client starts from, and whose normalisation it uses: one of
    `mocosfl pretrain`, or any other that is finished."""
    frozen: bool = False
    """Clients never change their half: they are sent no gradient and no average. Needs init."""
    keep_optimizer: bool = False
    """Keep a client's SGD momentum while it is outside the pool, or has dropped out. Off: it starts from zero when it
    comes back."""


class SyncSettings(Settings):
    """Averaging of the client halves."""

    group = "sync"

    every: Annotated[int, Field(ge=0)] = 50
    """Steps between two averages; 0: only where a round or the run ends."""
    momentum: bool = True
    """Average the momentum copies too (MonAcoSFL, 2024). Off, as published, they are left as they are."""
    average: Literal["fedavg", "median", "trimmed_mean"] = "fedavg"
    """fedavg: mean, weighted by the images that each client contributed. The others bound what a few bad clients can
    do, and count all clients alike (Yin et al., 2018). median: of each number. trimmed_mean: of each number, without
    the smallest and largest."""
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the clients that trimmed_mean leaves out at either end."""
    own: Literal["none", "ema", "predictor"] = "none"
    """What a client keeps of its own when it is handed the average. none: nothing. ema: a share mu that grows with its
    divergence (FedEMA; Zhuang, Wen, Zhang, 2022). predictor: its predictor while the divergence is above threshold
    (FedU; Zhuang et al., 2021), where clients hold whole networks."""
    tau: Annotated[float, Field(gt=0, le=1)] = 0.7
    """With own=ema: what mu is at a client's first average; from then on it is in proportion to the divergence."""
    threshold: Annotated[float, Field(gt=0)] = 0.4
    """With own=predictor: the divergence, mean over the encoder's weight matrices and filters of their L2 distance from
    the average."""


class DefenceSettings(Settings):
    """What clients do to their latents so that they tell less of the images (docs/protect.md)."""

    group = "defence"

    kind: Literal["none", "noise", "dropout", "nopeek", "ressfl"] = "none"
    """noise: Gaussian noise on all latents. dropout: some of the latents' numbers are zero. nopeek: the distance
    correlation of images and latents is a loss (Vepakomma et al., 2020). ressfl: so is what a decoder can make of them
    (Li et al., 2022), as set under ressfl."""
    noise: Annotated[float, Field(gt=0)] = 0.5
    """Standard deviation of the noise, in multiples of the latents' root mean square."""
    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the numbers that are dropped; the others are scaled up."""
    nopeek: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the distance correlation in the clients' loss."""


OBJECTIVES = ("moco", "mocov3", "simclr", "byol")
"""Objectives by name (``mocosfl.contrast.objectives``)."""
COMPARING = ("mocov3", "simclr", "byol")
"""Those that need more than one image in a step, as negatives or for the BatchNorm of their predictor."""

CodecName = Literal["fp32", "bf16", "int8", "int4", "topk"]


class TrafficSettings(Settings):
    """In how many bytes clients and server tell each other numbers. Simulated clients lose what real ones lose."""

    group = "traffic"

    latents: CodecName = "fp32"
    """Latents as fp32; bf16; int8 or int4, whole numbers between the least and the greatest of each image's channel; or
    topk, the largest numbers of each image as bf16."""
    gradients: CodecName = "fp32"
    """Gradients at the latents, likewise."""
    topk: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of an image's numbers that topk keeps."""
    zstd: bool = False
    """Compress latents and gradients further, without loss (Zstandard). Simulated clients have nothing of it."""
    loss_threshold: Annotated[float, Field(gt=0)] | None = None
    """Clients learn while the epoch's loss changes by more than this; then they send latents once more, and the server
    trains on with those until it has (Chen et al., 2021). Unset: they learn in every step."""


class CacheSettings(Settings):
    """Latents that frozen clients send once, and the server uses many times."""

    group = "cache"

    views: Annotated[int, Field(ge=0, multiple_of=2)] = 0
    """V: augmented views of each image that a client sends, two in an epoch; the server then draws its pairs from
    them. 0: new ones in every step."""
    refresh: Share = 0
    """Share of the images of which a client sends new views in every later epoch; they replace the oldest."""
    flip: Probability = 0
    """Probability that the server mirrors a latent which it uses again."""
    crop: Annotated[int, Field(ge=0)] = 0
    """It shifts it by up to so many numbers, down or up and right or left."""
    noise: Annotated[float, Field(ge=0)] = 0
    """It adds Gaussian noise of this standard deviation, in multiples of the latent's root mean square."""


class ResSFLSettings(Settings):
    """The attacker-aware loss of a client half: the similarity of images and what a decoder makes of their latents.

    `mocosfl pretrain` uses it, and `mocosfl train` with defence.kind=ressfl.
    """

    group = "ressfl"

    weight: Annotated[float, Field(ge=0)] = 2.0
    """lambda: weight beside the contrastive loss."""
    ssim_target: Annotated[float, Field(ge=-1, le=1)] = 0.3
    """A reconstruction whose SSIM is below this costs nothing. Published: 0.6, which does not hold against attackers
    better than the published one (docs/protect.md)."""
    warmup: Annotated[int, Field(ge=0)] = 200
    """Steps over which the weight rises from zero."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Greatest norm of an image's gradient from this loss, in multiples of that from the contrast. Unset: none."""
    blocks: Count = 4
    """Residual blocks of the decoder."""
    channels: Annotated[int, Field(ge=4, multiple_of=4)] = 64
    """Channels of the decoder."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the decoder (Adam)."""
    steps: Count = 1
    """Steps of the decoder for one of the clients."""


class PretrainSettings(Settings):
    """TAResSFL: what `mocosfl pretrain` does before any client takes part. Model, augmentation, contrast and ressfl are
    set as for training."""

    group = "pretrain"

    source: str | None = None
    """The server's own images, as data.source. They are brought to the size and channels of the clients'."""
    images: Count | None = None
    """Use this many of the source's training images. Unset: all."""
    target_share: Probability = 0
    """Share of the clients' training images that the server may use beside its own; they make up half of each batch."""
    spare_client: Annotated[int, Field(ge=0)] = 0
    """Client none of whose images are used: `mocosfl attack` needs some that nobody has seen."""
    epochs: Annotated[float, Field(gt=0)] = 200
    """Passes over the source."""
    batch: Annotated[int, Field(ge=2, multiple_of=2)] = 256
    """Images of a step."""
    lr: Annotated[float, Field(gt=0)] = 0.06
    """Learning rate of both halves, at its peak."""


class TrainSettings(Settings):
    """The run."""

    group = "train"

    epochs: Annotated[float, Field(gt=0)] = 200
    """Images to see, in multiples of the training set."""
    lr: Annotated[float, Field(gt=0)] = 0.06
    """Learning rate of the server half, at its peak."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD momentum of server and clients."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of server and clients."""
    init_server: bool = True
    """With clients.init: start the server half and the projection head from that run too. Off: afresh."""
    warmup: Share = 0
    """Share of the steps over which the learning rates rise from zero; then they fall to zero along a cosine."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the networks run under bfloat16 autocast; weights, loss and queue stay fp32."""
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    """torch.compile of both halves, the loss and the augmentation, and its mode; reduce-overhead and max-autotune
    record CUDA graphs. The first step then takes a minute or more. On a CPU it needs a C++ compiler."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda if this machine has it, else cpu. Under torchrun, auto and cuda give each
    process a GPU of its own."""
    log_every: Count = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Count = 200
    """Steps between two checkpoints."""


class EvaluationSettings(Settings):
    """The kNN monitor, kNN and linear probe at the end, and what `mocosfl evaluate` does besides (docs/evaluate.md)."""

    group = "evaluation"

    every: Annotated[float, Field(ge=0)] = 1
    """Epochs between two kNN monitors on the held-out images; 0: only before the first step and after the last."""
    monitor_bank: Count = 5000
    """Training images in the monitor's bank, at most. The kNN at the end uses all of them."""
    k: Count = 200
    """Neighbours of the weighted kNN."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """T of the kNN's weights, exp(similarity / T)."""
    probe_epochs: Annotated[int, Field(ge=0)] = 100
    """Epochs of the linear probe; 0: no probe."""
    probe_lr: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate of the linear probe at its start; it falls to zero along a cosine."""
    probe_penalty: Annotated[float, Field(gt=0)] = 1e-3
    """L2 strength of the logistic probe, by L-BFGS: half of this times the sum of the squared weights is added to the
    mean loss. Never chosen on test images."""
    finetune_epochs: Count = 100
    """Epochs of semi-supervised fine-tuning, over the images that are labelled."""
    finetune_lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate of fine-tuning at its start, of encoder and classifier; it falls to zero along a cosine."""
    finetune_batch: Annotated[int, Field(ge=2)] = 64
    """Images of a step of fine-tuning, at most."""
    batch: Count = 500
    """Images in one batch of feature extraction."""


class AttackSettings(Settings):
    """What `mocosfl attack` does. They are no part of a run: the same run can be attacked in many ways."""

    client: Annotated[int, Field(ge=0)] | None = None
    """Client whose images are attacked. Unset: the one that pre-training spared (pretrain.spare_client)."""
    images: Count = 128
    """Images of that client to attack, the first ones; all if it has fewer."""
    gallery: Annotated[int, Field(ge=2)] = 1000
    """Images among which a reconstruction is to be recognised."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of all clients' images that the attacker of the paper has; none of them the attacked client's."""
    epochs: Count = 50
    """Epochs of that attacker's decoder."""
    strong_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share that the stronger attacker has."""
    strong_blocks: Count = 6
    """Residual blocks of the stronger decoders."""
    strong_channels: Annotated[int, Field(ge=4, multiple_of=4)] = 96
    """Channels of the stronger decoders."""
    strong_steps: Count = 400
    """Training steps of the stronger decoders, of 64 images each."""
    auxiliary: str | None = None
    """Images of a server that has none of the clients', as data.source. Unset: pretrain.source; without one, cifar100,
    or cifar10 where the clients have that."""
    restarts: Count = 3
    """Starts of the white-box optimisation."""
    iterations: Count = 300
    """Steps of one."""
    views: Count = 16
    """Augmented views of each image that are seen."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the attackers' choices."""
    device: str = "auto"
    """As train.device."""


class Config(Settings):
    """A whole run."""

    recipe: str = "custom"
    """Name that the run goes by in its folder and figures."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """One seed, one result."""
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    augment: AugmentSettings = AugmentSettings()
    model: ModelSettings = ModelSettings()
    contrast: ContrastSettings = ContrastSettings()
    clients: ClientSettings = ClientSettings()
    sync: SyncSettings = SyncSettings()
    defence: DefenceSettings = DefenceSettings()
    traffic: TrafficSettings = TrafficSettings()
    cache: CacheSettings = CacheSettings()
    ressfl: ResSFLSettings = ResSFLSettings()
    pretrain: PretrainSettings = PretrainSettings()
    train: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        clients, contrast, model = self.clients, self.contrast, self.model
        if clients.pool is not None and clients.pool > clients.number:
            raise ValueError(f"clients.pool={clients.pool}: there are {clients.number} clients (clients.number)")
        if clients.pool is not None and clients.pool_share is not None:
            raise ValueError(
                f"clients.pool_share={clients.pool_share:g}: clients.pool={clients.pool} is set too; accepted is one "
                "of the two, the other null"
            )
        if model.client_norm == "batch" and clients.batch == 1 and not clients.frozen:
            raise ValueError(
                "model.client_norm=batch: BatchNorm has nothing to average over at clients.batch=1; "
                "use model.client_norm=group or a larger batch"
            )
        if clients.rich_share > 0 and not 0 < self.pool_rich < self.pool:
            raise ValueError(
                f"clients.rich_share={clients.rich_share}: of {self.pool} active clients {self.pool_rich} would be "
                "rich; there must be some of either kind"
            )
        if clients.rich_batch_factor > 1 and clients.rich_share == 0:
            raise ValueError(
                f"clients.rich_batch_factor={clients.rich_batch_factor}: no client is rich; set clients.rich_share too"
            )
        if clients.rich_data_share is not None and clients.rich_share == 0:
            raise ValueError(
                f"clients.rich_data_share={clients.rich_data_share:g}: no client is rich; set clients.rich_share too"
            )
        if clients.drop and self.recalls:
            name = f"cache.views={self.cache.views}" if self.cache.views else "traffic.loss_threshold"
            raise ValueError(
                f"clients.drop={clients.drop:g}: {name} keeps the latents of all clients, step by step; accepted with "
                "it is 0"
            )
        if clients.frozen and self.defence.kind in ("nopeek", "ressfl"):
            raise ValueError(
                f"defence.kind={self.defence.kind}: a loss changes nothing where clients.frozen=True; accepted with it "
                "are none, noise and dropout"
            )
        if clients.frozen and contrast.objective == "simclr":
            raise ValueError(
                "contrast.objective=simclr: both views train the clients, and clients.frozen=True; accepted with it "
                "are moco, mocov3 and byol"
            )
        if clients.frozen and contrast.both_views:
            raise ValueError("contrast.both_views=True: it doubles what clients learn from, and they are frozen")
        if clients.frozen and self.sync.own != "none":
            raise ValueError(
                f"sync.own={self.sync.own}: frozen clients are handed no average; accepted with clients.frozen=True is "
                "none"
            )
        self._check_recalling()
        if contrast.objective in OBJECTIVES:  # of others it is known once their class is
            self.check_objective(contrast.objective == "moco", contrast.objective in COMPARING)
        if clients.holds == "network":
            self._check_whole()
        if self.pretrain.spare_client >= clients.number:
            raise ValueError(
                f"pretrain.spare_client={self.pretrain.spare_client}: the clients are 0 to {clients.number - 1}"
            )
        return self

    def check_objective(self, queue: bool, batches: bool) -> None:
        """Raises unless batches and queues are as large as an objective needs them.

        Args:
            queue: whether it has a queue.
            batches: whether it needs more than one image, as negatives or for the BatchNorm of its predictor.

        Raises:
            SettingError: they are too small.
        """
        clients, contrast = self.clients, self.contrast
        alone = not contrast.feature_sharing or not contrast.concatenate  # a client's images are a batch of their own
        least = clients.batch if alone else self.step_images
        if batches and least < 2:
            which = "clients.batch" if alone else "clients.batch times the active clients"
            raise SettingError(
                f"contrast.objective={contrast.objective}: it compares the images of a batch; {which} must be at "
                "least 2"
            )
        if clients.drop:
            self.check_left(1, f"clients.drop={clients.drop:g}", batches)
        if not contrast.concatenate and self.model.head == "large" and least < 2:
            raise SettingError(
                "model.head=large: BatchNorm has nothing to average over at clients.batch=1 with "
                "contrast.concatenate=False; use another head or a larger batch"
            )
        if not queue or contrast.feature_sharing:
            return
        if clients.rich_batch_factor > 1:
            raise SettingError(
                f"clients.rich_batch_factor={clients.rich_batch_factor}: needs contrast.feature_sharing=True, because "
                "the clients' own queues take in equally many keys"
            )
        if contrast.queue < clients.number:
            raise SettingError(
                f"contrast.queue={contrast.queue}: without feature sharing each of the {clients.number} clients "
                "needs at least one key of its own"
            )

    def needed(self, quorum: float, min_clients: int | None) -> int:
        """Clients without whom no step is made.

        Args:
            quorum: their share of the active clients, or of those that a run begins with if these are fewer.
            min_clients: so many it begins with. None or 0: all.
        """
        return math.ceil(quorum * min(min_clients or self.clients.number, self.pool))

    def check_left(self, clients: int, setting: str, batches: bool) -> None:
        """Raises unless a step can be made of the images of so few clients.

        Args:
            clients: the fewest that may be left in a step.
            setting: by which setting, with its value.
            batches: whether the objective needs more than one image.

        Raises:
            SettingError: they are too few.
        """
        if (batches or self.model.head == "large") and clients * self.clients.batch < 2:
            raise SettingError(
                f"{setting}: one client may be all that is left in a step, and "
                f"contrast.objective={self.contrast.objective} with model.head={self.model.head} needs two images; set "
                "clients.batch to at least 2"
            )

    def _check_whole(self) -> None:
        """Of clients that hold the whole network, and share nothing but weights."""
        contrast, model = self.contrast, self.model
        needed = {
            "contrast.feature_sharing": (contrast.feature_sharing, False),
            "contrast.both_views": (contrast.both_views, contrast.symmetric),
            "contrast.concatenate": (contrast.concatenate, True),
            "clients.lr_scale": (self.clients.lr_scale, "per_client_mean"),
            "clients.frozen": (self.clients.frozen, False),
            "defence.kind": (self.defence.kind, "none"),
            "traffic.latents": (self.traffic.latents, "fp32"),
            "traffic.gradients": (self.traffic.gradients, "fp32"),
            "traffic.loss_threshold": (self.traffic.loss_threshold, None),
        }
        for name, (value, accepted) in needed.items():
            if value != accepted:
                raise ValueError(
                    f"{name}={value}: clients that hold the whole network (clients.holds=network) send nothing but "
                    f"weights; accepted is {accepted}"
                )
        averages = model.client_norm == "batch" or model.server_norm == "batch" or model.head == "large"
        if averages and self.clients.batch < 2:
            raise ValueError(
                f"clients.batch={self.clients.batch}: BatchNorm has nothing to average over on a client that holds the "
                "whole network; use at least 2, or model.client_norm=group, model.server_norm=group and another "
                "model.head than large"
            )

    def _check_recalling(self) -> None:
        cache, threshold = self.cache, self.traffic.loss_threshold
        if cache.views and not self.clients.frozen:
            raise ValueError(
                f"cache.views={cache.views}: latents of clients that learn grow old; accepted with "
                "clients.frozen=True, and traffic.loss_threshold without"
            )
        if threshold is not None and self.clients.frozen:
            raise ValueError(
                f"traffic.loss_threshold={threshold:g}: frozen clients learn in no step; to have them send less, set "
                "cache.views"
            )
        if threshold is not None and self.contrast.both_views:
            raise ValueError(f"traffic.loss_threshold={threshold:g}: accepted with contrast.both_views=False")
        if not self.recalls:
            for name in ("refresh", "flip", "crop", "noise"):
                if value := getattr(cache, name):
                    raise ValueError(f"cache.{name}={value:g}: no latents are kept; set cache.views too")
        elif self.pool < self.clients.number:
            name = f"cache.views={cache.views}" if cache.views else f"traffic.loss_threshold={threshold:g}"
            raise ValueError(f"{name}: needs all clients active; clients.pool={self.pool} of {self.clients.number} are")

    @property
    def recalls(self) -> bool:
        """Whether latents are kept, and used again."""
        return self.cache.views > 0 or self.traffic.loss_threshold is not None

    @property
    def pool(self) -> int:
        """Clients active in a round."""
        if self.clients.pool_share is not None:
            return max(1, round(self.clients.pool_share * self.clients.number))
        return self.clients.pool or self.clients.number

    @property
    def rich(self) -> int:
        """Rich clients, the last ones by number."""
        return round(self.clients.rich_share * self.clients.number)

    @property
    def pool_rich(self) -> int:
        """Rich clients active in a round."""
        return min(round(self.clients.rich_share * self.pool), self.rich)

    @property
    def batches(self) -> NDArray[np.int64]:
        """Images of each active client in a step, (P,)."""
        batches = np.full(self.pool, self.clients.batch)
        batches[self.pool - self.pool_rich :] *= self.clients.rich_batch_factor
        return batches

    def batch_of(self, client: int) -> int:
        """Images of one client in a step."""
        rich = client >= self.clients.number - self.rich
        return self.clients.batch * (self.clients.rich_batch_factor if rich else 1)

    @property
    def step_images(self) -> int:
        """Images of one step, over all active clients."""
        return int(self.batches.sum())

    def to_yaml(self) -> str:
        """All settings, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Config:
        """Read a configuration; settings left out take their defaults.

        Raises:
            SettingError: the file is missing, is not YAML, or a setting is unknown or not accepted.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingError(f"cannot read the configuration {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SettingError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(values, dict | None):
            raise SettingError(f"{path}: expected settings by name, found {type(values).__name__}")
        return cls(**(values or {}))

    def updated(self, changes: dict[str, Any]) -> Config:
        """A copy with some settings changed, by dotted name: ``config.updated({"clients.batch": 2})``.

        Raises:
            SettingError: names the setting, the value found and what would be accepted.
        """
        values = self.model_dump()
        for name, value in changes.items():
            *groups, last = name.split(".")
            target = values
            for group in groups:
                if not isinstance(target.get(group), dict):
                    raise SettingError(_unknown(name))
                target = target[group]
            target[last] = value
        return Config(**values)


def setting_names(settings: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All settings by dotted name."""
    names = []
    for name, field in settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            names += setting_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def by_name(config: Config) -> dict[str, Any]:
    """The values of all settings by dotted name."""
    return {name: reduce(getattr, name.split("."), config) for name in setting_names()}


def value_text(value: Any) -> str:
    """A value as YAML has it, on one line."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def _unknown(name: str) -> str:
    hint = nearest(name, setting_names())
    return f"unknown setting {name}" + (f"; {hint}" if hint else "")


def _explain(error: ValidationError, group: str) -> str:
    """Turn pydantic's report into one line a setting: name, value found, what is accepted."""
    lines = []
    for item in error.errors():
        parts = [group, *(part for part in item["loc"] if isinstance(part, str) and "[" not in part)]
        name = ".".join(part for part in parts if part)
        if item["type"] == "extra_forbidden":
            lines.append(_unknown(name))
        elif item["type"] == "value_error":  # our own rules name their settings
            lines += str(item["ctx"]["error"]).splitlines()
        else:
            message = item["msg"]
            lines.append(f"{name}={item['input']!r}: {message[0].lower()}{message[1:]}")
    return "\n".join(dict.fromkeys(lines))
