"""Mixtures of experts at prefill.

transformers' "grouped_mm" scales, puts in order and sums the outputs of all experts of all tokens in fp32, which can
take as long as the products. Here the weights of a token's experts scale what is between the two products, which is
narrower.
"""

import torch
from torch import nn


FEWEST_TOKENS = 256  # of a call: fewer are a decode step's, where transformers' functions do as well


def grouped_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    What the experts of a module of transformers make of each token, summed with its weights.

    Deterministic, and without a wait for the device. Products are rounded to the dtype of `hidden_states`, sums over
    the experts of a token are in fp32.

    Args:
        module: has `gate_up_proj` `[experts, 2 * intermediate, hidden]`, `down_proj` `[experts, hidden, intermediate]`.
        hidden_states (`torch.Tensor` of shape `[T, hidden]`).
        top_k_index (`torch.Tensor` of shape `[T, k]`, int64): the experts of each token.
        top_k_weights (`torch.Tensor` of shape `[T, k]`).

    Returns:
        `torch.Tensor` of shape `[T, hidden]`, in the dtype of `hidden_states`.
    """
    tokens, k = top_k_index.shape
    expert, order = top_k_index.flatten().sort()
    ends = torch.searchsorted(expert, torch.arange(len(module.gate_up_proj), device=expert.device), right=True).int()

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends)

    inner = module._apply_gate(product(hidden_states[order // k], module.gate_up_proj))
    inner *= top_k_weights.flatten()[order, None]
    outputs = product(inner, module.down_proj)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return outputs[place].view(tokens, k, -1).sum(1)


class GroupedExperts(nn.Module):
    """An experts module of transformers whose prefill on a GPU, in bf16 and without gradients, is [`grouped_experts`],
    where "grouped_mm" is what the configuration chooses."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the module's own."""
        if self._fits(hidden_states):
            return grouped_experts(self, hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _fits(self, x: torch.Tensor) -> bool:
        weights = (self.gate_up_proj, self.down_proj)
        return (
            x.is_cuda
            and len(x) >= FEWEST_TOKENS
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and self.config._experts_implementation == "grouped_mm"
            and all(type(w) is nn.Parameter and w.dtype == x.dtype and w.device == x.device for w in weights)
            and x.dtype == torch.bfloat16  # in another dtype PyTorch takes the groups one by one
            and torch.cuda.get_device_capability(x.device) >= (8, 0)
            and not getattr(self, "_is_expert_parallel", False)
            and len(self.gate_up_proj) == getattr(self.config, "num_local_experts", 0)  # else others have the rest
        )
