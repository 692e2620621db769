"""The choice of the next tokens by their logits, by one kernel of the CUDA extension: the largest, or a draw."""

import torch

from . import cuda


MOST_TOKENS = 2**18  # of a vocabulary
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of logits as the kernel takes them


def refusal(logits: torch.Tensor) -> str | None:
    """Why no kernel chooses tokens by `logits` `[B, vocab_size]`, or None."""
    if not cuda.is_wanted():
        return "the environment asks for another backend"
    if logits.shape[-1] > MOST_TOKENS:
        return f"the vocabulary has more than {MOST_TOKENS} tokens"
    return cuda.refusal_of_device(logits.device)


def choose_tokens(
    logits: torch.Tensor,
    do_sample: bool,
    pad: torch.Tensor | None,
    eos: torch.Tensor | None,
    unfinished: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> torch.Tensor:
    """
    What transformers' processors of these names and `torch.multinomial` choose, with the random numbers that it draws,
    or the largest.

    Args:
        logits: `[B, vocab_size]`, for which there is no `refusal`.
        pad: one int64, what rows get that have finished; None where rows never finish.
        eos: int64 `[E]`, the tokens that finish a row, or None.
        unfinished: bool `[B]`, in which rows are marked that finish with their token.

    Returns:
        int64 `[B]`.
    """
    if logits.dtype not in DTYPES or logits.stride(-1) != 1:
        logits = logits.float().contiguous()
    noise = logits.new_empty(logits.shape, dtype=torch.float32).exponential_() if do_sample else None
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    torch.ops.kda_hf_cuda.choose_tokens(logits, noise, temperature, top_k, top_p, min_p, pad, eos, unfinished, tokens)
    return tokens
