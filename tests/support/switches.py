"""A ModelConfig with a switch that no code knows yet, as a later version may have one."""

from dataclasses import asdict, make_dataclass
from typing import Any

from llmctl.config import ModelConfig
from llmctl.model.shapes import complete

Switched: Any = make_dataclass("Switched", [("new_switch", bool, False)], bases=(ModelConfig,), frozen=True)


def switched(config: ModelConfig, *, new_switch: bool = True) -> ModelConfig:
    """Return the config, complete, with the new switch."""
    result: ModelConfig = Switched(**asdict(complete(config)), new_switch=new_switch)
    return result
