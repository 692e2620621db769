"""Checkpoints of flash-linear-attention (FLA), of `model_type: kda`, to ours and back, without a loss.

Both have the same tensors under other names; FLA's layer always has the bias of the output gate, and its attention
layers always have RoPE. Every tensor keeps its values bit for bit and its dtype. What the other side can't hold is
refused with the name of the configuration's field or of the tensor, before anything is written.
"""

import copy
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .configuration_kda import KDAConfig
from .files import appearing, check_target, checkpoint_directory, copy_beside_the_model
from .modeling_kda import KDAForCausalLM


FLA_MODEL_TYPE = "kda"
_FORMATS = {FLA_MODEL_TYPE: "fla", KDAConfig.model_type: "kda_hf"}

# What a field of FLA's configuration is where config.json doesn't have it.
_FLA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "num_hidden_layers": 24,
    "num_heads": 16,
    "num_v_heads": None,
    "head_dim": 128,
    "expand_v": 1.0,
    "use_short_conv": True,
    "conv_size": 4,
    "safe_gate": False,
    "lower_bound": None,
    "allow_neg_eigval": False,
    "attn": None,
    "norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "use_cache": True,
    "use_l2warp": False,
    "attnres_block_size": None,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_FLA_ATTENTION_DEFAULTS = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}
_FLA_KERNEL_CHOICES = {"attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy"}  # the same model either way
_SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "allow_neg_eigval",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
_OTHER_NAMES = {  # ours: FLA's
    "linear_num_heads": "num_heads",
    "linear_head_dim": "head_dim",
    "linear_conv_kernel_dim": "conv_size",
    "linear_lower_bound": "lower_bound",
    "rms_norm_eps": "norm_eps",
}
# What any configuration of transformers may have. Fields that start with an underscore say nothing of the model.
_GENERAL = set(PreTrainedConfig().to_dict()) | {"torch_dtype"}
_WRITTEN_ANEW = {"architectures", "model_type", "transformers_version", "auto_map"}

_TENSOR_NAMES = {  # ours: FLA's, as parts of a name
    "model.embed_tokens.": "model.embeddings.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
    ".linear_attn.": ".attn.",
    ".self_attn.": ".attn.",
    ".f_a_proj.": ".f_proj.0.",
    ".f_b_proj.": ".f_proj.1.",
    ".g_a_proj.": ".g_proj.0.",
    ".g_b_proj.": ".g_proj.1.",
}
_GATE_BIAS = ".g_b_proj.bias"


def config_from_fla(fields: dict[str, Any]) -> KDAConfig:
    """
    Our configuration of the model that FLA's describes.

    Args:
        fields (`dict`): config.json of an FLA checkpoint. What it leaves out has FLA's default.

    Raises:
        ValueError: our model can't be what a field asks for, or the field is unknown. The message names it.
    """
    known = _FLA_DEFAULTS.keys() | _FLA_KERNEL_CHOICES | {"linear_output_gate_bias"}
    general = _general_fields(fields, known)
    fla = _FLA_DEFAULTS | fields
    _refuse_unless(fla["use_short_conv"] is True, fla, "use_short_conv", "our layers always have the convolution")
    _refuse_unless(fla["hidden_act"] in ("swish", "silu"), fla, "hidden_act", "it must be 'swish'")
    _refuse_unless(not fla["use_l2warp"], fla, "use_l2warp", "our loss has no such term")
    _refuse_unless(fla["attnres_block_size"] is None, fla, "attnres_block_size", "our residuals are plain sums")
    _refuse_unless(not fla["safe_gate"] or fla["lower_bound"] is not None, fla, "lower_bound", "`safe_gate` needs one")
    bound = fla["lower_bound"]
    _refuse_unless(bound is None or -5 <= bound <= 0, fla, "lower_bound", "it must be in [-5, 0]")
    _refuse_unless(fla["num_heads"] > 0, fla, "num_heads", "it must be at least 1")
    value_heads = fla["num_heads"] if fla["num_v_heads"] is None else fla["num_v_heads"]
    _refuse_unless(value_heads % fla["num_heads"] == 0, fla, "num_v_heads", "it must be a multiple of `num_heads`")
    value_head_dim = int(fla["head_dim"] * fla["expand_v"])
    is_whole = math.isclose(fla["head_dim"] * fla["expand_v"], value_head_dim, rel_tol=1e-5)
    _refuse_unless(is_whole, fla, "expand_v", f"times `head_dim` ({fla['head_dim']}) it must be a whole number")
    intermediate_size = fla["intermediate_size"]
    if intermediate_size is None:  # two thirds of `hidden_ratio` times the width, in multiples of 256
        ratio = 4 if fla["hidden_ratio"] is None else fla["hidden_ratio"]
        intermediate_size = 256 * math.ceil(int(fla["hidden_size"] * ratio * 2 / 3) / 256)

    ours = general | {"architectures": [KDAForCausalLM.__name__]} | {name: fla[name] for name in _SAME_NAMES}
    ours |= {name: fla[of_fla] for name, of_fla in _OTHER_NAMES.items()}
    ours |= {
        "intermediate_size": intermediate_size,
        "hidden_act": "silu",
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": value_head_dim,
        "linear_decay_low_rank_dim": value_head_dim,
        # FLA's layers always have it. `config_to_fla` leaves a note where ours did not.
        "linear_output_gate_bias": fields.get("linear_output_gate_bias", True),
    }
    ours |= _attention_from_fla(fla)
    try:
        return KDAConfig(**ours)
    except StrictDataclassError as error:
        raise ValueError(f"the configuration is none of ours: {error}") from error


def _attention_from_fla(fla: dict[str, Any]) -> dict[str, Any]:
    """Our fields of attention layers, and `layer_types`."""
    specs = fla["attn"] or []
    specs = [specs] if isinstance(specs, dict) else specs
    layers: list[int] = []
    settings: dict[str, Any] = {}
    for spec in specs:
        if missing := sorted({"layers", "num_heads"} - spec.keys()):
            raise ValueError(f"`attn.{missing[0]}` is missing")
        if unknown := sorted(spec.keys() - _FLA_ATTENTION_DEFAULTS.keys() - {"layers", "num_heads"}):
            raise ValueError(f"`attn.{unknown[0]}` is a field that is not known here")
        layers += spec["layers"]
        filled = {f"attn.{name}": value for name, value in (_FLA_ATTENTION_DEFAULTS | spec).items() if name != "layers"}
        if filled["attn.num_kv_heads"] is None:
            filled["attn.num_kv_heads"] = filled["attn.num_heads"]
        for name, value in settings.items():
            _refuse_unless(
                filled[name] == value, filled, name, f"other attention layers have {value!r}, ours are alike"
            )
        settings = filled

    count, hidden_size = fla["num_hidden_layers"], fla["hidden_size"]
    if sorted(set(layers)) != sorted(layers) or not all(0 <= i < count for i in layers):
        raise ValueError(f"`attn.layers` is {layers}: it must name each layer once, from 0 to {count - 1}")
    types = ["full_attention" if i in layers else "linear_attention" for i in range(count)]
    if not layers:  # there are fields of attention all the same
        return {"layer_types": types, "num_attention_heads": fla["num_heads"], "head_dim": fla["head_dim"]}

    heads, key_heads = settings["attn.num_heads"], settings["attn.num_kv_heads"]
    _refuse_unless(settings["attn.window_size"] is None, settings, "attn.window_size", "our attention sees all tokens")
    _refuse_unless(heads > 0 and hidden_size % heads == 0, settings, "attn.num_heads", "`hidden_size` is no multiple")
    _refuse_unless(heads % key_heads == 0, settings, "attn.num_kv_heads", "`attn.num_heads` is no multiple of it")
    _refuse_unless(settings["attn.rope_theta"] is not None, settings, "attn.rope_theta", "it must be a number")
    return {
        "layer_types": types,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": hidden_size // heads,
        "attention_bias": settings["attn.qkv_bias"],
        "attention_output_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings["attn.rope_theta"]},
    }


def config_to_fla(config: KDAConfig) -> dict[str, Any]:
    """
    What config.json of an FLA checkpoint says of the model that our configuration describes.

    Raises:
        ValueError: FLA's model can't be what a field asks for, or the field is unknown. The message names it.
    """
    fields = config.to_dict()
    layer_types = fields.pop("layer_types")
    general = _general_fields(config.to_diff_dict(), set(KDAConfig.__dataclass_fields__) - _GENERAL)
    K, V = config.linear_head_dim, config.linear_value_head_dim
    assert V is not None and config.linear_num_value_heads is not None
    _refuse_unless(fields["hidden_act"] in ("silu", "swish"), fields, "hidden_act", "FLA's MLP has 'silu'")
    rank = fields["linear_decay_low_rank_dim"]
    _refuse_unless(rank == V, fields, "linear_decay_low_rank_dim", f"FLA has `linear_value_head_dim` ({V}) there")
    expand_v = V / K
    if int(K * expand_v) != V:  # FLA rounds down
        expand_v = math.nextafter(expand_v, math.inf)

    fla = general | {"architectures": ["KDAForCausalLM"], "model_type": FLA_MODEL_TYPE}
    fla |= {name: fields[name] for name in _SAME_NAMES}
    fla |= {of_fla: fields[name] for name, of_fla in _OTHER_NAMES.items()}
    fla |= {
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swish",
        "num_v_heads": config.linear_num_value_heads,
        "expand_v": expand_v,
        "safe_gate": bool(config.linear_lower_bound),  # FLA's kernels for it take no bound of 0
        "attn": None,
    }
    if not config.linear_output_gate_bias:
        fla["linear_output_gate_bias"] = False  # a note for `config_from_fla`; FLA does not read it
    if layers := [i for i, kind in enumerate(layer_types) if kind == "full_attention"]:
        fla["attn"] = _attention_to_fla(fields, layers)
    return fla


def _attention_to_fla(fields: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """FLA's `attn`, from ours."""
    rope, heads = fields["rope_parameters"], fields["num_attention_heads"]
    is_plain = bool(rope) and rope.get("rope_type") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
    _refuse_unless(is_plain, fields, "rope_parameters", "FLA's attention has RoPE of the default type")
    is_whole = fields["head_dim"] * heads == fields["hidden_size"]
    _refuse_unless(is_whole, fields, "head_dim", "FLA has `hidden_size` / `num_attention_heads`")
    for name in ("attention_output_bias", "use_qk_norm", "attention_dropout"):
        _refuse_unless(not fields[name], fields, name, "FLA's attention has none")
    return {
        "layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields["num_key_value_heads"],
        "qkv_bias": fields["attention_bias"],
        "window_size": None,
        "rope_theta": rope["rope_theta"],
    }


def _refuse_unless(condition: bool, fields: dict[str, Any], name: str, reason: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` is {fields[name]!r}: {reason}")


def _general_fields(fields: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Those of any configuration, as they are. Raises ValueError for one that is neither general nor `known`."""
    named = {name: value for name, value in fields.items() if not name.startswith("_")}
    if unknown := sorted(named.keys() - known - _GENERAL - _WRITTEN_ANEW):
        raise ValueError(f"{_listed(unknown)}: not known here. Take from config.json what the model does not depend on")
    return {name: value for name, value in named.items() if name in _GENERAL - _WRITTEN_ANEW - known}


def fla_name(name: str) -> str:
    """FLA's name of one of our tensors."""
    for ours, of_fla in _TENSOR_NAMES.items():
        name = name.replace(ours, of_fla)
    return name


class _Tensor(NamedTuple):
    """A tensor to write."""

    like: torch.Tensor  # shape and dtype, on the meta device
    file: Path | None  # None: zeros
    name: str  # in that file


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """
    Writes the checkpoint in `source` to the directory `target`, in the other of the two formats.

    No more than one file of the result is in memory at a time. `target` appears when it is complete; where something
    fails on the way, it is what it was before. Tokenizer, chat template and `generation_config.json` come along.

    Args:
        source (`str` or `Path`): a directory with `config.json` and safetensors, or a name on the Hub.
        target (`str` or `Path`): a directory that does not exist or is empty.
        to (`str`, *optional*): `"kda_hf"` or `"fla"`. Default: the one that `source` is not.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): bytes of one file of weights.
        overwrite (`bool`, defaults to `False`): whether to replace a directory that is not empty.

    Returns:
        `target`.

    Raises:
        ValueError: a field of the configuration, or a tensor, that the other format has no place for; a tensor that is
            missing, unknown or of another shape. The message names it.
        OSError: no checkpoint in `source`; `target` is not empty.
    """
    source, target = checkpoint_directory(source), Path(target).resolve()
    fields = _read_json(source / "config.json")
    if fields.get("model_type") not in _FORMATS:
        raise ValueError(f"`model_type` of {source} is {fields.get('model_type')!r}; it must be in {list(_FORMATS)}")
    is_fla = fields["model_type"] == FLA_MODEL_TYPE
    if to not in (None, "kda_hf" if is_fla else "fla"):
        raise ValueError(f"`to` is {to!r}, but {source} can become {'kda_hf' if is_fla else 'fla'!r} only")
    check_target(target, source, "source", overwrite)

    config = config_from_fla(fields) if is_fla else _read_config(fields)
    of_fla = None if is_fla else config_to_fla(config)
    tensors = _renamed(source, config, is_fla)
    sizes = {name: tensor.like for name, tensor in tensors.items()}
    try:
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(f"`max_shard_size`: {error}") from error

    with appearing(target) as new:
        _write_tensors(new, split, tensors)
        copy_beside_the_model(source, new)
        if of_fla is None:
            config.save_pretrained(new)
        else:
            _write_json(of_fla, new / "config.json")
    return target


def _read_config(fields: dict[str, Any]) -> KDAConfig:
    try:
        return KDAConfig(**{name: value for name, value in fields.items() if name != "model_type"})
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {error}") from error


def _renamed(source: Path, config: KDAConfig, is_fla: bool) -> dict[str, _Tensor]:
    """
    The tensors of `source` by their names in the other format, after a look at the headers of all files.

    A bias of the output gate that our model does not have is zeros in FLA's. Where it is no longer, after a training in
    FLA, `config` gets it.
    """
    full = copy.deepcopy(config)
    full.linear_output_gate_bias = True
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in KDAForCausalLM(full).state_dict().items()}
    ours = {fla_name(name) if is_fla else name: name for name in shapes}
    zeros = [] if config.linear_output_gate_bias else [name for name in shapes if name.endswith(_GATE_BIAS)]
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if not is_fla:
        ours = {name: name for name in ours if name not in zeros}

    files = _files_of_tensors(source)
    if unknown := sorted(files.keys() - ours.keys()):
        raise ValueError(f"{source} has tensors that its configuration has no place for: {_listed(unknown)}")
    if missing := sorted(ours.keys() - files.keys() - optional):
        raise ValueError(f"{source} lacks tensors: {_listed(missing)}")

    tensors: dict[str, _Tensor] = {}
    drop_zeros = is_fla
    for file in sorted(set(files.values())):
        with _opened(file) as tensors_of_file:
            for name in tensors_of_file.keys():  # noqa: SIM118  (not a dictionary)
                view = tensors_of_file.get_slice(name)
                if view.get_shape() != shapes[ours[name]]:
                    raise ValueError(f"{name} in {file} is {view.get_shape()}, not {shapes[ours[name]]}")
                like = torch.empty(view.get_shape(), dtype=view[:0].dtype, device="meta")
                tensors[ours[name]] = _Tensor(like, file, name)
                if is_fla and ours[name] in zeros and tensors_of_file.get_tensor(name).view(torch.uint8).any():
                    drop_zeros = False

    if drop_zeros:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in zeros}
    elif is_fla:
        config.linear_output_gate_bias = True
    else:
        for name in zeros:
            weight = tensors[name.removesuffix("bias") + "weight"].like
            tensors[name] = _Tensor(torch.empty(weight.shape[:1], dtype=weight.dtype, device="meta"), None, name)
    return tensors if is_fla else {fla_name(name): tensor for name, tensor in tensors.items()}


def _files_of_tensors(source: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint, in one file of safetensors or several with an index."""
    if (source / SAFE_WEIGHTS_NAME).exists():
        paths = [source / SAFE_WEIGHTS_NAME]
    elif (index := source / SAFE_WEIGHTS_INDEX_NAME).exists():
        paths = [source / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    else:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in source.glob(pattern))
        hint = f"; {_listed(others)}: load it and save it again, to have safetensors" if others else ""
        raise FileNotFoundError(f"{source} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}{hint}")
    files: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                if name in files:
                    raise ValueError(f"{name} is in {files[name].name} and in {path.name}")
                files[name] = path
    return files


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete file of safetensors: {error}") from error


def _write_tensors(directory: Path, split: Any, tensors: dict[str, _Tensor]) -> None:
    """The files of `split`, one after the other, and their index."""
    size = sum(tensor.like.nbytes for tensor in tensors.values())
    with logging.tqdm(total=size, unit="B", unit_scale=True, desc="Converting") as progress:
        for filename, names in split.filename_to_tensors.items():
            by_file = defaultdict(list)
            for name in names:
                by_file[tensors[name].file].append(name)
            shard: dict[str, torch.Tensor] = {}
            for file, names_in_file in by_file.items():
                if file is None:
                    shard |= {name: torch.zeros_like(tensors[name].like, device="cpu") for name in names_in_file}
                    continue
                with _opened(file) as source:
                    shard |= {name: source.get_tensor(tensors[name].name) for name in names_in_file}
            save_file(shard, directory / filename, metadata={"format": "pt"})
            progress.update(sum(tensor.nbytes for tensor in shard.values()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(index, directory / SAFE_WEIGHTS_INDEX_NAME)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


__all__ = ["config_from_fla", "config_to_fla", "convert_checkpoint", "fla_name"]
