"""What every client of a plan holds."""

from __future__ import annotations

from torch import nn

from mocosfl.baselines import held_by_clients
from mocosfl.footprint.plan import Plan
from mocosfl.models import build, build_head


def held(plan: Plan) -> nn.Module:
    """The client half; or with ``clients.holds=network`` the whole network, with head and predictor.

    Raises:
        SettingError: the file that ``contrast.objective`` names cannot be used.
    """
    config = plan.config
    model = build(config.model, config.data.channels, plan.size, config.seed)
    head = build_head(config.model.head, model.features, config.seed)
    return held_by_clients(config, model.client, model.server, head)[0]
