"""What the KDA operators compute from, in one tuple: the arguments that all of them share."""

from typing import NamedTuple

import torch

from . import reference


class KDAInputs(NamedTuple):
    """The first arguments of every KDA operator in `torch.ops.kda_hf`, in the order of their schema, `SCHEMA`."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, HV, V]
    g: torch.Tensor  # [B, T, HV, K]
    beta: torch.Tensor  # [B, T, HV]
    initial_state: torch.Tensor | None  # [N, HV, K, V]; with state indices, a pool of states
    A_log: torch.Tensor | None  # [HV]
    dt_bias: torch.Tensor | None  # [HV, K] or [HV * K]
    cu_seqlens: torch.Tensor | None  # [N + 1]
    state_v_first: bool  # states are [V, K]
    scale: float
    lower_bound: float | None
    use_gate: bool
    use_qk_norm: bool
    use_beta_sigmoid: bool
    allow_neg_eigval: bool

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Those that may have a gradient: the fields from q to dt_bias."""
        return self[:8]

    @property
    def sequences(self) -> int:
        """N: how many sequences there are, and states of them."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the states that the operator returns."""
        return reference.compute_dtype(self.q) if self.initial_state is None else self.initial_state.dtype

    @property
    def has_mixed_dtypes(self) -> bool:
        """Whether k or v differs from q, or g or β is neither of that dtype nor float32."""
        dtype = self.q.dtype
        same = self.k.dtype == dtype and self.v.dtype == dtype
        return not (same and all(x.dtype in (dtype, torch.float32) for x in (self.g, self.beta)))

    def activated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v, log-decay and β after `reference.activate`."""
        activations = (self.use_gate, self.use_qk_norm, self.use_beta_sigmoid, self.allow_neg_eigval)
        return reference.activate(*self[:5], self.A_log, self.dt_bias, self.scale, self.lower_bound, *activations)

    def key_first_state(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The initial state as [N, HV, K, V] of `dtype`."""
        if self.initial_state is None:
            return None
        return (self.initial_state.mT if self.state_v_first else self.initial_state).to(dtype)


def fwd_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> KDAInputs:
    """Those of FlashKDA's call, which applies every activation and has states of [V, K]."""
    return KDAInputs(
        q,
        k,
        v,
        g,
        beta,
        initial_state,
        A_log,
        dt_bias,
        cu_seqlens,
        state_v_first=True,
        scale=scale,
        lower_bound=lower_bound,
        use_gate=True,
        use_qk_norm=True,
        use_beta_sigmoid=True,
        allow_neg_eigval=False,
    )


SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, {state}, Tensor? A_log, Tensor? dt_bias, Tensor? cu_seqlens, "
    "bool state_v_first, float scale, float? lower_bound, bool use_gate, bool use_qk_norm, bool use_beta_sigmoid, "
    "bool allow_neg_eigval"
)
NUM_INPUTS = len(KDAInputs._fields)
