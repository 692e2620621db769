"""The attention of a pretrained decoder swapped for KDA: all other weights stay, KDA starts from the attention's."""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_kda import KDAConfig
from .files import appearing, check_target, checkpoint_directory, copy_beside_the_model
from .modeling_kda import KDADecoderLayer, KDAForCausalLM, KimiDeltaAttention


SOURCES = ("llama", "mistral", "qwen2", "qwen3")

# Of the source's configuration, under the same name in ours
_SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "attention_dropout",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_OVERRIDABLE = {"allow_neg_eigval", "attention_dropout", "use_cache"}  # and all that starts with `linear_`
_PER_HEAD = ("linear_head_dim", "linear_value_head_dim")

# Where docs/swap.md has what was measured
_ACTIVATION = 4.0  # root mean square of what SiLU is given for q and k: few values stay negative, as in a feature map
_VALUE_ACTIVATION = 0.3  # and for v: there SiLU is nearly linear
_SHRINKAGE = 0.6  # how much smaller than a value the output of attention is, which averages values
_DECAYS = (0.01, 0.1)  # log-decay per token of the head with the longest memory, and with the shortest
_RIDGE = 1e-2  # of the mean square of a regressor


def swap_attention(
    model_or_path: PreTrainedModel | str | Path,
    layers: str | Iterable[int] = "3:1",
    *,
    calibration_ids: torch.Tensor | None = None,
    **overrides: Any,
) -> KDAForCausalLM:
    """
    A copy of a pretrained decoder with KDA in place of the attention of some layers.

    Embeddings, MLPs, norms and the other attention layers keep their weights bit for bit and their dtypes. KDA starts
    from the attention's q, k, v and o, with key and value heads repeated for each query head; biases and RoPE have no
    place in it. It is near the original, but not at it: what is lost, a training has to bring back.

    Args:
        model_or_path (`PreTrainedModel`, `str` or `Path`): a dense Llama, Mistral, SmolLM2, Qwen2 or Qwen3 of
            transformers, which stays as it is; or its directory, its name on the Hub, or its GGUF file.
        layers (`str` or `Iterable[int]`, defaults to `"3:1"`): `"n:m"`: of each n + m layers the first n become KDA;
            `"all"`; or the indices of the layers that do, as numbers or as `"0,1,2"`.
        calibration_ids (`torch.Tensor` of shape `[B, T]`, int64, *optional*): tokens of ordinary text, a few thousand.
            Layer by layer, decays, β and `o_proj` are then fitted to the output of the original attention on them,
            in closed form, which starts far closer.
        **overrides: fields of [`KDAConfig`] whose names start with `linear_`, `allow_neg_eigval`, `attention_dropout`
            and `use_cache`. By default a KDA layer has as many heads as the attention has query heads, of their width.
            Fewer `linear_num_heads` start from the mean of neighbouring query heads.

    Returns:
        The new model, on the device and in the mode (training or evaluation) of the original.

    Raises:
        ValueError: the original has something that [`KDAForCausalLM`] hasn't; the message names the field of its
            configuration. Or `layers`, `calibration_ids` or an override is wrong.
        OSError: nothing can be loaded from the path.
    """
    source = model_or_path if isinstance(model_or_path, PreTrainedModel) else load_source(model_or_path)
    config = swapped_config(source.config, layers, **overrides)
    if calibration_ids is not None and (calibration_ids.ndim != 2 or calibration_ids.numel() == 0):
        raise ValueError(f"`calibration_ids` must have shape [B, T], got {list(calibration_ids.shape)}")
    without_swap = swapped_config(source.config, [], **overrides)
    weights = _plain_weights(source, without_swap)
    model = _assemble(config, {name: tensor.clone() for name, tensor in weights.items()})
    with torch.no_grad():
        for index in _swapped_layers(config):
            prefix = f"model.layers.{index}."
            of_layer = {
                name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)
            }
            _start(model.model.layers[index].linear_attn, of_layer, config)
        if calibration_ids is not None:
            original = _assemble(without_swap, weights)
            _calibrate(model, original, calibration_ids.to(model.device))
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)


def load_source(path: str | Path, gguf_file: str | None = None, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """
    The model to swap layers of, as `AutoModelForCausalLM` loads it.

    Args:
        path (`str` or `Path`): a directory, a name on the Hub, or a GGUF file.
        gguf_file (`str`, *optional*): the name of a GGUF file in `path`; its weights are dequantised.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): of the weights; `"auto"` is what they are stored in, and
            float32 for GGUF.

    Raises:
        ValueError: `dtype` is none of torch.
        OSError: nothing can be loaded from the path.
    """
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype), dtype), torch.dtype):
        raise ValueError(f"`dtype` (--dtype) is {dtype!r}: no dtype of torch")
    directory, gguf_file = _parts(path, gguf_file)
    files = {"gguf_file": gguf_file} if gguf_file else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **files)


def _parts(path: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """What transformers calls a GGUF file: its directory and its name."""
    if gguf_file is None and Path(path).suffix == ".gguf":
        return str(Path(path).parent), Path(path).name
    return str(path), gguf_file


def parse_layers(layers: str | Iterable[int], num_hidden_layers: int) -> list[int]:
    """
    The indices that `"3:1"`, `"all"`, `"0,1,2"` or a list of them means.

    Raises:
        ValueError: `layers` is none of these, or an index is not in the model.
    """
    if layers == "all":
        return list(range(num_hidden_layers))
    if isinstance(layers, str) and all(part.strip().isdecimal() for part in layers.split(",")):
        layers = [int(part) for part in layers.split(",")]
    if isinstance(layers, str):
        parts = layers.split(":")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) < 1:
            raise ValueError(f"`layers` must be a ratio like '3:1', 'all', or a list of indices, got {layers!r}")
        kda, attention = map(int, parts)
        return [index for index in range(num_hidden_layers) if index % (kda + attention) < kda]
    indices = sorted(set(layers))
    if wrong := [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_hidden_layers]:
        raise ValueError(f"`layers` must be indices from 0 to {num_hidden_layers - 1}, got {wrong}")
    return indices


def swapped_config(source: Any, layers: str | Iterable[int] = "3:1", **overrides: Any) -> KDAConfig:
    """
    The configuration of the model that [`swap_attention`] makes, from that of the original.

    Raises:
        ValueError: see [`swap_attention`].
    """
    _refuse_unless(source.model_type in SOURCES, "model_type", source.model_type, f"it must be in {list(SOURCES)}")
    fields: dict[str, Any] = {name: getattr(source, name) for name in _SAME_NAMES}
    _check(source)
    swapped = parse_layers(layers, source.num_hidden_layers)
    # Where a configuration has no `attention_bias`, its class decides
    bias = source.model_type == "qwen2" or bool(getattr(source, "attention_bias", False))
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    fields |= {
        "layer_types": [
            "linear_attention" if index in swapped else "full_attention" for index in range(source.num_hidden_layers)
        ],
        "head_dim": head_dim,
        "attention_bias": bias,
        "attention_output_bias": bias and source.model_type != "qwen2",
        "use_qk_norm": source.model_type == "qwen3",
        # Only attention has positions
        "rope_parameters": copy.deepcopy(source.rope_parameters) if len(swapped) < source.num_hidden_layers else None,
        "linear_num_heads": source.num_attention_heads,
        "linear_head_dim": head_dim,
    }
    for name, value in overrides.items():
        if name not in KDAConfig.__dataclass_fields__:
            raise ValueError(f"`{name}` is no field of KDAConfig")
        allowed = name in _OVERRIDABLE or name.startswith("linear_")
        _refuse_unless(allowed, name, value, "weights that stay decide it")
        if name in _PER_HEAD:
            _refuse_unless(value in (None, head_dim), name, value, f"the heads of the attention are {head_dim} wide")
    try:
        config = KDAConfig(**(fields | overrides))
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    _check_heads(config)
    config._attn_implementation = source._attn_implementation
    return config


def _check(source: Any) -> None:
    """Raises ValueError for what the other classes of transformers can do, and ours can't."""
    _refuse_unless(source.hidden_act in ("silu", "swish"), "hidden_act", source.hidden_act, "the MLP has 'silu'")
    mlp_bias = getattr(source, "mlp_bias", False)
    _refuse_unless(not mlp_bias, "mlp_bias", mlp_bias, "the MLP has no biases")
    window, kinds = getattr(source, "sliding_window", None), set(getattr(source, "layer_types", None) or ())
    unused = window is None or window >= source.max_position_embeddings or kinds == {"full_attention"}
    _refuse_unless(unused, "sliding_window", window, "attention sees all tokens")
    _refuse_unless(kinds <= {"full_attention"}, "layer_types", sorted(kinds), "each layer must have full attention")
    rope = source.rope_parameters or {}
    known = {"default", *ROPE_INIT_FUNCTIONS}
    _refuse_unless(rope.get("rope_type") in known, "rope_parameters", rope, f"`rope_type` must be in {sorted(known)}")


def _check_heads(config: KDAConfig) -> None:
    """Raises ValueError for numbers of KDA heads that the attention's heads can't be laid out on."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    for name in ("linear_num_heads", "linear_num_value_heads"):
        count = getattr(config, name)
        fits = heads % count == 0 and count % key_heads == 0
        reason = f"it must divide `num_attention_heads` ({heads}) by a whole number, and be a multiple of the "
        _refuse_unless(fits, name, count, f"{reason}`num_key_value_heads` ({key_heads})")


def _refuse_unless(condition: bool, name: str, value: Any, reason: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` is {value!r}: {reason}")


def _swapped_layers(config: KDAConfig) -> list[int]:
    assert config.layer_types is not None
    return [index for index, kind in enumerate(config.layer_types) if kind == "linear_attention"]


def _plain_weights(source: PreTrainedModel, without_swap: KDAConfig) -> dict[str, torch.Tensor]:
    """
    All weights of the original, by the names that they have in our model without KDA layers, too.

    Raises:
        ValueError: the original has others (adapters), quantised ones, or ones that are not on one device.
    """
    with torch.device("meta"), no_init_weights():
        shapes = {name: tensor.shape for name, tensor in KDAForCausalLM(without_swap).state_dict().items()}
    weights = {name: tensor.detach() for name, tensor in source.state_dict().items()}
    if wrong := sorted(shapes.keys() ^ weights.keys()):
        raise ValueError(f"`model_or_path` is no plain {source.config.model_type}: {', '.join(wrong[:8])}")
    for name, weight in weights.items():
        if weight.shape != shapes[name] or not weight.is_floating_point():
            found = f"{list(weight.shape)} of {weight.dtype}"
            raise ValueError(f"`quantization_config`: {name} is {found}, not {list(shapes[name])}; load it dequantised")
    devices = {str(weight.device) for weight in weights.values()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"`model_or_path` must be on one device, got {sorted(devices)}")
    return weights


def _assemble(config: KDAConfig, weights: dict[str, torch.Tensor]) -> KDAForCausalLM:
    """A model whose parameters are `weights`, as far as it has them. Those of KDA are left without values."""
    with no_init_weights():
        model = KDAForCausalLM(copy.deepcopy(config)).eval()
    for name, _ in list(model.named_parameters()):
        if name in weights:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(weights[name]))
    embedding = model.model.embed_tokens.weight
    model.config.dtype = embedding.dtype
    for index in _swapped_layers(config):
        model.model.layers[index].linear_attn.to(embedding.device, embedding.dtype)
    if model.model.rotary_emb is not None:
        model.model.rotary_emb.to(embedding.device)
    model.tie_weights()
    return model


class _Memory(NamedTuple):
    """How a value head starts to forget and to write."""

    decay: float  # −log of what is left after a token
    beta: float


def _start(layer: KimiDeltaAttention, weights: dict[str, torch.Tensor], config: KDAConfig) -> None:
    """Gives all parameters of a KDA layer values, from the `weights` of a layer with attention."""
    heads, key_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert key_heads is not None and width is not None
    merged = heads // layer.num_heads, heads // layer.num_value_heads  # query heads to a head of q and k, and of v
    q = weights["self_attn.q_proj.weight"].unflatten(0, (layer.num_heads, merged[0], width))
    k = weights["self_attn.k_proj.weight"].unflatten(0, (key_heads, width))
    v = weights["self_attn.v_proj.weight"].unflatten(0, (key_heads, width))
    q = q.float().mean(1).to(q.dtype)
    k = k.repeat_interleave(layer.num_heads // key_heads, dim=0)
    v = v.repeat_interleave(layer.num_value_heads // key_heads, dim=0)
    o = weights["self_attn.o_proj.weight"].float().unflatten(1, (layer.num_value_heads, merged[1], width)).sum(2)

    # The norm before the layer gives inputs with a mean square of one, times its weight
    input_scale = weights["input_layernorm.weight"].float()
    q_size, k_size, v_size = (((x.float() * input_scale) ** 2).sum(-1).mean(-1).sqrt() for x in (q, k, v))
    q_tap, k_tap = (_ACTIVATION / size[:, None].expand(-1, width) for size in (q_size, k_size))
    if config.use_qk_norm:
        q_tap = q_tap * weights["self_attn.q_norm.weight"].float()
        k_tap = k_tap * weights["self_attn.k_norm.weight"].float()
    v_tap = (_VALUE_ACTIVATION / v_size)[:, None].expand(-1, width)

    for projection, weight in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v)):
        projection.weight.copy_(weight.flatten(0, 1))
    for conv, tap in ((layer.q_conv1d, q_tap), (layer.k_conv1d, k_tap), (layer.v_conv1d, v_tap)):
        conv.weight.zero_()
        conv.weight[:, 0, -1] = tap.flatten().to(conv.weight.dtype)
    # The norm on the output makes each head as large as any, and the output gate is half open
    layer.o_norm.weight.fill_(1.0)
    layer.o_proj.weight.copy_((o * (2 * _SHRINKAGE * v_size)[:, None]).flatten(1))

    # With zeros in the second projection the gates are constant; zeros in both would have no gradient
    for first, second in ((layer.f_a_proj, layer.f_b_proj), (layer.g_a_proj, layer.g_b_proj)):
        nn.init.normal_(first.weight, std=config.initializer_range)
        nn.init.zeros_(second.weight)
    if layer.g_b_proj.bias is not None:
        nn.init.zeros_(layer.g_b_proj.bias)
    nn.init.zeros_(layer.b_proj.weight)
    nn.init.zeros_(layer.A_log)
    decays = torch.logspace(*(math.log10(decay) for decay in reversed(_DECAYS)), layer.num_value_heads)
    for head, decay in enumerate(decays.tolist()):
        _set_decay(layer, decay, head)


def _set_decay(layer: KimiDeltaAttention, decay: float, head: int | slice = slice(None)) -> None:
    """The bias of the forget gate with which a head's log-decay is `-decay` per token, where A is 1."""
    if layer.lower_bound is None:
        bias = math.log(math.expm1(decay))
    else:
        share = decay / max(-layer.lower_bound, 2 * decay)
        bias = math.log(share / (1 - share))
    layer.dt_bias.view(layer.num_value_heads, -1)[head] = bias


# What a value head chooses from: memories of 3, 30 and 300 tokens, that overwrite what they hold or add to it
_MEMORIES = [_Memory(decay, beta) for decay in (0.003, 0.03, 0.3) for beta in (0.5, 0.1)]


def _calibrate(model: KDAForCausalLM, original: KDAForCausalLM, ids: torch.Tensor) -> None:
    """
    Fits the KDA layers of `model` to the attention of `original`, one after the other, on tokens `ids` `[B, T]`.

    A value head gets the memory from whose output a linear map comes nearest to that of the attention's head. Then
    `o_proj` is the linear map that brings the hidden states nearest to the original's, which makes up for what the
    layers before have changed.
    """
    hidden = model.model.embed_tokens(ids)
    target = hidden
    masks, _, positions = original.model.masks_and_positions(hidden, None, None, None)
    for layer, attention_layer in zip(model.model.layers, original.model.layers, strict=True):
        after_attention, heads = _attention(attention_layer, target, positions, masks["full_attention"])
        if layer.layer_type == "linear_attention":
            _fit(layer.linear_attn, layer.input_layernorm(hidden), after_attention - hidden, heads)
        target = _forward(attention_layer, target, positions, masks["full_attention"])
        hidden = _forward(layer, hidden, positions, masks[layer.layer_type])


def _forward(layer: KDADecoderLayer, hidden: torch.Tensor, positions: Any, mask: Any) -> torch.Tensor:
    """Row by row, which bounds the memory."""
    return torch.cat([layer(row, attention_mask=mask, position_embeddings=positions) for row in hidden.split(1)])


def _attention(
    layer: KDADecoderLayer, hidden: torch.Tensor, positions: Any, mask: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states `[B, T, hidden_size]` after the attention of a layer, and its heads' outputs side by side."""
    inputs: list[torch.Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    rows = layer.input_layernorm(hidden).split(1)
    output = torch.cat([layer.self_attn(row, positions, mask)[0] for row in rows])
    hook.remove()
    return hidden + output, torch.cat(inputs)


def _fit(layer: KimiDeltaAttention, x: torch.Tensor, target: torch.Tensor, heads: torch.Tensor) -> None:
    """
    Args:
        x (`torch.Tensor` of shape `[B, T, hidden_size]`): the layer's input.
        target (`torch.Tensor` of shape `[B, T, hidden_size]`): the output to come near to.
        heads (`torch.Tensor` of shape `[B, T, num_attention_heads·head_dim]`): what the attention's heads gave.
    """
    value_heads = (layer.num_value_heads, -1, layer.value_head_dim)
    heads = heads.flatten(0, 1).float().unflatten(-1, value_heads).mean(2).transpose(0, 1)
    # β has no bias of its own: this direction of the input is nearly constant
    inputs = x.flatten(0, 1).float()
    one = _ridge(inputs, torch.ones_like(inputs[:, :1]))[:, 0]

    errors = []
    for memory in _MEMORIES:
        for head in range(layer.num_value_heads):
            _set_memory(layer, memory, one, head)
        outputs = _normed_heads(layer, x)
        errors.append(((outputs @ _ridge(outputs, heads) - heads) ** 2).sum((1, 2)))
    for head, choice in enumerate(torch.stack(errors).argmin(0).tolist()):
        _set_memory(layer, _MEMORIES[choice], one, head)

    outputs = _normed_heads(layer, x).transpose(0, 1).flatten(1)
    layer.o_proj.weight.copy_(_ridge(outputs, target.flatten(0, 1).float()).T)


def _normed_heads(layer: KimiDeltaAttention, x: torch.Tensor) -> torch.Tensor:
    """What `o_proj` is given for `x`, of each value head: `[HV, B·T, V]`, in fp32."""
    inputs: list[torch.Tensor] = []
    hook = layer.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for row in x.split(1):
        layer(row)
    hook.remove()
    return torch.cat(inputs).flatten(0, 1).float().unflatten(-1, (layer.num_value_heads, -1)).transpose(0, 1)


def _set_memory(layer: KimiDeltaAttention, memory: _Memory, one: torch.Tensor, head: int) -> None:
    _set_decay(layer, memory.decay, head)
    beta = memory.beta / (2 if layer.allow_neg_eigval else 1)
    layer.b_proj.weight[head] = (math.log(beta / (1 - beta)) * one).to(layer.b_proj.weight.dtype)


def _ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The matrix `w` `[..., N, M]` for which `x @ w` comes near to y, for x `[..., T, N]` and y `[..., T, M]`."""
    gram = (x.mT @ x).double()
    gram.diagonal(dim1=-2, dim2=-1).add_(_RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))
    return torch.linalg.solve(gram, (x.mT @ y).double()).to(x.dtype)


def swap_checkpoint(
    base: str | Path,
    target: str | Path,
    layers: str | Iterable[int] = "3:1",
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    calibration_text: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    **overrides: Any,
) -> str:
    """
    Writes what [`swap_attention`] makes of a checkpoint to the directory `target`, with its tokenizer, chat template
    and generation configuration. `target` appears when it is complete.

    Args:
        base (`str` or `Path`): the original, as [`load_source`] takes it, with `gguf_file` and `dtype`.
        target (`str` or `Path`): a directory that does not exist or is empty.
        layers, **overrides: as [`swap_attention`] takes them.
        calibration_text (`str`, *optional*): text that the original finds ordinary, to calibrate on; see
            [`calibration_rows`].
        max_shard_size (`int` or `str`, defaults to `"5GB"`): bytes of one file of weights.
        overwrite (`bool`, defaults to `False`): whether to replace a directory that is not empty.

    Returns:
        The table of what was swapped.

    Raises:
        ValueError: see [`swap_attention`]; or `target` is `base`, or has it inside.
        OSError: no checkpoint in `base`; `target` is not empty.
    """
    layers = layers if isinstance(layers, str) else list(layers)
    target = Path(target).resolve()
    base, gguf_file = _parts(base, gguf_file)
    base = _existing(base, gguf_file)
    check_target(target, Path(base), "base", overwrite)
    files = {"gguf_file": gguf_file} if gguf_file else {}
    config = AutoConfig.from_pretrained(base, **files)
    swapped_config(config, layers, **overrides)  # refuses before the weights are read

    tokenizer = None
    if gguf_file or calibration_text is not None:
        tokenizer = AutoTokenizer.from_pretrained(base, **files)
    rows = None if calibration_text is None else calibration_rows(calibration_text, tokenizer)
    source = load_source(base, gguf_file, dtype)
    model = swap_attention(source, layers, calibration_ids=rows, **overrides)
    del source

    with appearing(target) as new:
        model.save_pretrained(new, max_shard_size=max_shard_size)
        if gguf_file:
            assert tokenizer is not None
            tokenizer.save_pretrained(new)
        else:
            copy_beside_the_model(Path(base), new)
    return swap_table(config, model)


def _existing(base: str, gguf_file: str | None) -> str:
    """Where `base` lies, in full; a name on the Hub of GGUF files stays one."""
    if gguf_file is None:
        return str(checkpoint_directory(base))
    path = Path(base)
    if not path.is_dir() and (path.is_absolute() or base.startswith(".")):
        raise FileNotFoundError(f"no such directory: {base}")
    if path.is_dir() and not (path / gguf_file).is_file():
        raise FileNotFoundError(f"no such file: {path / gguf_file}")
    return str(path.resolve()) if path.is_dir() else base


def calibration_rows(text: str, tokenizer: Any, rows: int = 16, length: int = 512) -> torch.Tensor:
    """
    Tokens `[rows, length]` from places all over a text. Less of it gives shorter rows.

    Raises:
        ValueError: the text has too few tokens for rows of two.
    """
    pieces = [text[len(text) * row // rows : len(text) * (row + 1) // rows] for row in range(rows)]
    # Twenty characters are more than a token of ordinary text has
    ids = [tokenizer(piece[: 20 * length], add_special_tokens=False)["input_ids"] for piece in pieces]
    length = min(length, *map(len, ids))
    if length < 2:
        raise ValueError(f"`calibration_text` has {len(text)} characters, too few for {rows} rows of tokens")
    return torch.tensor([row[:length] for row in ids])


def swap_table(source: Any, model: KDAForCausalLM) -> str:
    """
    What a swap has changed, for people: each layer before and after, parameters, and what a cache holds.

    Args:
        source: the configuration of the original.
        model (`KDAForCausalLM`): what [`swap_attention`] made of it.
    """
    config, original = model.config, swapped_config(source, [])
    with torch.device("meta"), no_init_weights():
        before = KDAForCausalLM(original)
    before.tie_weights()
    lines = ["layer  before            after              parameters before      after"]
    for index, (old, new) in enumerate(zip(before.model.layers, model.model.layers, strict=True)):
        kind = "attention" if new.layer_type == "full_attention" else "KDA"
        lines.append(f"{index:5}  {'attention':16}  {kind:16}  {_count(old):18,}  {_count(new):11,}")
    lines += [
        f"{'':5}  {source.model_type:16}  {config.model_type:16}  {_count(before):18,}  {_count(model):11,}",
        "",
        f"{'':42}{'before':>18}  {'after':>11}",
    ]
    rows = (("KV bytes per token", _kv_bytes), ("state bytes per sequence", _state_bytes))
    for name, measure in rows:
        lines.append(f"{name:42}{measure(original, model.dtype):18,}  {measure(config, model.dtype):11,}")
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kv_bytes(config: KDAConfig, dtype: torch.dtype) -> int:
    """That a token adds to the cache."""
    assert config.layer_types is not None and config.num_key_value_heads is not None and config.head_dim is not None
    return (
        config.layer_types.count("full_attention") * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    )


def _state_bytes(config: KDAConfig, dtype: torch.dtype) -> int:
    """Of the recurrent states, in fp32, and the inputs that the convolutions reach back to."""
    with torch.device("meta"):
        layers = [KimiDeltaAttention(config, index) for index in _swapped_layers(config)]
    recurrent = sum(4 * layer.num_value_heads * layer.head_dim * layer.value_head_dim for layer in layers)
    return recurrent + sum(dtype.itemsize * sum(layer.qkv_dims) * layer.conv_kernel_size for layer in layers)


__all__ = ["calibration_rows", "load_source", "parse_layers", "swap_attention", "swap_checkpoint", "swap_table"]
