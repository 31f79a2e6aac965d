"""What the Flower run config says: ``[tool.flwr.app.config]`` of pyproject.toml, or ``flwr run --run-config``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import ConfigDict, Field, model_validator

from mocosfl.config import Config, Settings
from mocosfl.errors import SettingError
from mocosfl.network.settings import Seconds
from mocosfl.recipes import recipe
from mocosfl.run import Run


class FlowerSettings(Settings):
    """Every key of the run config, with dashes instead of underscores. Flower knows no unset values, so an empty text
    or 0 stands for them."""

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"), populate_by_name=True)

    mode: Literal["latents", "average"] = "latents"
    """latents: frozen clients send latents of many steps in one message. average: clients learn by themselves for a
    round, and Flower's FedAvg averages their halves. A run that goes on keeps its own."""
    recipe: str = ""
    """A name from `mocosfl recipes`, or a YAML file of the server's. Unset: the settings of the run that clients.init
    names, or digits."""
    changes: str = Field(default="", alias="set")
    """Settings that differ from the recipe's: `clients.number=4 train.epochs=2`."""
    out: str = ""
    """Run folder, on the server's machine. Unset: runs/RECIPE-flower-DATE-TIME where the SuperLink was started."""
    resume: bool = False
    """Go on with the run in that folder from its last checkpoint, with its own settings."""
    overwrite: bool = False
    """Delete the run in the folder first."""
    evaluate_on: str = ""
    """Labelled images of the server's own, as data.source, for kNN and linear probe. Unset: no evaluation; for a run
    that goes on, those that it began with."""
    min_clients: Annotated[int, Field(ge=0)] = 0
    """The run begins when so many clients have joined. Unset: clients.number. Others may join at any time."""
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of min-clients (of clients.pool, if that is smaller) without whose answers the run waits."""
    timeout: Seconds = 600.0
    """Seconds after which a client beyond the quorum is no longer waited for."""
    give_up: Seconds = 3600.0
    """Seconds without a quorum after which the run ends; a message is valid for as long."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Steps that one message asks for, in mode latents. Unset: as many as fit in memory. (In mode average it is
    sync.every.)"""
    memory: Annotated[float, Field(gt=0)] = 256.0
    """MiB of the latents that one message to each client brings in; twice as much is held."""
    max_latent: Annotated[float, Field(gt=0)] = 100.0
    """Greatest root mean square of one image's latents; an answer with larger ones is not used."""

    @model_validator(mode="after")
    def _folder_is_named(self) -> Self:
        if (self.resume or self.overwrite) and not self.out:
            raise ValueError(f"out='': name the run folder to {'resume' if self.resume else 'overwrite'}")
        if self.resume and self.overwrite:
            raise ValueError("overwrite=true: resume=true goes on in the run's folder; set only one of them")
        if self.resume and self.recipe:
            raise ValueError(f"recipe={self.recipe!r}: resume=true goes on with the settings of the run in out")
        return self

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> FlowerSettings:
        """Read a run config.

        Raises:
            SettingError: a key is unknown, or its value not accepted.
        """
        if unknown := sorted(run_config.keys() - {str(field.alias) for field in cls.model_fields.values()}):
            raise SettingError(f"unknown key {unknown[0]} of the Flower run config")
        return cls(**run_config)

    def config(self) -> Config:
        """The settings of the run.

        Raises:
            SettingError: a name or a value is not accepted.
            RunError: the run that goes on, or starts this one, cannot be read.
        """
        changes = self._changes()
        start = changes.get("clients.init")
        if self.resume:
            config = Run.open(self.out).config
        elif self.recipe.endswith((".yaml", ".yml")):
            config = Config.from_yaml(self.recipe)
        elif self.recipe or start is None:
            config = recipe(self.recipe or "digits")
        else:
            config = Run.open(str(start)).config
        return config.updated(changes) if changes else config

    def going_on(self, config: Config) -> Self:
        """These, with what a run that goes on is known to have: its mode, and where its own images are from.

        Args:
            config: the settings of the run.

        Raises:
            RunError: its folder cannot be read.
        """
        mode = "latents" if config.clients.frozen else "average"
        evaluate_on = self.evaluate_on or (Run.open(self.out).data_facts() or {}).get("evaluate_on") or ""
        return self.model_copy(update={"mode": mode, "evaluate_on": evaluate_on})

    def _changes(self) -> dict[str, Any]:
        """``set``, by dotted name."""
        changes = {}
        try:
            for word in shlex.split(self.changes):
                name, equals, value = word.partition("=")
                if not equals:
                    raise SettingError(f"set={word}: expected NAME=VALUE, such as train.epochs=2")
                changes[name] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise error if isinstance(error, SettingError) else SettingError(f"set={self.changes}: {error}") from error
        return changes
