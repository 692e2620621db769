"""The interface of FlashKDA: `import kda_hf.flash_kda as flash_kda` is all that its users change."""

from .ops import fwd


__all__ = ["fwd"]
