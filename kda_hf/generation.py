"""What `generate()` needs beyond transformers, and the two names that transformers has for the cache."""

import functools
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast

from . import decode_loop
from .cache import KDADynamicCache, KDAStaticCache
from .decoding import DecodeProgram, decode_program


# How this version of transformers names the cache, as an argument and in outputs: "cache" from 5.24 on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def _rename_cache(kwargs: dict[str, Any], new_name: str) -> dict[str, Any]:
    """`kwargs` with the cache, if there is one under either name, under `new_name`."""
    renamed = dict(kwargs)
    caches = [renamed.pop(name) for name in ("past_key_values", "cache") if name in kwargs]
    given = [cache for cache in caches if cache is not None]
    if len(given) > 1:
        raise ValueError("`past_key_values` and `cache` are two names of the same argument: give one of them")
    return renamed | ({new_name: given[0]} if given else {})


def takes_cache(forward):
    """Lets a method with an argument `past_key_values` take it as `cache` too, on any version of transformers."""

    @functools.wraps(forward)
    def renamed(self, *args, **kwargs):
        if "cache" in kwargs:
            kwargs = _rename_cache(kwargs, "past_key_values")
        return forward(self, *args, **kwargs)

    return renamed


class KDAGenerationMixin(GenerationMixin):
    """Gives `generate()` a [`KDACache`] wherever it would make one of transformers' own."""

    decode_program_class: Any = DecodeProgram

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        with decode_program(self):
            return super().generate(*args, **_rename_cache(kwargs, CACHE_NAME))

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        """Not with offloading: keys and values change their address."""
        return not getattr(model_kwargs.get(CACHE_NAME), "offloading", False) and super()._valid_auto_compile_criteria(
            model_kwargs, generation_config
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get(CACHE_NAME)
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE_NAME)
        if given is None and isinstance(made, (DynamicCache, StaticCache)):
            # Nothing rolls this cache back unless decoding is assisted, which calls `activate_past_recording`. A static
            # cache of transformers that has KDA layers alone knows no length.
            is_static = isinstance(made, StaticCache)
            cache = (KDAStaticCache if is_static else KDADynamicCache)(
                self.config,
                max_cache_len=self._previous_max_cache_length if is_static else None,
                offloading=made.offloading,
                max_rollback=0,
            )
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs[CACHE_NAME] = cache
        return result

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """Greedy and sampled decoding, by our own loop where a program serves the call, with the same results."""
        program = None
        if not synced_gpus:
            program = decode_loop.serving_program(self, CACHE_NAME, input_ids, generation_config, model_kwargs)
        if program is None:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        cache = model_kwargs[CACHE_NAME]
        keeps_cache = decode_loop.is_kept(cache, generation_config)
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        del outputs  # logits of the whole prompt, if the caller asks for them
        sequences, scores, raw_logits = decode_loop.decode(
            logits,
            functools.partial(decode_loop.make_stepper, self, program, cache, keeps_cache, model_kwargs),
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            run_ahead=decode_loop.may_run_ahead(input_ids.device, keeps_cache),
        )
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=raw_logits, **{CACHE_NAME: cache})

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """Feeds the part of the prompt that the cache has not seen, `prefill_chunk_size` tokens at a time.

        transformers' own method feeds tokens twice that a passed cache holds: 5.17 if it feeds in chunks, 5.24 if no
        layer has attention, and both if chunks are embeddings.
        """
        cache, chunk_size = model_kwargs.get(CACHE_NAME), generation_config.prefill_chunk_size
        if cache is None and chunk_size is not None:
            raise ValueError(f"`prefill_chunk_size` needs a cache, but `use_cache` is {generation_config.use_cache}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"`prefill_chunk_size` must be at least 1, got {chunk_size}")
        seen = 0 if cache is None else int(cache.get_seq_length())
        embeds = model_kwargs.get("inputs_embeds") if is_first_iteration else None
        prompt = input_ids if embeds is None else embeds
        mask = model_kwargs.get("attention_mask")
        # A mask of ones is dropped by then, except for its length.
        covered = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        if embeds is not None or covered == prompt.shape[1]:  # else the caller gave the new tokens alone
            if seen >= prompt.shape[1]:
                raise ValueError(
                    f"The prompt has {prompt.shape[1]} tokens, but the cache has seen {seen} already. Give the whole "
                    "sequence, or new tokens and an `attention_mask` that covers the cached ones too."
                )
            prompt = prompt[:, seen:]

        outputs, still_to_come = None, prompt.shape[1]
        for chunk in prompt.split(chunk_size or prompt.shape[1], dim=1):
            still_to_come -= chunk.shape[1]
            chunk_kwargs = dict(model_kwargs)
            for name in ("attention_mask", "position_ids"):
                if (columns := model_kwargs.get(name)) is not None:
                    chunk_kwargs[name] = columns[..., : columns.shape[-1] - still_to_come]
            if embeds is not None:
                chunk_kwargs["inputs_embeds"] = chunk
            inputs = self.prepare_inputs_for_generation(
                chunk if embeds is None else input_ids, is_first_iteration=is_first_iteration, **chunk_kwargs
            )
            outputs = self(**inputs, return_dict=True)
        return outputs
