"""Kimi Delta Attention in chunks of 64 tokens, in plain PyTorch: fast on a CPU, and differentiable.

With `G_i` the log-decay summed from the start of the chunk through token i, per key channel, a chunk is

    A_ij = β_i Σ_d k_id k_jd e^(G_id - G_jd)  (j < i)        P_ij = Σ_d q_id k_jd e^(G_id - G_jd)  (j ≤ i)
    U = (I + A)⁻¹ diag(β) V        W = (I + A)⁻¹ diag(β) (K ∘ e^G)
    Ũ = U - W S        O = (Q ∘ e^G) S + P Ũ        S ← Diag(e^(G_C)) S + (K ∘ e^(G_C - G))ᵀ Ũ

(arXiv 2510.26692, section 3). Only Ũ and S depend on the chunk before; all else is parallel over the sequence.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .reference import INTERMEDIATE_STRIDE as CHUNK_SIZE


def chunks_of(tokens: int) -> int:
    return -(-tokens // CHUNK_SIZE)


def max_chunks(tokens: int, sequences: int) -> int:
    """The most chunks that `sequences` packed sequences of `tokens` tokens in all can need."""
    return torch.sym_min(tokens, (tokens + (CHUNK_SIZE - 1) * sequences) // CHUNK_SIZE)


class ChunkMap(NamedTuple):
    """Where the chunks of packed sequences lie: built on the device, its shape independent of `cu_seqlens` values."""

    token: torch.Tensor  # [NT * C] index of the token, T where the slot is empty
    sequence: torch.Tensor  # [NT] sequence that the chunk belongs to
    is_first: torch.Tensor  # [NT] whether the chunk opens its sequence
    last: torch.Tensor  # [N] index of the sequence's last chunk
    is_empty: torch.Tensor  # [N] whether the sequence has no token


def chunk_map(cu_seqlens: torch.Tensor, tokens: int) -> ChunkMap:
    cu_seqlens = cu_seqlens.long()
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    lengths = (ends - starts).clamp(min=0)
    chunk_ends = ((lengths + CHUNK_SIZE - 1) // CHUNK_SIZE).cumsum(0)
    chunk_starts = chunk_ends - (lengths + CHUNK_SIZE - 1) // CHUNK_SIZE

    chunk = torch.arange(max_chunks(tokens, len(starts)), device=cu_seqlens.device)
    sequence = torch.searchsorted(chunk_ends, chunk, right=True).clamp(max=len(starts) - 1)
    offset = torch.arange(CHUNK_SIZE, device=cu_seqlens.device)
    token = (starts[sequence] + (chunk - chunk_starts[sequence]) * CHUNK_SIZE).unsqueeze(-1) + offset
    is_token = (token < ends[sequence].unsqueeze(-1)) & (token >= 0) & (token < tokens)
    return ChunkMap(
        token=torch.where(is_token, token, tokens).flatten(),
        sequence=sequence,
        is_first=chunk == chunk_starts[sequence],
        last=(chunk_ends - 1).clamp(min=0, max=max(len(chunk) - 1, 0)),
        is_empty=lengths == 0,
    )


def _block_lower(top: torch.Tensor, cross: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    """[[top, 0], [cross, bottom]]"""
    size = top.shape[-1]
    return torch.cat((F.pad(top, (0, size)), torch.cat((cross, bottom), -1)), -2)


def _prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """All that a chunk needs besides the state, from q, k, g [M,C,K], v [M,C,V], beta [M,C,1]; C a power of two.

    Returns all that reads the state, -W above Q ∘ e^G [M, 2 C, K], and U, P, K ∘ e^(G_C - G) and e^(G_C).

    Blocks of 1, 2, 4, ... tokens are merged in pairs. Between the two blocks of a pair every decay is a product of two
    factors that meet at the boundary: from the boundary to the later token, and from the earlier token to the boundary.
    Both are products of decays and so at most 1: nothing overflows, no quotient or difference of sums is formed, and
    what underflows is a zero to fp32's range. That holds for every gate, however steep, in the backward pass too. The
    cross block of A extends the inverse of I + A by block substitution.
    """
    decay = g.exp()  # [M, blocks, K] over the whole block
    beta_k = beta * k
    # [M, blocks, 2, block, K]: q and -βk decayed from the start of the block. [M, blocks, block, K]: k, to its end.
    rows = (torch.stack((q, -beta_k), 2) * decay.unsqueeze(2)).unsqueeze(3)
    columns = k.unsqueeze(2)
    scores = (q * k).sum(-1)[..., None, None]  # [M, blocks, block, block], as is the inverse
    inverse = torch.ones_like(scores)
    while decay.shape[1] > 1:
        size = columns.shape[2]
        earlier, later = slice(0, None, 2), slice(1, None, 2)
        cross = rows[:, later].flatten(2, 3) @ columns[:, earlier].mT
        cross_scores, minus_A = cross[:, :, :size], cross[:, :, size:]
        cross_inverse = inverse[:, later] @ minus_A @ inverse[:, earlier]
        scores = _block_lower(scores[:, earlier], cross_scores, scores[:, later])
        inverse = _block_lower(inverse[:, earlier], cross_inverse, inverse[:, later])
        rows = torch.cat((rows[:, earlier], rows[:, later] * decay[:, earlier, None, None]), 3)
        columns = torch.cat((columns[:, earlier] * decay[:, later, None], columns[:, later]), 2)
        decay = decay[:, earlier] * decay[:, later]
    q_decayed, minus_beta_k = rows[:, 0].unbind(1)
    inverse = inverse[:, 0]
    readers = torch.cat((inverse @ minus_beta_k, q_decayed), 1)
    return readers, inverse @ (beta * v), scores[:, 0], columns[:, 0], decay[:, 0]


def _states_before(
    state: torch.Tensor,
    opening: torch.Tensor | None,
    packed: ChunkMap | None,
    minus_W: torch.Tensor,
    U: torch.Tensor,
    k_decayed: torch.Tensor,
    decay: torch.Tensor,
) -> torch.Tensor:
    """The states before all chunks [NT, ...], from the one before the first; packed sequences open with their own.

    A chunk makes S into M S + N with M = Diag(e^(G_C)) - (K ∘ e^(G_C - G))ᵀ W and N = (K ∘ e^(G_C - G))ᵀ U. All of them
    are made at once, so that the serial part is one call a chunk. The calls are short, and on a busy CPU the threads
    wait for each other at the end of each.
    """
    width = len(state)
    num_steps = len(decay) // width - 1  # the last chunk hands its state on to nobody
    used = slice(num_steps * width)
    M = torch.baddbmm(torch.diag_embed(decay[used, :, 0]), k_decayed[used], minus_W[used])
    N = (k_decayed[used] @ U[used]).view(num_steps, *state.shape)
    tracks_gradient = N.requires_grad or state.requires_grad
    states = [state]
    for i, (step, gain) in enumerate(zip(M.view(num_steps, width, *M.shape[1:]), N, strict=True), start=1):
        # Without a gradient to compute, a state may take the place of its N.
        state = torch.baddbmm(gain, step, state) if tracks_gradient else gain.baddbmm_(step, state)
        if packed is not None and opening is not None:
            state = torch.where(packed.is_first[i], opening[i], state)
        states.append(state)
    before = torch.stack(states) if tracks_gradient else torch.cat((states[0].unsqueeze(0), N))
    if packed is not None and opening is not None:
        before = torch.where(packed.is_first[:, None, None, None], opening, before)
    return before


def chunked_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    output_states: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Chunked form of activated inputs: scaled q, k, log-decay g [B,T,HV,K], v [B,T,HV,V], beta [B,T,HV], one dtype.

    Returns o [B,T,HV,V], the final states [N,HV,K,V], and with `output_states` those at the chunks' starts
    [B,NT,HV,K,V]. Nothing is read on the host, so that packed sequences are processed in as many chunks as they could
    need at most.
    """
    (batch, tokens, heads, K), V = k.shape, v.shape[-1]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        initial_state = k.new_zeros(sequences, heads, K, V)
    if batch * tokens * sequences * heads == 0:
        states = k.new_zeros(batch, chunks_of(tokens), heads, K, V) if output_states else None
        return torch.zeros_like(v), initial_state.clone(), states

    packed = None if cu_seqlens is None else chunk_map(cu_seqlens, tokens)
    if packed is None:
        # A short block needs no chunk of 64: the next power of two will do.
        size = min(CHUNK_SIZE, 1 << (tokens - 1).bit_length())
        chunks = -(-tokens // size)
    else:
        size, chunks = CHUNK_SIZE, len(packed.sequence)

    def to_chunks(x: torch.Tensor) -> torch.Tensor:
        """[B,T,HV,D] → [NT * B * HV, C, D], zeros where there is no token: zero β and log-decay leave a state alone."""
        if packed is None:
            x = F.pad(x, (0, 0, 0, 0, 0, chunks * size - tokens)) if tokens < chunks * size else x
            x = x.unflatten(1, (chunks, size)).permute(1, 0, 3, 2, 4)
        else:
            x = F.pad(x[0], (0, 0, 0, 0, 0, 1)).index_select(0, packed.token)
            x = x.unflatten(0, (chunks, size)).transpose(1, 2)
        return x.reshape(-1, size, x.shape[-1])

    prepared = _prepare(*(to_chunks(x) for x in (q, k, v, g, beta.unsqueeze(-1))))
    readers, U, scores, k_decayed, decay = prepared
    k_decayed, decay = k_decayed.mT, decay.unsqueeze(-1)

    opening = None if packed is None else initial_state.index_select(0, packed.sequence)
    state = initial_state.flatten(0, 1) if opening is None else opening[0]
    before = _states_before(state, opening, packed, readers[:, :size], U, k_decayed, decay)
    from_W, from_q = (readers @ before.flatten(0, 1)).chunk(2, 1)
    corrections = U + from_W
    o = torch.baddbmm(from_q, scores, corrections)

    def last(x: torch.Tensor) -> torch.Tensor:
        """The last chunk of every sequence."""
        x = x.unflatten(0, (chunks, -1))
        return x[-1:] if packed is None else x.index_select(0, packed.last)

    final = torch.addcmul(last(k_decayed) @ last(corrections), last(before.flatten(0, 1)), last(decay))
    final = final.reshape(sequences, heads, K, V)
    states = before.unflatten(1, (-1, heads)).transpose(0, 1) if output_states else None
    if packed is None:
        o = o.view(chunks, batch, heads, size, V).permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, V)[:, :tokens]
        return o, final, states

    o = o.view(chunks, heads, size, V).transpose(1, 2).reshape(-1, heads, V)
    o = o.new_zeros(tokens + 1, heads, V).index_copy(0, packed.token, o)[:tokens].unsqueeze(0)
    return o, torch.where(packed.is_empty[:, None, None, None], initial_state, final), states
