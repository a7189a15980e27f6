"""OmegaConf resolvers that the recipes use."""

from __future__ import annotations

from omegaconf import OmegaConf

from sdar_verl.local import start_policy

OmegaConf.register_new_resolver("sdar_start_policy", start_policy, replace=True)
