"""One call of the prefill kernels for each instance and each kind of sequence, small: scripts/sanitize.sh runs it.

An argument names compute-sanitizer's tool, since racecheck can't follow one of the calls."""

import itertools
import sys

import torch

from kda_hf import ops


DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = ((128, 128), (64, 64), (128, 64), (64, 128))
GATES = ("given", "safe", "softplus", "steep softplus")
LENGTHS = (None, [1, 0, 65, 64, 17])  # dense and packed


def run(
    dtype: torch.dtype, K: int, V: int, gate: str, lengths: list[int] | None, state_v_first: bool, HV: int = 2
) -> None:
    B, T, H = (2, 130, 1) if lengths is None else (1, sum(lengths) + 3, 1)
    N = B if lengths is None else len(lengths)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype).cuda()  # made on the CPU: no other kernel writes it

    g = tensor(B, T, HV, K)
    inputs = {"q": tensor(B, T, H, K), "k": tensor(B, T, H, K), "v": tensor(B, T, HV, V), "beta": tensor(B, T, HV)}
    if gate == "given":
        inputs["g"] = -g.cpu().float().abs().cuda()
    else:
        spread = 30.0 if gate == "steep softplus" else 1.0  # beyond the range of the factored form
        shift = {"mild": -6.5, "steep": 3.0}.get(gate, 0.0)
        inputs |= {"g": (g.cpu() * spread).cuda(), "A_log": tensor(HV, dtype=torch.float32)}
        inputs |= {"dt_bias": (tensor(HV, K, dtype=torch.float32).cpu() + shift).cuda()}
        inputs |= {"lower_bound": -5.0 if gate in ("safe", "mild", "steep") else None}
    state = (V, K) if state_v_first else (K, V)
    state_dtype = torch.bfloat16 if state_v_first else torch.float32
    results = ops.chunk_kda(
        **inputs,
        initial_state=tensor(N, HV, *state, dtype=state_dtype),
        output_final_state=True,
        use_gate_in_kernel=gate != "given",
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        state_v_first=state_v_first,
        return_intermediate_states=state_v_first,
        cu_seqlens=None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)]).cuda(),
        backend="cuda",
    )
    # Reading every output tells initcheck whether all of it was written.
    assert all(x.cpu().isfinite().all() for x in results[:2])


def main() -> None:
    torch.manual_seed(0)
    for dtype, (K, V), gate, lengths in itertools.product(DTYPES, WIDTHS, GATES, LENGTHS):
        run(dtype, K, V, gate, lengths, state_v_first=dtype == torch.float16)
    for (K, V), v_first in zip(WIDTHS, (False, True, True, False), strict=True):  # states are composed
        run(torch.bfloat16, K, V, "mild", [3100, 70], state_v_first=v_first)
    run(torch.bfloat16, 128, 128, "steep", [1500, 70], state_v_first=True)  # segments that begin with zeros
    if sys.argv[1:] != ["racecheck"]:  # which does not see what the CTAs of a cluster tell each other's barriers
        run(torch.bfloat16, 128, 128, "mild", [4800], state_v_first=False, HV=20)  # composed, by clusters
    run(torch.bfloat16, 128, 128, "safe", [2048], state_v_first=False, HV=96)  # both kernels side by side
    torch.cuda.synchronize()
    print("every call served")


if __name__ == "__main__":
    main()
