"""The layers of a decode step on a CPU, by the CPU extension: few calls each, in which the products are torch's.

Without the extension, in what it refuses, and where autocast or a compiler would change what is called, layers are what
:mod:`.rows` has them consist of.
"""

from typing import Any

import torch

from . import cpu, rows


class CpuRows(rows.TorchRows):
    """By PyTorch, with norms by the CPU extension: see `refusal`."""

    def norm(self, x: torch.Tensor, norm: rows.Norm) -> torch.Tensor:
        return cpu.rms_norm(x, *norm)


class KDALayer:
    """x `[B, D]` of one token a row, plus a KDA layer of its norm.

    Args:
        projections: weights `[P, D]` of q, k, v, the first layers of decay and output gate, and β, one below the other.
        decay, gate: `[HV * K, R]` and `[HV * V, R]`, of the second layers.
        output: `[D, HV * V]`.
        parameters: other arguments of `kda_decode_step`.
    """

    def __init__(
        self,
        norm: rows.Norm,
        projections: torch.Tensor,
        decay: torch.Tensor,
        gate: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        parameters: dict[str, Any],
    ):
        def given(*names: str) -> tuple[Any, ...]:
            return tuple(parameters[name] for name in names)

        weights = _transposed(projections, decay, gate, output)
        self.before = (*norm, *weights, scale, *given("A_log", "dt_bias", "lower_bound"))
        names = ("q_conv_weight", "k_conv_weight", "v_conv_weight", "norm_weight", "norm_eps", "allow_neg_eigval")
        self.after = given(*names)

    def __call__(self, x: torch.Tensor, conv_state: torch.Tensor, recurrent_state: torch.Tensor) -> torch.Tensor | None:
        """None, with nothing done, where the extension does not serve this."""
        if _is_watched():
            return None
        y = cpu.kda_layer(x, *self.before, recurrent_state, conv_state, *self.after)
        return None if isinstance(y, str) else y


class Attention:
    """A softmax attention layer of the norm of x `[B, D]`, of one token a row, before and after RoPE and the cache.

    Args:
        projections: weights `[P, D]` of q, k and v, one below the other.
        output: `[D, H * head_dim]`.
        heads, key_heads: how many of queries, and of keys and values.
        norms: weights `[head_dim]` for q and k, and an epsilon, or None.
    """

    def __init__(
        self,
        norm: rows.Norm,
        projections: torch.Tensor,
        output: torch.Tensor,
        heads: int,
        key_heads: int,
        head_dim: int,
        norms: tuple[torch.Tensor, torch.Tensor, float] | None,
        scale: float,
    ):
        weight, self.weight = _transposed(projections, output)
        self.arguments = (*norm, weight, heads, key_heads, head_dim, *(norms or (None, None, 0.0)))
        self.scale = scale

    def inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """q, k and v `[B, heads, 1, head_dim]`; None where the extension does not serve this."""
        if _is_watched():
            return None
        qkv = cpu.attention_inputs(x, *self.arguments)
        return None if isinstance(qkv, str) else qkv

    def output(self, x: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
        """x plus what the layer adds to it, with keys and values `[B, KVH, length, head_dim]` that q sees all of; None
        where the extension does not serve this."""
        y = cpu.attention_output(x, q, keys, values, self.scale, self.weight)
        return None if isinstance(y, str) else y


class MLP:
    """x `[B, D]` plus the SwiGLU layer of its norm.

    Args:
        gate_and_up: weights `[2 N, D]`, gate first.
        down: `[D, N]`.
    """

    def __init__(self, norm: rows.Norm, gate_and_up: torch.Tensor, down: torch.Tensor):
        self.arguments = (*norm, *_transposed(gate_and_up, down))

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """None, with nothing done, where the extension does not serve this."""
        if _is_watched():
            return None
        y = cpu.mlp(x, *self.arguments)
        return None if isinstance(y, str) else y


def _transposed(*weights: torch.Tensor) -> list[torch.Tensor]:
    return [weight.detach().t() for weight in weights]


def _is_watched() -> bool:
    """Whether something wants to see each product: autocast, or a compiler."""
    return torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


def refusal(parameters: list[torch.Tensor]) -> str | None:
    """Why the extension can't serve a model with these `parameters`, or None."""
    first = parameters[0]
    if first.device.type != "cpu":
        return f"the model is on {first.device}"
    if not cpu.is_wanted():
        return "there is no CPU extension, or the environment asks for another backend"
    if any(p.dtype != first.dtype for p in parameters) or first.dtype not in cpu.DTYPES:
        return "the parameters are not all of one dtype with 16 or 32 bits"
    return None
