"""FLA's `KDAForCausalLM` on our model: `accelerate(model)` for models of `model_type: kda` that FLA has loaded.

Its modules are kernels of Triton throughout, so not layers are replaced but what runs: a [`KDAForCausalLM`] of ours
whose parameters are those of FLA's model, under the names that convert.py knows. FLA's modules keep them for saving,
training and loading, and compute nothing meanwhile.
"""

from typing import Any

import torch

from .. import decoding
from ..convert import config_from_fla, fla_name
from ..decode_graph import has_hooks
from ..modeling_kda import KDAForCausalLM
from .accelerated import AcceleratedModel, Acceleration, derived


def is_fla_model(model: Any) -> bool:
    """Whether `model` is FLA's language model, head included."""
    return (type(model).__module__, type(model).__name__) == ("fla.models.kda.modeling_kda", "KDAForCausalLM")


class AcceleratedFLAModel(AcceleratedModel):
    """FLA's model after [`accelerate`]: calls go to our model of the same parameters."""

    _inner: Any

    @property
    def inner(self) -> KDAForCausalLM:
        """Our model, with the parameters that FLA's has now, on their device and in its mode."""
        model: Any = self
        inner: Any = self._inner
        names = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in list(inner.named_parameters(remove_duplicate=False)):
            own = names[fla_name(name)]
            if parameter is not own:
                path, _, key = name.rpartition(".")
                inner.get_submodule(path)._parameters[key] = own
        device = model.lm_head.weight.device
        if inner.model.rotary_emb is not None and inner.model.rotary_emb.inv_freq.device != device:
            inner.model.rotary_emb = type(inner.model.rotary_emb)(inner.config).to(device)
        if inner.training != model.training:
            inner.train(model.training)
        inner.generation_config = model.generation_config
        return inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As [`KDAForCausalLM`]; a cache must be one of ours or of transformers', not FLA's."""
        for name in ("past_key_values", "cache"):
            if type(kwargs.get(name)).__module__.startswith("fla."):
                raise TypeError(f"`{name}` must be a KDACache, got FLA's {type(kwargs[name]).__name__}")
        return self.inner(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As [`KDAForCausalLM`]."""
        return self.inner.generate(*args, **kwargs)

    def undo(self) -> None:
        """FLA's modules compute again, with the parameters as they are now."""
        decoding.forget(vars(self).pop("_inner"))
        super().undo()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self._inner.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self._inner.gradient_checkpointing_disable()


def accelerate_fla(model: Any) -> Any:
    """`accelerate` for a model of which `is_fla_model` is true."""
    for name, module in model.named_modules():
        if has_hooks(module):
            raise ValueError(f"`model`: {name or 'the model'} has hooks, which would not be called")
    fields = {name: value for name, value in model.config.to_dict().items() if name != "linear_output_gate_bias"}
    config = config_from_fla(fields)
    with torch.device("meta"):
        inner = KDAForCausalLM(config)
    wanted = {fla_name(name): parameter.shape for name, parameter in inner.named_parameters(remove_duplicate=False)}
    found = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    if different := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise ValueError(
            f"`model`: {different[0]} is {_shape(found, different[0])} there, where the configuration has "
            f"{_shape(wanted, different[0])}: adapters and quantized layers can't be replaced"
        )
    acceleration = Acceleration()
    acceleration.change("", model, derived(type(model), AcceleratedFLAModel))
    for name, child in model.named_children():
        acceleration.idle[name] = type(child).__name__
    model._acceleration = acceleration
    model.__dict__["_inner"] = inner  # past `nn.Module`, so that it is no part of the model
    return model


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "nothing"


__all__ = ["AcceleratedFLAModel", "accelerate_fla", "is_fla_model"]
