"""ONNX files compute what PyTorch computes."""

import numpy as np
import pytest
import torch
from shaken import shaken
from torch import Tensor, nn

from mocosfl.config import ModelSettings
from mocosfl.encoder import Encoder
from mocosfl.errors import RunError, SettingError
from mocosfl.exporting import to_onnx as module
from mocosfl.exporting.export import ClientHalf
from mocosfl.exporting.to_onnx import to_onnx
from mocosfl.models.layers import with_plain_filters

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("channels", "size", "output", "settings"),
    [
        (3, 16, "features", {"cut": 3, "bottleneck": "C4S2"}),
        (3, 16, "latents", {"cut": 3, "bottleneck": "C4S2"}),
        (1, 32, "features", {"stem": "224", "cut": 1, "client_norm": "batch", "server_norm": "batch"}),
    ],
)
def test_equals_pytorch(channels: int, size: int, output: str, settings: dict[str, object]) -> None:
    encoder = shaken(Encoder(ModelSettings(width=8, **settings), channels, size))
    network = encoder if output == "features" else ClientHalf(encoder).eval()
    file, difference = to_onnx(with_plain_filters(network), (channels, size, size), output)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(i.name, i.type) for i in session.get_inputs()] == [("images", "tensor(float)")]
    assert [o.name for o in session.get_outputs()] == [output]
    images = torch.rand(4, channels, size, size)
    with torch.inference_mode():
        expected = network(images).numpy()
    (found,) = session.run(None, {"images": images.numpy()})
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert 0 <= difference < 1e-4 * np.abs(expected).max()
    assert b".py" not in file  # no notes of where the source lies on this machine


class Drawing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images + torch.rand_like(images)


def test_a_file_that_computes_something_else_is_refused() -> None:
    with pytest.raises(RunError, match="the ONNX file computes something else than PyTorch: they differ by up to"):
        to_onnx(Drawing(), (1, 4, 4), "features")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(SettingError, match="not installed: no_such_package; pip install onnx no_such_package"):
        to_onnx(nn.Identity(), (1, 4, 4), "features")
