"""Networks as ONNX, checked with onnxruntime."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mocosfl.errors import RunError, SettingError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
"""Version of ONNX's operators; runtimes have it since 2023."""

BATCHES = (1, 2, 5)
"""Batch sizes of the check. The network is traced with another one."""
TOLERANCE = 1e-3
"""Greatest difference that passes, relative to the greatest number of the result."""


def check_installed() -> None:
    """Raises ``SettingError`` where a package is missing that ONNX files are written and checked with."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise SettingError(f"not installed: {', '.join(missing)}; pip install {' '.join(PACKAGES)}")


def to_onnx(network: nn.Module, shape: tuple[int, ...], output: str, license: str | None = None) -> tuple[bytes, float]:
    """Write a network as ONNX, and compute with it.

    Args:
        network: in eval mode; maps images (n, *``shape``), float32 in [0, 1], to a batch of something.
        shape: of one image.
        output: what the result is called. The input is called ``images``.
        license: of the weights, noted as ``license`` among the file's metadata. Unset: nothing is.

    Returns:
        The file, for any batch size; and the greatest difference to PyTorch on random images, in batches of several
        sizes.

    Raises:
        SettingError: a package is missing, or the network does what PyTorch cannot write.
        RunError: the file does not compute the same.
    """
    check_installed()
    import onnx

    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    with _quiet():
        try:
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:  # a network from elsewhere may do what ONNX cannot
            raise SettingError(f"PyTorch cannot write this network as ONNX: {str(error).splitlines()[0]}") from error
    assert program is not None
    model = program.model_proto
    _forget(model)
    if license is not None:
        model.metadata_props.add(key="license", value=license)
    onnx.checker.check_model(model)
    file = model.SerializeToString()
    return file, _difference(network, file, shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter says about itself (deprecated calls, optional packages) is nothing that a user could mend."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _forget(model: Any) -> None:
    """Drop notes of how the model was made: among them are paths of this machine."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


@torch.inference_mode()
def _difference(network: nn.Module, file: bytes, shape: tuple[int, ...]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for batch in BATCHES:
        images = torch.rand(batch, *shape, generator=generator)
        expected: Tensor = network(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= TOLERANCE * max(1.0, largest):
            raise RunError(
                f"the ONNX file computes something else than PyTorch: they differ by up to {difference:.2g} in numbers "
                f"up to {largest:.2g}"
            )
        worst = max(worst, difference)
    return worst
