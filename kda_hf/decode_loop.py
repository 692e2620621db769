"""Greedy and sampled decoding, token by token: what transformers' loop does, in a fraction of its time on the host.

That loop prepares the inputs of a whole forward for each token, grows the sequence, asks every stopping criterion and
waits for the device, which can take longer than a GPU needs for a step of a model of 1.3 billion parameters. This one
feeds tokens to a [`Stepper`] and does what the call asks for. The results are the same: tokens, scores, random numbers,
and what processors, criteria, streamers and the cache see.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .cache import KDACache
from .decode_graph import Program, graph_stepper
from .decoding import current_program
from .ops import sampling


# Arguments of a forward, beside the cache, that a step knows what to do with. A tokenizer, as calls with stop strings
# have one, gets as far as the layers, which do nothing with it.
_KNOWN = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "inputs_embeds", "tokenizer"}


class Stepper(Protocol):
    """Takes a model and its cache through one token a row after the other."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds `tokens` `[B]`; returns logits `[B, vocab_size]`, which the next step may overwrite."""

    def finish(self) -> None:
        """After the last step: leaves states and counts in the cache."""


class EagerStepper:
    """Steps of a program, or of the model's modules where there is none or it declines.

    Args:
        kwargs: what the prefill was called with. Mask and positions grow from there.
    """

    def __init__(self, model: Any, program: Program | None, cache: KDACache, kwargs: dict[str, Any]):
        self.model, self.program, self.cache, self.kwargs = model, program, cache, dict(kwargs)
        positions = kwargs.get("position_ids")
        self.positions = None if positions is None else positions[..., -1:]
        self.mask = kwargs.get("attention_mask")

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.positions is not None:
            self.positions = self.positions + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        ids, logits = tokens[:, None], None
        if self.program is not None:
            logits = self.program(ids, self.mask, self.positions, self.cache)
        if logits is None:
            self.kwargs.update(attention_mask=self.mask, position_ids=self.positions)
            inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **self.kwargs)
            logits = self.model(**inputs, return_dict=True).logits
        return logits[:, -1]

    def finish(self) -> None:
        pass


def make_stepper(
    model: Any,
    program: Program,
    cache: KDACache,
    keeps_cache: bool,
    kwargs: dict[str, Any],
    tokens: torch.Tensor,
    max_steps: int | None,
) -> Stepper:
    """The stepper for what follows a prefill.

    Args:
        keeps_cache: whether somebody will look at the cache after the last step.
        kwargs: what the prefill was called with.
        tokens: `[B]`, what the first step will be given.
        max_steps: how many steps there will be at most, if that is known.
    """
    if not program.takes(tokens[:, None], cache):
        return EagerStepper(model, None, cache, kwargs)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    graph = graph_stepper(program, cache, keeps_cache, mask, positions, max_steps)
    return graph or EagerStepper(model, program, cache, kwargs)


class Choice:
    """What chooses tokens from logits: processors of scores, argmax or a draw, padding for rows that have finished.

    Args:
        processors: called with the sequences and the scores, one after the other.
        pad: `[]`, what finished rows get; None where rows never finish.
        eos: `[E]`, the tokens that finish a row, or None.
    """

    def __init__(
        self,
        processors: list[Callable[..., torch.Tensor]],
        do_sample: bool,
        pad: torch.Tensor | None,
        eos: torch.Tensor | None,
    ):
        self.processors, self.do_sample, self.pad, self.eos = processors, do_sample, pad, eos

    def scores(self, input_ids: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
        """fp32 logits `[B, vocab_size]`, processed."""
        for process in self.processors:
            logits = process(input_ids, logits)
        return logits

    def tokens(self, scores: torch.Tensor, unfinished: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[B]`, and the rows `[B]` that have not finished with them."""
        if self.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self.pad is not None:
            tokens = torch.where(unfinished, tokens, self.pad)
        if self.eos is not None:
            # By comparison: `torch.isin` may wait for the device.
            unfinished = unfinished & (tokens[:, None] != self.eos).all(1)
        return tokens, unfinished


# What the kernel does, in the order in which `generate()` has them: behind all others but a few.
_IN_KERNEL = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


class KernelChoice:
    """
    A choice by one kernel, and one more for the random numbers, which are those that `torch.multinomial` draws.

    Args:
        before: the processors that are called before it, as ever.
        filters: those in the kernel.
    """

    def __init__(self, choice: Choice, before: list[Any], filters: list[Any]):
        self.before, self.do_sample = before, choice.do_sample
        self.pad, self.eos = (None if x is None else x.long() for x in (choice.pad, choice.eos))
        given = {name: value for process in filters for name, value in vars(process).items()}
        usual = {"temperature": 1.0, "top_k": sampling.MOST_TOKENS, "top_p": 1.0, "min_p": 0.0}
        self.parameters: dict[str, Any] = {name: given.get(name, value) for name, value in usual.items()}

    @classmethod
    def of(cls, choice: Choice, logits: torch.Tensor) -> "KernelChoice | None":
        """None where no kernel makes this choice."""
        kinds = [type(process) for process in choice.processors]
        first = next((i for i, kind in enumerate(kinds) if kind in _IN_KERNEL), len(kinds))
        before, filters = choice.processors[:first], choice.processors[first:]
        if kinds[first:] != [kind for kind in _IN_KERNEL if kind in kinds] or (filters and not choice.do_sample):
            return None
        usual = {"filter_value": -math.inf, "min_tokens_to_keep": 1}
        if any(value != usual.get(name, value) for process in filters for name, value in vars(process).items()):
            return None
        return cls(choice, before, filters) if sampling.refusal(logits) is None else None

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor, unfinished: torch.Tensor) -> torch.Tensor:
        """Tokens `[B]`. Rows that finish with them are marked in `unfinished` `[B]`.

        Args:
            input_ids: for the processors before. These get `logits` to write to, in fp32.
        """
        for process in self.before:
            logits = process(input_ids, logits)
        return sampling.choose_tokens(logits, self.do_sample, self.pad, self.eos, unfinished, **self.parameters)


def serving_program(
    model: Any, cache_name: str, input_ids: torch.Tensor, generation_config: Any, kwargs: dict[str, Any]
) -> Program | None:
    """The program of `model`, if `decode` may serve this call of `_sample`. Decided before the prefill.

    Args:
        cache_name: under which `kwargs`, the arguments of forwards, have the cache.
    """
    program, cache = current_program(model), kwargs.get(cache_name)
    if program is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not isinstance(cache, KDACache) or cache.offloading or not kwargs.get("use_cache"):
        return None
    if not kwargs.keys() <= {*_KNOWN, cache_name} or not isinstance(kwargs.get("logits_to_keep", 1), int):
        return None
    config = generation_config
    if config.is_assistant or config.output_attentions or config.output_hidden_states:
        return None
    if input_ids.device != program.embedding.device:
        return None
    # With a compiled forward, what was compiled is what shall run.
    if model._compiled_call_impl is not None or model._valid_auto_compile_criteria(kwargs, config):
        return None
    return program


def is_kept(cache: KDACache, generation_config: Any) -> bool:
    """Whether somebody may look at `cache` after this call."""
    return bool(generation_config.return_dict_in_generate) or getattr(cache, "_is_user_defined", False)


def may_run_ahead(device: torch.device, keeps_cache: bool) -> bool:
    """Whether a step may be under way before it is known that there is one, so that the device does not wait.

    It leaves one token too many in the cache, so nobody may see that.
    """
    return device.type == "cuda" and not keeps_cache


def decode(
    logits: torch.Tensor,
    start: Callable[[torch.Tensor, int | None], Stepper],
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    streamer: Any = None,
    run_ahead: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
    """
    Chooses tokens and feeds them to the model until a criterion says stop; the last one is not fed.

    Args:
        logits: `[B, vocab_size]`, what the prefill ended with.
        start: makes the stepper out of the first tokens and the number of steps that there can be.
        run_ahead: whether the next step starts before the host knows whether all rows have finished. Nothing else is
            ahead: processors, criteria, random numbers and streamers are asked for nothing that is dropped.

    Returns:
        The sequences; the processed scores and the raw logits of each token, where `generation_config` asks for them.
    """
    device, prompt_length = input_ids.device, input_ids.shape[1]
    processors = _members(logits_processor)
    criteria = list(stopping_criteria) if type(stopping_criteria) is StoppingCriteriaList else [stopping_criteria]
    lengths = [criterion for criterion in criteria if type(criterion) is MaxLengthCriteria]
    ends = [criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria]
    others = [criterion for criterion in criteria if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria)]
    max_length = min((criterion.max_length for criterion in lengths), default=math.inf)
    eos = torch.cat([end.reshape(-1).to(device) for end in ends]) if ends else None
    pad = None
    if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
        pad = generation_config._pad_token_tensor.to(device)

    do_sample, returns = generation_config.do_sample, generation_config.return_dict_in_generate
    all_scores: tuple[torch.Tensor, ...] | None = () if returns and generation_config.output_scores else None
    all_logits: tuple[torch.Tensor, ...] | None = () if returns and generation_config.output_logits else None
    choice = Choice(processors, do_sample, pad, eos)
    in_kernel = KernelChoice.of(choice, logits) if all_scores is None else None
    called = processors if in_kernel is None else in_kernel.before
    # Whoever gets logits may keep them or write to them.
    copies = bool(called) or all_scores is not None or all_logits is not None
    grows, reads = bool(called or others), bool(ends or others)
    copied = torch.cuda.Event() if device.type == "cuda" and (reads or streamer is not None) else None
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=device)
    none_done = ~unfinished

    chosen: list[torch.Tensor] = []
    length = prompt_length
    stepper: Any = None
    try:
        while True:
            if copies or in_kernel is None:
                logits = logits.to(torch.float32, copy=copies)
            if all_logits is not None:
                all_logits += (logits,)
            if in_kernel is not None:
                tokens = in_kernel(input_ids, logits, unfinished)
            else:
                scores = choice.scores(input_ids, logits)
                if all_scores is not None:
                    all_scores += (scores,)
                tokens, unfinished = choice.tokens(scores, unfinished)
                del scores

            length += 1
            if grows:
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            else:
                chosen.append(tokens)
            for criterion in lengths:
                _warn_of_length(criterion, prompt_length, length)
            if others:
                done = none_done
                for criterion in others:
                    done = done | criterion(input_ids, all_scores)
                unfinished = (unfinished & ~done).bool()

            # What the host has to know is on its way while the next step starts, if that may run ahead.
            is_last = length >= max_length
            if streamer is not None:
                streamed = tokens.to("cpu", non_blocking=copied is not None)
            if reads:
                goes_on = unfinished.to("cpu", non_blocking=copied is not None)
            if copied is not None:
                copied.record(torch.cuda.current_stream(device))
            del logits  # not kept through the step, where nobody asked for them
            if stepper is None and not is_last:
                stepper = start(tokens, None if math.isinf(max_length) else int(max_length) - length)
            if run_ahead and not is_last:
                logits = stepper.step(tokens)
            if copied is not None:
                copied.synchronize()
            if streamer is not None:
                streamer.put(streamed)
            if is_last or (reads and not goes_on.any()):
                break
            if not run_ahead:
                logits = stepper.step(tokens)
    finally:
        if stepper is not None:
            stepper.finish()

    if streamer is not None:
        streamer.end()
    if chosen:
        input_ids = torch.cat([input_ids, torch.stack(chosen, dim=1)], dim=-1)
    return input_ids, all_scores, all_logits


def _members(processors: LogitsProcessorList) -> list[Callable[..., torch.Tensor]]:
    """What to call one after the other: the list looks at the signature of each processor for each token."""
    is_plain = type(processors) is LogitsProcessorList and all(
        len(inspect.signature(process.__call__).parameters) <= 2 for process in processors
    )
    return list(processors) if is_plain else [processors]


def _warn_of_length(criterion: MaxLengthCriteria, prompt_length: int, length: int) -> None:
    """Lets `criterion` warn, as soon as there is reason to, of more tokens than the model was made for."""
    limit = criterion.max_position_embeddings
    if limit is not None and length == max(limit, prompt_length) + 1:
        # It looks at the shape alone.
        criterion(torch.empty(1, 1, dtype=torch.long, device="cpu").expand(1, length), None)
