"""
Continuous batching on the operators: requests join and leave a running batch, and each gets the tokens that it would
get alone. `python examples/continuous_batching.py` serves a model of KDA layers with random weights.

A request has a slot: one row of the pools of convolution states and of recurrent states, in every layer. The prompts
of those that arrive are prefilled packed into one row. From then on requests decode together, with one
`kda_decode_step` a layer: `state_indices` says which slot each row of the batch has, and -1 that it has none. So the
batch has one shape, and on a GPU the step is a CUDA graph.
"""

from dataclasses import dataclass, field
from itertools import accumulate

import torch

from kda_hf import KDAConfig, KDAForCausalLM
from kda_hf.ops import causal_conv1d, chunk_kda, kda_decode_step


GATE = ("A_log", "dt_bias", "lower_bound", "allow_neg_eigval")
IN_KERNEL = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


@dataclass(eq=False)
class Request:
    prompt: list[int]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    slot: int = -1


class Scheduler:
    def __init__(self, model: KDAForCausalLM, slots: int):
        self.model, self.waiting, self.running, self.free = model.requires_grad_(False), [], [], list(range(slots))
        layers, kda, new = len(model.model.layers), model.model.layers[0].linear_attn, model.lm_head.weight.new_zeros
        state = (kda.num_value_heads, kda.head_dim, kda.value_head_dim)
        self.conv_pool = new(layers, slots, sum(kda.qkv_dims), kda.conv_kernel_size)
        self.state_pool = new(layers, slots, *state, dtype=torch.float32)
        self.inputs, self.indices = new(slots, 1, dtype=torch.long), new(slots, dtype=torch.int32).fill_(-1)
        self.decode()  # libraries choose their kernels; no row has a slot, so no state changes
        if model.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()  # it keeps addresses: the model's first generate() has to come before
            with torch.cuda.graph(graph):
                self.decode()
            self.decode = graph.replay

    def decode(self) -> None:
        self.outputs = self.forward(self.inputs, self.indices)

    def forward(self, tokens: torch.Tensor, slots: torch.Tensor, bounds: torch.Tensor | None = None) -> torch.Tensor:
        """The next tokens [N]: after one token each, [N, 1], or after sequences packed into [1, T] at `bounds`."""
        x = self.model.model.embed_tokens(tokens)
        for layer, conv, state in zip(self.model.model.layers, self.conv_pool, self.state_pool, strict=True):
            kda, y = layer.linear_attn, layer.input_layernorm(x)
            qkv, beta, weights = (kda.q_proj(y), kda.k_proj(y), kda.v_proj(y)), kda.b_proj(y), kda.step_parameters()
            g = kda.f_b_proj(kda.f_a_proj(y)).unflatten(-1, (kda.num_value_heads, -1))
            output_gate = kda.g_b_proj(kda.g_a_proj(y)).unflatten(-1, (kda.num_value_heads, -1))
            if bounds is None:
                q, k, v = (z.unflatten(-1, (heads, -1)) for z, heads in zip(qkv, kda.qkv_heads, strict=True))
                pools = {"conv_state": conv, "recurrent_state": state, "state_indices": slots}
                o = kda_decode_step(q, k, v, g, beta, output_gate, **pools, **weights)
            else:
                options = {"output_final_state": True, "cu_seqlens": bounds}
                weight = torch.cat([weights[f"{name}_conv_weight"] for name in "qkv"])
                mixed, conv[slots] = causal_conv1d(torch.cat(qkv, -1), weight, initial_state=conv[slots], **options)
                parts = zip(mixed.split(kda.qkv_dims, -1), kda.qkv_heads, strict=True)
                q, k, v = (z.unflatten(-1, (heads, -1)) for z, heads in parts)
                options |= IN_KERNEL | {name: weights[name] for name in GATE}
                o, state[slots] = chunk_kda(q, k, v, g, beta, initial_state=state[slots], **options)
                o = kda.o_norm(o, output_gate)
            x = x + kda.o_proj(o.flatten(-2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        x = x[:, 0] if bounds is None else x[0, bounds[1:] - 1]
        return self.model.lm_head(self.model.model.norm(x)).argmax(-1)

    def step(self) -> list[Request]:
        """A token more for each request, those that arrive included; returns those that ended."""
        decoding, arriving = list(self.running), []
        while self.waiting and self.free:
            arriving.append(self.waiting.pop(0))
            slot = arriving[-1].slot = self.free.pop(0)
            self.conv_pool[:, slot] = self.state_pool[:, slot] = 0  # or copies of the slot of a cached prefix
        self.running += arriving
        if decoding:
            empty = len(self.indices) - len(decoding)
            self.inputs.copy_(torch.tensor([r.tokens[-1:] for r in decoding] + [[0]] * empty))
            self.indices.copy_(torch.tensor([r.slot for r in decoding] + [-1] * empty))
            self.decode()
            self._append(decoding, self.outputs)
        if arriving:
            bounds = [0, *accumulate(len(r.prompt) for r in arriving)]
            arguments = ([sum((r.prompt for r in arriving), [])], [r.slot for r in arriving], bounds)
            self._append(arriving, self.forward(*(self.inputs.new_tensor(x) for x in arguments)))
        eos = self.model.config.eos_token_id
        ended = [r for r in self.running if len(r.tokens) == r.max_new_tokens or r.tokens[-1] == eos]
        self.running = [r for r in self.running if r not in ended]
        self.free += [r.slot for r in ended]
        return ended

    def _append(self, requests: list[Request], outputs: torch.Tensor) -> None:
        for request, token in zip(requests, outputs.tolist(), strict=False):  # empty rows have outputs, too
            request.tokens.append(token)


def main() -> None:
    layers = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 4}
    config = KDAConfig(hidden_size=256, intermediate_size=512, linear_num_heads=4, linear_head_dim=64, **layers)
    scheduler = Scheduler(KDAForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu"), slots=3)
    for step in range(60):
        if step < 30 and step % 3 == 0:  # a request arrives
            prompt = torch.randint(config.vocab_size, (5 + 40 * step,)).tolist()
            scheduler.waiting.append(Request(prompt, max_new_tokens=4 + step % 7))
        for request in scheduler.step():
            print(f"step {step}, slot {request.slot}: {request.tokens}")


if __name__ == "__main__":
    main()
