"""Healing of a model whose attention was swapped for KDA: distillation from the original. See docs/heal.md."""

from .checkpoints import HealInterrupted
from .run import heal, load_causal_lm
from .settings import HealSettings


__all__ = ["HealInterrupted", "HealSettings", "heal", "load_causal_lm"]
