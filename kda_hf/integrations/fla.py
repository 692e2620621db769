"""kda_hf as a backend in the dispatch of flash-linear-attention (FLA).

For each call of `chunk_kda` and `fused_recurrent_kda` in `fla.ops.kda`, FLA asks its backends in turn whether they
serve it. After :func:`register` ours is asked first, and says why where it refuses: FLA then goes on as if it were not
there. What FLA's layers and models compute goes through the same two functions.
"""

import importlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from .. import ops
from ..ops import backends, checks, cuda
from ..ops import fla as own_calls
from ..ops.inputs import KDAInputs


logger = logging.getLogger("kda_hf")

NAME = "kda_hf"
BACKENDS = ("cuda", "torch")
VARIABLES = ("FLA_KDA_HF", "FLA_FLASH_KDA")  # 0 turns the backend off
PRIORITY = 2  # FLA asks lower numbers first, and its own `flash_kda` has 3
FIRST_VERSION = (0, 5)
SEPARATE_REGISTRIES = (0, 6)  # since then `chunk_kda` has its own registry, and the recurrence is dispatched at all

# What we do as FLA does. Any other argument has to be at its default.
HONOURED = frozenset(
    ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "scale", "initial_state", "output_final_state", "cu_seqlens")
    + ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")
    + ("safe_gate", "lower_bound", "state_v_first", "transpose_state_layout", "cu_seqlens_cpu", "chunk_size")
    + ("disable_recompute", "use_graph", "max_num_seqs")
)


class Function(NamedTuple):
    """A function of FLA that it dispatches."""

    name: str
    op: str  # of ours, which serves it
    parameters: dict[str, Any]  # and their defaults, in order
    by_keyword: tuple[str, ...] = ()  # what it reads from its `**kwargs`
    needs_A_log: bool = False  # even for the gate with a lower bound


class Call(NamedTuple):
    """A call of FLA's in our terms."""

    inputs: KDAInputs
    output_final_state: bool
    safe_gate: bool
    cu_seqlens_cpu: torch.Tensor | None
    max_num_seqs: int | None  # how many sequences FLA wants there to be


def translate(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call that FLA got. Raises ValueError or TypeError, with the reason, where we would not do what FLA does."""
    if len(args) > len(function.parameters):
        raise ValueError(f"there are {len(args)} positional arguments, and {function.name} takes fewer")
    by_position = dict(zip(function.parameters, args, strict=False))
    for name in by_position.keys() & kwargs.keys():
        raise ValueError(f"`{name}` is given twice")
    x = function.parameters | by_position | kwargs
    for name, value in x.items():
        is_known = name in function.parameters or name in function.by_keyword
        if not (is_known and name in HONOURED) and value is not None and value is not False:
            raise ValueError(f"`{name}` is {'not served' if is_known else f'no argument of {function.name}'}")

    use_gate, safe_gate = bool(x.get("use_gate_in_kernel")), bool(x.get("safe_gate"))
    lower_bound, A_log, dt_bias = (x.get(name) if use_gate else None for name in ("lower_bound", "A_log", "dt_bias"))
    for name, parameter in (("A_log", A_log), ("dt_bias", dt_bias)):
        if parameter is not None:
            checks.is_tensor(name, parameter)
    checks.lower_bound(lower_bound)
    if use_gate and A_log is None and (function.needs_A_log or lower_bound is None):
        raise ValueError("`A_log` is None, and FLA wants one")
    if use_gate and safe_gate and lower_bound == 0:
        raise ValueError("`lower_bound` is 0, which FLA excludes from the safe gate")
    if x.get("state_v_first") and "transpose_state_layout" in x:
        raise ValueError("`state_v_first` and `transpose_state_layout` are two names of one argument")
    if x.get("chunk_size", 64) not in (32, 64):
        raise ValueError(f"`chunk_size` is {x['chunk_size']}, and FLA has chunks of 32 and 64")
    inputs = KDAInputs(
        x["q"],
        x["k"],
        x["v"],
        x["g"],
        x["beta"],
        x.get("initial_state"),
        None if A_log is None else A_log.flatten(),  # FLA takes any shape of either
        None if dt_bias is None else dt_bias.flatten(),
        x.get("cu_seqlens"),
        state_v_first=bool(x.get("state_v_first") or x.get("transpose_state_layout")),
        scale=checks.default_scale(x["q"]) if x.get("scale") is None else x["scale"],
        lower_bound=lower_bound,
        use_gate=use_gate,
        use_qk_norm=bool(x.get("use_qk_l2norm_in_kernel")),
        use_beta_sigmoid=bool(x.get("use_beta_sigmoid_in_kernel")),
        allow_neg_eigval=bool(x.get("allow_neg_eigval")),
    )
    most = x.get("max_num_seqs") if x.get("use_graph") and inputs.cu_seqlens is not None else None
    return Call(inputs, bool(x.get("output_final_state")), safe_gate, x.get("cu_seqlens_cpu"), most)


def refusal(function: Function, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why our `backend` does not serve the call of FLA's function, or None."""
    if own_calls.is_calling.get():
        return "kda_hf itself asks for FLA's kernels"
    for variable in VARIABLES:
        if os.environ.get(variable) == "0":
            return f"{variable}=0"
    wanted = os.environ.get(backends.VARIABLE, "auto")
    if wanted not in ("auto", backend):
        return f"{backends.VARIABLE}={wanted}"
    try:
        call = translate(function, args, kwargs)
        x = call.inputs
        checks.kda(x, cu_seqlens_cpu=call.cu_seqlens_cpu, safe_gate=call.safe_gate)
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    if call.max_num_seqs not in (None, x.sequences):
        return f"`max_num_seqs` is {call.max_num_seqs}, and `cu_seqlens` has {x.sequences} sequences"
    if x.q.numel() == 0 or x.v.numel() == 0:
        return "there are no tokens"
    if x.has_mixed_dtypes:
        return "q, k and v have several dtypes, or g or beta has neither theirs nor torch.float32"
    if x.state_dtype != torch.float32:
        return f"the final state would be {x.state_dtype}, and FLA's is torch.float32"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in x.tensors):
        return "the inputs require grad, and kda_hf serves inference"
    goes_by_token = function.op == "recurrent_kda"
    if not goes_by_token and x.q.shape[-1] > backends.FLA_MAX_HEAD_DIM:
        return f"the keys have {x.q.shape[-1]} channels, and FLA takes up to {backends.FLA_MAX_HEAD_DIM}"
    return backends.refusal(
        backend,
        backends.Call(
            function.op,
            x.q.device,
            x.q.dtype,
            x.q.shape[-1],
            x.v.shape[-1],
            state_dtype=x.state_dtype,
            packed=x.cu_seqlens is not None,
            token_states=goes_by_token,  # what the kernel needs that goes by token, however many there are
        ),
    )


class Operators:
    """What FLA calls: for each function, whether its arguments are served, and the function. Both have FLA's names and
    take FLA's arguments."""

    backend_type = NAME
    priority = PRIORITY
    backend: str
    functions: dict[str, Function]

    # FLA 0.5 dispatches within traced code, which would trace what follows, too.
    @torch.compiler.disable
    def chunk_kda_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        return self._verify("chunk_kda", args, kwargs)

    @torch.compiler.disable
    def chunk_kda(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        return self._serve("chunk_kda", args, kwargs)

    @torch.compiler.disable
    def fused_recurrent_kda_fwd_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        return self._verify("fused_recurrent_kda_fwd", args, kwargs)

    @torch.compiler.disable
    def fused_recurrent_kda_fwd(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        return self._serve("fused_recurrent_kda_fwd", args, kwargs)

    def _verify(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, str | None]:
        reason = refusal(self.functions[name], self.backend, args, kwargs)
        # FLA tells the first reason of a function, and our log each.
        backends.log_once(
            f"fla.ops.kda.{name}", self.backend, "serves the calls" if reason is None else f"refused: {reason}"
        )
        return reason is None, reason

    def _serve(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, ...]:
        function = self.functions[name]
        x, output_final_state, *_ = translate(function, args, kwargs)
        if "transpose_state_layout" in kwargs.keys() - function.parameters.keys():
            warnings.warn("`transpose_state_layout` is now `state_v_first`", DeprecationWarning, stacklevel=2)
        if function.op == "recurrent_kda" and self.backend == "cuda":
            # Token by token however many there are, as FLA does: it is more exact than by chunks.
            results = cuda.recurrent_kda(x, output_final_state, False, False, None, by_token=True)
            if not isinstance(results, str):
                return results[:2]
        # Where only the extension itself finds that a call is too large for it, another of our backends serves it.
        return getattr(ops, function.op)(
            *x[:5],
            scale=x.scale,
            initial_state=x.initial_state,
            output_final_state=output_final_state,
            A_log=x.A_log,
            dt_bias=x.dt_bias,
            lower_bound=x.lower_bound,
            use_gate_in_kernel=x.use_gate,
            use_qk_l2norm_in_kernel=x.use_qk_norm,
            use_beta_sigmoid_in_kernel=x.use_beta_sigmoid,
            allow_neg_eigval=x.allow_neg_eigval,
            state_v_first=x.state_v_first,
            cu_seqlens=x.cu_seqlens,
            backend="torch" if self.backend == "torch" else None,
        )


def _version() -> tuple[int, int]:
    """FLA's, once it is imported. Raises ImportError where it is absent or too old."""
    wanted = "kda_hf.integrations.fla needs flash-linear-attention 0.5 or newer (pip install 'fla-core>=0.6')"
    try:
        version = importlib.import_module("fla").__version__
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{wanted}, and it can't be imported: {error}") from error
    major, minor = (int(number) for number in re.findall(r"\d+", version)[:2])
    if (major, minor) < FIRST_VERSION:
        raise ImportError(f"{wanted}, and {version} is installed")
    return major, minor


_undo: list[Callable[[], None]] = []


def register(backend: str = "cuda") -> tuple[str, ...]:
    """Put kda_hf before FLA's own backends, for calls without gradients that our kernels can serve.

    Calling it again changes nothing, or the `backend`. :func:`unregister` takes everything back, and the variables
    `FLA_KDA_HF=0` and `FLA_FLASH_KDA=0` turn the backend off while they are set.

    Args:
        backend: "cuda", our kernels; or "torch", the PyTorch operators, which serve any device and any head dimension,
            slowly: to check results, and where Triton does not run.

    Returns:
        The names of the functions in `fla.ops.kda` whose calls kda_hf is asked for; none where
        `FLA_DISABLE_BACKEND_DISPATCH=1` has turned FLA's dispatch off.

    Raises:
        ImportError: FLA is absent, older than 0.5, or newer and unknown. ValueError: an unknown `backend`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be {' or '.join(BACKENDS)}; got {backend!r}")
    unregister()
    version = _version()
    dispatch = importlib.import_module("fla.backends" if version >= SEPARATE_REGISTRIES else "fla.ops.backends")
    chunk, recurrent = (importlib.import_module(f"fla.ops.kda.{name}") for name in ("chunk", "fused_recurrent"))
    try:
        if dispatch._DISPATCH_DISABLED:
            logger.warning("FLA_DISABLE_BACKEND_DISPATCH is set: FLA asks no backend, and kda_hf is not registered")
            return ()
        if version >= SEPARATE_REGISTRIES:
            registries = [
                dispatch._function_registries[inspect.unwrap(chunk.chunk_kda)],
                dispatch._operation_registries["kda"],
            ]
        else:
            dispatch.BackendRegistry.ensure_initialized("kda")
            registries = [dispatch.BackendRegistry._registries["kda"]]
        functions = (
            _function(
                chunk.chunk_kda, version, by_keyword=("A_log", "dt_bias", "chunk_size", "transpose_state_layout")
            ),
            _function(recurrent.fused_recurrent_kda_fwd, version),
        )
    except (AttributeError, KeyError) as error:
        raise ImportError(
            f"FLA {'.'.join(map(str, version))} keeps its backends in an unknown place: {error}"
        ) from error

    members = {"backend": backend, "functions": {function.name: function for function in functions}}
    ours = type("KDAHFBackend", (Operators, dispatch.BaseBackend), members)()
    for registry in registries:
        registry.register(ours)
        _undo.append(partial(_remove, registry))
    if version < SEPARATE_REGISTRIES:
        _dispatch_recurrent(dispatch.dispatch("kda"), recurrent)
    return "chunk_kda", "fused_recurrent_kda"


def unregister() -> None:
    """Leave FLA as it was before :func:`register`. Does nothing where nothing is registered."""
    while _undo:
        _undo.pop()()


def _function(function: Callable, version: tuple[int, int], by_keyword: tuple[str, ...] = ()) -> Function:
    parameters = {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(inspect.unwrap(function)).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    op = {"chunk_kda": "chunk_kda", "fused_recurrent_kda_fwd": "recurrent_kda"}[function.__name__]
    return Function(function.__name__, op, parameters, by_keyword, needs_A_log=version < SEPARATE_REGISTRIES)


def _remove(registry: Any) -> None:
    registry._backends.pop(NAME, None)
    registry._logged.difference_update([key for key in registry._logged if NAME in key.split(":")])
    if hasattr(registry, "_active"):
        registry._active = None
        registry._update_active_backend()


def _dispatch_recurrent(dispatch: Callable[[Callable], Callable], module: Any) -> None:
    """Let FLA 0.5 dispatch what `fused_recurrent_kda` calls, which it looks up in its module at each call: wherever
    `fused_recurrent_kda` has been imported to, it finds the replacement."""
    original = module.fused_recurrent_kda_fwd
    module.fused_recurrent_kda_fwd = replacement = dispatch(original)

    def restore() -> None:
        if module.fused_recurrent_kda_fwd is replacement:
            module.fused_recurrent_kda_fwd = original

    _undo.append(restore)
