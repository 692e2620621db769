"""What a decode step consists of beside its mixers: products of few rows with large weights, norms and SwiGLU.

Two implementations of the same functions: PyTorch's, and kernels of the CUDA extension, which do more in a call and
overlap with each other. `norm` is a pair of a weight `[K]` and an epsilon.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from . import cuda


Norm = tuple[torch.Tensor, float]
MOST_ROWS = 32  # of the kernels for products; torch's take more of them, at the speed of the weight too
MOST_NORMED = 8  # of the kernel that takes norms along; for more, they are made of what the product before it leaves
GROUP_ROWS = 64  # rows of a group's weight are a multiple of these
LOW_RANK_WIDTH = 128  # of heads and low-rank inputs, for the kernel that takes second layers along with a step
LOW_RANK_TAPS = 4  # of its convolutions
MOST_LOW_RANK = 1024  # heads of all rows for it: each has CTAs of its own, which read the weights anew
ATTENTION_WIDTHS = (64, 128)
MOST_GROUPED = 32  # heads of queries that share one of keys


class TorchRows:
    """By PyTorch."""

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """`x / sqrt(mean(x²) + eps) · weight` of `[M, K]`."""
        return F.rms_norm(x, norm[0].shape, *norm)

    def product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
        next_norm: Norm | None = None,
    ) -> torch.Tensor:
        """
        `norm(x) · weightᵀ + residual`, of `[M, K]` and `[N, K]`. The result may take the place of `residual`.

        Args:
            next_norm: the norm of the result that will be asked for.
        """
        y = F.linear(x if norm is None else self.norm(x, norm), weight)
        return y if residual is None else residual + y

    def swiglu(self, x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> torch.Tensor:
        """`silu(y of gate) · y of up`, `[M, N]`, with y = `norm(x) · weightᵀ` and `weight` `[2 N, K]`, gate first."""
        gate, up = self.product(x, weight, norm).chunk(2, -1)
        return F.silu(gate) * up

    def grouped(self, x: torch.Tensor, weight: torch.Tensor, groups: int) -> list[torch.Tensor]:
        """Products `[M, N]` of each group of columns of x `[M, groups · K]` with one of rows of `[groups · N, K]`."""
        return [F.linear(*pair) for pair in zip(x.chunk(groups, -1), weight.chunk(groups), strict=True)]

    def low_rank_step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        low_rank: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        conv_state: torch.Tensor,
        recurrent_state: torch.Tensor,
        scale: float,
        parameters: dict[str, Any],
    ) -> torch.Tensor | None:
        """
        `kda_decode_step` of what two more layers make of `low_rank`, or None where nothing does both at once.

        Args:
            low_rank: `[B, 2 · rank]`, the inputs of the second layers of decay and output gate, side by side.
            weights: `[HV·K, rank]` and `[HV·V, rank]`, of these layers.
            parameters: the other arguments of `kda_decode_step`.
        """
        return None

    def attention_workspace(self, like: torch.Tensor, *sizes: int) -> torch.Tensor | None:
        """What `attention_step` needs for batch, heads of queries, heads of keys, capacity and width."""
        return None

    def attention_step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: torch.Tensor,
        starts: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor, float] | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
        workspace: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        One token through softmax attention, with norm and RoPE; its key and value become number `length` of those kept.

        Args:
            q: `[B, H, D]`; k and v: `[B, KVH, D]`, before their norm.
            keys, values: `[B, KVH, capacity, D]`, of which a row's first `starts` `[B]` are none.
            length: `[1]`, how many there are.
            norms: weights `[D]` for q and k, and an epsilon.
            rotary: cosines and sines `[B, 1, D]`.

        Returns:
            `[B, H, D]`.
        """
        if norms is not None:
            q, k = self.norm(q, (norms[0], norms[2])), self.norm(k, (norms[1], norms[2]))
        q, k = q.unsqueeze(2), k.unsqueeze(2)
        if rotary is not None:
            q, k = apply_rotary_pos_emb(q, k, *rotary)
        keys.index_copy_(2, length, k)
        values.index_copy_(2, length, v.unsqueeze(2))
        at = torch.arange(keys.shape[2], device=q.device)
        mask = (at <= length) & (at >= starts[:, None])
        is_grouped = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask[:, None, None], scale=scale, enable_gqa=is_grouped
        )
        return o.squeeze(2)


class KernelRows(TorchRows):
    """
    By the CUDA extension: see `refusal`.

    Its kernels read weights, those of norms included, while the kernel before them in the stream may still be running.
    So that one must not have written them; any other kernel before may have.
    """

    def __init__(self) -> None:
        # What a product has left for the norm of its result: the result, the norm's weight, their product, and parts of
        # the sums of squares.
        self.left: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops.kda_hf_cuda.rms_norm(x, *norm, out)
        return out

    def product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
        next_norm: Norm | None = None,
    ) -> torch.Tensor:
        if residual is not None:
            self.left = None
        if not _has_kernel(x, len(weight)):
            x = x if norm is None else self.norm(x, norm)
            return F.linear(x, weight) if residual is None else residual.addmm_(x, weight.t())
        out = x.new_empty(len(x), len(weight)) if residual is None else residual
        x, *of_norm = self._normed(x, norm)
        for_next: list[Any] = [None, None, None]
        if next_norm is not None and len(x) > MOST_NORMED and x.dtype != torch.float16:
            parts = torch.ops.kda_hf_cuda.linear_parts(len(x), *weight.shape)
            squares = torch.empty(len(x), parts, dtype=torch.float32, device=x.device)
            for_next = [next_norm[0], torch.empty(out.shape, dtype=x.dtype, device=x.device), squares]
            self.left = (out, *for_next)
        torch.ops.kda_hf_cuda.linear(x, weight, out, *of_norm, residual, *for_next, 1, False)
        return out

    def swiglu(self, x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> torch.Tensor:
        out = x.new_empty(len(x), len(weight) // 2)
        if _has_kernel(x, out.shape[1]):
            x, *of_norm = self._normed(x, norm)
            torch.ops.kda_hf_cuda.linear(x, weight, out, *of_norm, None, None, None, None, 1, True)
        else:
            torch.ops.kda_hf_cuda.swiglu(F.linear(self.norm(x, norm), weight), out)
        return out

    def _normed(self, x: torch.Tensor, norm: Norm | None) -> list[Any]:
        """x as a product takes it, with the product's `norm_weight`, `norm_eps` and `squares`."""
        if norm is None:
            return [x, None, 0.0, None]
        # A product that takes the norm along multiplies x with the norm's weight before the norm's factor. Float16 has
        # no range for that.
        if x.dtype != torch.float16:
            if len(x) <= MOST_NORMED:
                return [x, *norm, None]
            left, self.left = self.left, None
            if left is not None and left[0] is x and left[1] is norm[0]:
                return [left[2], None, norm[1], left[3]]
        return [self.norm(x, norm), None, 0.0, None]

    def grouped(self, x: torch.Tensor, weight: torch.Tensor, groups: int) -> list[torch.Tensor]:
        if len(x) > MOST_ROWS:
            return list(torch.bmm(x.view(len(x), groups, -1).transpose(0, 1), weight.unflatten(0, (groups, -1)).mT))
        out = x.new_empty(len(x), len(weight))
        torch.ops.kda_hf_cuda.linear(x, weight, out, None, 0.0, *(None,) * 5, groups, False)
        return list(out.chunk(groups, -1))

    def low_rank_step(
        self, q, k, v, beta, low_rank, weights, conv_state, recurrent_state, scale, parameters
    ) -> torch.Tensor | None:
        batch, _, heads, width = q.shape
        widths = (width, v.shape[-1], low_rank.shape[1] // 2)
        if v.shape[2] != heads or any(x != LOW_RANK_WIDTH for x in widths) or batch * heads > MOST_LOW_RANK:
            return None
        if conv_state.shape[-1] != LOW_RANK_TAPS or conv_state.dtype != q.dtype:
            return None
        g, output_gate = low_rank.view(batch, 1, 2, 1, -1).unbind(2)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        names = ("A_log", "dt_bias", "lower_bound")
        more = ("q_conv_weight", "k_conv_weight", "v_conv_weight", "norm_weight", "norm_eps")
        torch.ops.kda_hf_cuda.decode_step(
            q, k, v, g, beta, output_gate, scale, out, *(parameters[name] for name in names), recurrent_state,
            conv_state, *(parameters[name] for name in more), None, parameters["allow_neg_eigval"], False, *weights,
        )  # fmt: skip
        return out

    def attention_workspace(self, like: torch.Tensor, *sizes: int) -> torch.Tensor | None:
        batch, heads, key_heads, capacity, width = sizes
        size = torch.ops.kda_hf_cuda.attention_step_workspace_bytes(batch, heads, key_heads, width, capacity)
        return torch.zeros(size, dtype=torch.uint8, device=like.device)

    def attention_step(self, q, k, v, keys, values, length, starts, norms, rotary, scale, workspace) -> torch.Tensor:
        q_norm, k_norm, eps = norms or (None, None, 0.0)
        cos, sin = (None, None) if rotary is None else (x.squeeze(1) for x in rotary)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        torch.ops.kda_hf_cuda.attention_step(
            q, k, v, keys, values, length, starts, q_norm, k_norm, eps, cos, sin, scale, workspace, out
        )
        return out


def _has_kernel(x: torch.Tensor, outputs: int) -> bool:
    return len(x) <= MOST_NORMED or (len(x) <= MOST_ROWS and outputs % 8 == 0)


def refusal(parameters: list[torch.Tensor], attention: Any) -> str | None:
    """Why the kernels can't serve a model with these `parameters`, or None.

    Args:
        attention: the model's configuration, if it has attention layers.
    """
    if not cuda.is_wanted():
        return "the environment asks for another backend"
    first = parameters[0]
    if any(p.dtype != first.dtype for p in parameters) or first.dtype not in (torch.bfloat16, torch.float16):
        return "the parameters are not all of one dtype with 16 bits"
    if any(p.ndim == 2 and p.shape[1] % 8 for p in parameters):
        return "a weight has rows that are no multiple of 16 bytes"
    if any(p.data_ptr() % 16 or not p.is_contiguous() for p in parameters):
        return "a weight is not contiguous, or not aligned"
    if attention is not None:
        if attention.head_dim not in ATTENTION_WIDTHS:
            return f"the attention layers have heads of {attention.head_dim}"
        if attention.num_attention_heads > MOST_GROUPED * attention.num_key_value_heads:
            return f"more than {MOST_GROUPED} heads of queries share one of keys"
    return cuda.refusal_of_device(first.device)
