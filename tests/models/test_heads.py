import pytest
import torch
from torch import nn

from mocosfl.models import build_head
from mocosfl.models.heads import WIDTHS


@pytest.mark.parametrize(
    ("kind", "linears"),
    [
        ("v1", [(512, 128)]),
        ("small", [(512, 512)]),
        ("v2", [(512, 1024), (1024, 1024)]),
        ("large", [(512, 4096), (4096, 2048)]),
    ],
)
def test_heads_have_the_published_widths(kind: str, linears: list[tuple[int, int]]) -> None:
    head = build_head(kind, 512, seed=0)
    layers = [m for m in head if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == linears
    assert head(torch.randn(4, 512)).shape == (4, WIDTHS[kind])
    assert any(isinstance(m, nn.BatchNorm1d) for m in head) == (kind == "large")
