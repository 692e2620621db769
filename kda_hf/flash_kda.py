"""The interface of FlashKDA: `import kda_hf.flash_kda as flash_kda` is all that its users change."""

from .ops import fwd


__all__ = ["fwd", "get_workspace_size"]


def get_workspace_size(T_total: int, H: int, N: int = 1) -> int:
    """How many bytes of scratch memory the caller has to allocate for T_total tokens of H heads in N sequences: none.

    `fwd` takes no scratch memory, here and in FlashKDA, and allocates what it needs by itself.
    """
    return 0
