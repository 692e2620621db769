"""What `generate()` needs beyond transformers."""

from transformers import DynamicCache, StaticCache

from .cache import KDADynamicCache, KDAStaticCache


class KDAGenerationMixin:
    """Gives `generate()` a [`KDACache`] wherever it would make one of transformers' own."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get("past_key_values")
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
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
            model_kwargs["past_key_values"] = cache
        return result
