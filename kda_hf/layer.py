"""What a KDA layer does around its projections: convolution, gates, recurrence, norm, and its part of the cache."""

from typing import Any

import torch
from torch import nn
from transformers import Cache

from .cache import KDACacheLayer
from .ops import causal_conv1d, chunk_kda, has_kernel, kda_decode_step, recurrent_kda
from .ops.norm import gated_norm


class KDALayer(nn.Module):
    """
    A layer of Kimi Delta Attention, whatever its parameters are called: [`KimiDeltaAttention`] is one, and layers of
    other models become one.

    A subclass has the linear layers `q_proj`, `k_proj`, `v_proj`, `b_proj` and `o_proj`, the gated norm `o_norm`, the
    attributes below, and the methods that raise NotImplementedError here. With K = `head_dim`, V = `value_head_dim`,
    H = `num_heads`, HV = `num_value_heads` and D = 2·H·K + HV·V.
    """

    layer_idx: int  # which is also its place in the cache
    num_heads: int
    num_value_heads: int
    head_dim: int
    value_head_dim: int
    conv_kernel_size: int
    lower_bound: float | None  # of the decay's logarithm; None for the softplus gate
    allow_neg_eigval: bool
    norm_eps: float  # of `o_norm`
    q_proj: Any
    k_proj: Any
    v_proj: Any
    b_proj: Any
    o_proj: Any
    o_norm: Any

    def decay_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, T, HV·K]`."""
        raise NotImplementedError

    def output_gate_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, T, HV·V]`."""
        raise NotImplementedError

    def conv_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of q, k and v, `[channels, W]`."""
        raise NotImplementedError

    def gate_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`A_log` `[HV]` and `dt_bias` `[HV·K]`."""
        raise NotImplementedError

    def conv_weight(self) -> torch.Tensor:
        """Of q, k and v one below the other, `[D, W]`."""
        return torch.cat(self.conv_weights())

    @property
    def qkv_dims(self) -> list[int]:
        return [self.num_heads * self.head_dim] * 2 + [self.num_value_heads * self.value_head_dim]

    @property
    def qkv_heads(self) -> list[int]:
        return [self.num_heads, self.num_heads, self.num_value_heads]

    def attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        """The layer's forward; see [`KimiDeltaAttention`]."""
        batch, length = hidden_states.shape[:2]
        valid = None
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
                raise ValueError(
                    f"`attention_mask` must have shape [{batch}, at least {length}], got {list(attention_mask.shape)}"
                )
            if cu_seqlens is not None:
                raise ValueError("`attention_mask` can't be combined with `cu_seqlens`: packed inputs have no padding")
            valid = attention_mask[:, -length:].bool()

        qkv = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        g = self.decay_logits(hidden_states).view(batch, length, self.num_value_heads, self.head_dim)
        beta = self.b_proj(hidden_states)
        if self._steps(past_key_values, qkv[0], valid, cu_seqlens):
            assert past_key_values is not None
            output = self._step(past_key_values, qkv, g, beta, self._output_gate(hidden_states))
            return self.o_proj(output.flatten(-2))

        conv_inputs = torch.cat(qkv, dim=-1)
        if past_key_values is None:
            output, _, _ = self.mix(conv_inputs, g, beta, valid, cu_seqlens=cu_seqlens)
        else:
            output = self._mix_with_cache(past_key_values, conv_inputs, g, beta, valid, cu_seqlens)
        return self.o_proj(self._normed(output, self._output_gate(hidden_states)).flatten(-2))

    def _output_gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, HV, V]`."""
        return self.output_gate_logits(hidden_states).unflatten(-1, (self.num_value_heads, self.value_head_dim))

    def _normed(self, output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The gated norm of heads `[B, T, HV, V]`."""
        normed = gated_norm(output, self.o_norm.weight, gate, self.norm_eps)
        return self.o_norm(output, gate) if normed is None else normed

    def _steps(
        self,
        cache: Cache | None,
        q: torch.Tensor,
        valid: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> bool:
        """Whether one call does all between projections and `o_proj`: a token more for each row of the cache."""
        return (
            cache is not None
            and not torch.is_grad_enabled()
            and q.shape[1] == 1
            and valid is None
            and cu_seqlens is None
            and isinstance(cache.layers[self.layer_idx], KDACacheLayer)
            and cache.has_previous_state(self.layer_idx)
            and cache.layers[self.layer_idx].conv_states[0].shape[0] == q.shape[0]
            and self.steps_at_once(q, cache.layers[self.layer_idx].state_dtype)
        )

    def steps_at_once(self, x: torch.Tensor, state_dtype: torch.dtype) -> bool:
        """Whether `kda_decode_step` is the best there is for tensors like x. Without our kernel, a GPU may have FLA's
        for the recurrence."""
        return x.device.type == "cpu" or self._has_kernel("kda_decode_step", x, state_dtype)

    def _has_kernel(self, op: str, x: torch.Tensor, state_dtype: torch.dtype) -> bool:
        return not torch.is_grad_enabled() and has_kernel(op, x, self.head_dim, self.value_head_dim, state_dtype)

    def _step(
        self,
        cache: Cache,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        g: torch.Tensor,
        beta: torch.Tensor,
        gate: torch.Tensor,
    ) -> torch.Tensor:
        layer: Any = cache.layers[self.layer_idx]
        if layer.records:
            layer.record(self.replay, torch.cat(qkv, dim=-1), g, beta)
        q, k, v = (x.unflatten(-1, (heads, -1)) for x, heads in zip(qkv, self.qkv_heads, strict=True))
        output = kda_decode_step(
            q,
            k,
            v,
            g,
            beta,
            gate,
            conv_state=layer.conv_states[0],
            recurrent_state=layer.recurrent_states[0],
            **self.step_parameters(),
        )
        layer.note_update_in_place()
        layer.advance(1)
        return output

    def step_parameters(self) -> dict[str, Any]:
        """The arguments of `kda_decode_step` that this layer has."""
        names = ("q_conv_weight", "k_conv_weight", "v_conv_weight")
        weights = dict(zip(names, self.conv_weights(), strict=True))
        A_log, dt_bias = self.gate_parameters()
        return {
            **weights,
            "norm_weight": self.o_norm.weight,
            "norm_eps": self.norm_eps,
            "A_log": A_log,
            "dt_bias": dt_bias,
            "lower_bound": self.lower_bound,
            "allow_neg_eigval": self.allow_neg_eigval,
        }

    def mix(
        self,
        conv_inputs: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        valid: torch.Tensor | None = None,
        conv_state: torch.Tensor | None = None,
        recurrent_state: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        What happens between the projections: convolution, then KDA, from a state to a state.

        Args:
            conv_inputs (`torch.Tensor` of shape `[B, T, D]`): q, k and v before the convolution, side by side.
            g (`torch.Tensor` of shape `[B, T, HV, K]`): gate logits.
            beta (`torch.Tensor` of shape `[B, T, HV]`): β logits.
            valid (`torch.Tensor` of shape `[B, T]`, bool, *optional*): false for padding.
            conv_state (`torch.Tensor` of shape `[N, D, W]`, *optional*): the last W convolution inputs before these.
            recurrent_state (`torch.Tensor` of shape `[N, HV, K, V]`, *optional*): the state before these tokens.
            cu_seqlens (`torch.Tensor` of shape `[N + 1]`, *optional*): boundaries of packed sequences.
            output_final_state (`bool`, defaults to `False`): whether to return the states after these tokens.

        Returns:
            The output `[B, T, HV, V]`, and the convolution and recurrent states after these tokens, or `None`s.
        """
        order = padding = None
        if valid is not None:
            # Padding goes behind the tokens, wherever it was: there no convolution window and no state meets it. Its β
            # and g logits close both gates, β = 0 and decay 1, so that it passes through the recurrence unnoticed.
            order = torch.argsort(valid, dim=1, descending=True, stable=True)
            padding = ~valid.gather(1, order)
            conv_inputs = conv_inputs.gather(1, order[..., None].expand_as(conv_inputs))
            closed = torch.finfo(g.dtype).min
            g = g.gather(1, order[..., None, None].expand_as(g)).masked_fill(padding[..., None, None], closed)
            beta = beta.gather(1, order[..., None].expand_as(beta)).masked_fill(padding[..., None], closed)

        mixed, new_conv_state = causal_conv1d(
            conv_inputs,
            self.conv_weight(),
            initial_state=conv_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        if output_final_state and valid is not None:
            new_conv_state = self._last_inputs(conv_inputs, conv_state, valid.sum(1))

        batch, length = mixed.shape[:2]
        q, k, v = mixed.split(self.qkv_dims, dim=-1)
        # Token by token where that is faster: always for one, and for as many as one launch of the kernel takes.
        state_dtype = torch.float32 if recurrent_state is None else recurrent_state.dtype
        by_token = length == 1 or (length <= 16 and self._has_kernel("recurrent_kda", mixed, state_dtype))
        kda = recurrent_kda if by_token else chunk_kda
        A_log, dt_bias = self.gate_parameters()
        output, new_recurrent_state = kda(
            q.view(batch, length, self.num_heads, self.head_dim),
            k.view(batch, length, self.num_heads, self.head_dim),
            v.view(batch, length, self.num_value_heads, self.value_head_dim),
            g,
            beta,
            initial_state=recurrent_state,
            output_final_state=output_final_state,
            A_log=A_log.float(),
            dt_bias=dt_bias.float(),
            lower_bound=self.lower_bound,
            safe_gate=self.lower_bound is not None,
            use_gate_in_kernel=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            cu_seqlens=cu_seqlens,
        )
        assert output is not None
        if order is not None and padding is not None:
            output = output.masked_fill(padding[..., None, None], 0.0)
            output = torch.zeros_like(output).scatter(1, order[..., None, None].expand_as(output), output)
        return output, new_conv_state, new_recurrent_state

    def _last_inputs(
        self, conv_inputs: torch.Tensor, conv_state: torch.Tensor | None, lengths: torch.Tensor
    ) -> torch.Tensor:
        """The last W convolution inputs `[B, D, W]` of rows that hold `lengths` `[B]` tokens, then padding."""
        width = self.conv_kernel_size
        inputs = conv_inputs.transpose(1, 2)
        past = inputs.new_zeros(*inputs.shape[:2], width) if conv_state is None else conv_state.to(inputs.dtype)
        window = lengths[:, None] + torch.arange(width, device=lengths.device)
        return torch.cat([past, inputs], dim=-1).gather(2, window[:, None].expand(-1, inputs.shape[1], -1))

    def _mix_with_cache(
        self,
        cache: Cache,
        conv_inputs: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        valid: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        layer: Any = cache.layers[self.layer_idx]  # ours, or one for recurrent states from another cache
        length = conv_inputs.shape[1]
        records = isinstance(layer, KDACacheLayer) and layer.records and cu_seqlens is None

        conv_state: Any = None
        recurrent_state: Any = None
        if cache.has_previous_state(self.layer_idx):
            conv_state, recurrent_state = layer.conv_states[0], layer.recurrent_states[0]
            if torch.is_grad_enabled():
                # The update below writes to the cached tensors, which autograd needs as they are now
                conv_state, recurrent_state = conv_state.clone(), recurrent_state.clone()

        # A layer that can be cropped keeps the inputs of its last tokens and the state before them. A long block is
        # run in two parts, so that this state is at hand and what is kept has a bound.
        blocks = [(conv_inputs, g, beta, valid)]
        if records and length > layer.max_rollback:
            parts = (slice(0, length - layer.max_rollback), slice(length - layer.max_rollback, length))
            blocks = [
                (conv_inputs[:, part], g[:, part], beta[:, part], None if valid is None else valid[:, part])
                for part in parts
            ]
        outputs = []
        for block in blocks:
            output, conv_state, recurrent_state = self.mix(
                *block, conv_state, recurrent_state, cu_seqlens, output_final_state=True
            )
            if records and block is blocks[-1]:
                layer.record(self.replay, *block)
            cache.update_conv_state(conv_state, self.layer_idx)
            cache.update_recurrent_state(recurrent_state, self.layer_idx)
            outputs.append(output)
        if isinstance(layer, KDACacheLayer):
            layer.advance(length)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def replay(self, conv_inputs, g, beta, valid, conv_state, recurrent_state):
        """Runs recorded tokens once more from the states before them; the cache's `crop` calls it."""
        return self.mix(conv_inputs, g, beta, valid, conv_state, recurrent_state, output_final_state=True)[1:]
