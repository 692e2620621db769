"""Which backend a call gets, what is said about it, and what the environment changes."""

import logging

import pytest
import torch

from kda_hf import ops
from kda_hf.ops import backends, cpu, cuda, fla


CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No variable set, nothing said yet, neither of the extensions nor FLA."""
    for variable in ("KDA_HF_BACKEND", "FLA_FLASH_KDA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(cuda, "_unavailable", "the CUDA extension is not built")
    monkeypatch.setattr(cuda, "_served", set())
    monkeypatch.setattr(cpu, "_unavailable", "the CPU extension is not built")  # test_cpu.py is about that
    monkeypatch.setattr(fla, "VERSION", None)


@pytest.fixture
def with_fla(monkeypatch):
    monkeypatch.setattr(fla, "VERSION", (0, 6))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def call(op="chunk_kda", device=GPU, dtype=torch.bfloat16, **others):
    return backends.Call(op, device, dtype, **others)


def run():
    x = torch.randn(1, 2, 1, 4)
    ops.chunk_kda(x, x, x, -x.abs(), x[..., 0].sigmoid())


def test_cpu_calls_get_pytorch():
    for op in backends.OPERATORS:
        assert backends.select(call(op, CPU)) == "torch"


def test_gpu_calls_without_extension_and_fla():
    assert backends.select(call()) == "torch"
    assert backends.select(call(requires_grad=True)) == "torch"


def test_gpu_calls_get_fla_where_installed(with_fla):
    assert backends.select(call()) == "fla"
    assert backends.select(call("recurrent_kda", requires_grad=True)) == "fla"
    assert backends.select(call("causal_conv1d", requires_grad=True)) == "fla"
    assert backends.select(call("causal_conv1d")) == backends.select(call("fwd")) == "torch"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": CPU}, "the tensors are on cpu"),
        ({"dtype": torch.float32}, "TF32"),
        ({"K": 512}, "512"),
        ({"V": 320}, "320"),
        ({"state_dtype": torch.bfloat16}, "initial state is torch.bfloat16"),
        ({"tokens": 0}, "no tokens"),
        ({"intermediate_states": True}, "intermediate states"),
        ({"state_pool": True}, "state_indices"),
        ({"op": "fwd"}, "no fwd"),
        ({"op": "causal_conv1d"}, "is for gradients"),
        ({"op": "causal_conv1d", "requires_grad": True, "conv_states": True}, "an initial or a final state"),
    ],
)
def test_fla_refuses(with_fla, change, reason):
    assert reason in backends.refusal("fla", call(**change))
    assert backends.select(call(**change)) == "torch"
    with pytest.raises(RuntimeError, match=f"backend='fla' cannot serve this call on c.*{reason}"):
        backends.select(call(**change), "fla")


def test_old_fla_is_refused(monkeypatch):
    monkeypatch.setattr(fla, "VERSION", (0, 5))
    assert "0.6 or newer" in backends.refusal("fla", call())


def test_fla_is_refused_where_it_would_read_on_the_host(with_fla, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "CUDA graph" in backends.refusal("fla", call(packed=True))
    assert backends.refusal("fla", call()) is None


def test_cuda_refuses_with_a_reason(monkeypatch):
    assert backends.refusal("cuda", call(device=CPU)) == "the tensors are on cpu"
    assert backends.refusal("cuda", call()) == "the CUDA extension is not built"
    monkeypatch.setattr(cuda, "_unavailable", None)
    assert "no backward" in backends.refusal("cuda", call(requires_grad=True))
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    assert backends.refusal("cuda", call()) == "FLA_FLASH_KDA=0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"K": 32}, "head dimensions are 32 and 128"),
        ({"V": 256}, "head dimensions are 128 and 256"),
        ({"mixed_dtypes": True}, "several dtypes"),
        ({"extension_refusal": "`q` is too large"}, "`q` is too large"),
    ],
)
def test_cuda_refuses_calls(monkeypatch, change, reason):
    monkeypatch.setattr(cuda, "_unavailable", None)
    assert reason in backends.refusal("cuda", call(**change))


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (9, 0)])
def test_cuda_refuses_other_devices(monkeypatch, capability):
    monkeypatch.setattr(cuda, "_unavailable", None)
    monkeypatch.setattr(cuda, "_refused_by_kernel", lambda *_: None)
    for name, value in (("is_available", True), ("get_device_capability", capability), ("get_device_name", "GPU X")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    if capability == cuda.CAPABILITY:
        assert backends.select(call()) == "cuda"
    else:
        with pytest.raises(RuntimeError, match=f"on cuda:0: GPU X is sm_{capability[0]}0, .*sm_90a"):
            backends.select(call(), "cuda")


def test_the_variable_does_not_bind_operators_that_the_extension_lacks(monkeypatch):
    monkeypatch.setenv("KDA_HF_BACKEND", "cuda")
    monkeypatch.setattr(cuda, "OPERATORS", ("chunk_kda",))
    assert backends.select(call(op="causal_conv1d")) == "torch"


@pytest.mark.skipif(not hasattr(torch.ops.kda_hf_cuda, "prefill_refusal"), reason="the CUDA extension is not built")
@pytest.mark.parametrize(
    "arguments, named",
    [
        ((128, 128, torch.bfloat16, torch.float32), None),
        ((64, 128, torch.float16, torch.bfloat16), None),
        ((128, 128, torch.float32, torch.float32), "`q`"),
        ((96, 128, torch.bfloat16, torch.float32), "`q`"),
        ((128, 32, torch.bfloat16, torch.float32), "`v`"),
        ((128, 128, torch.bfloat16, torch.float16), "`initial_state`"),
    ],
)
def test_what_the_extension_refuses(arguments, named):
    reason = torch.ops.kda_hf_cuda.prefill_refusal(*arguments)
    assert named in reason if named else reason == ""


def test_calls_go_unchecked_only_where_they_were_served(monkeypatch):
    x = torch.randn(1, 2, 1, 4)
    assert not cuda.serves_again("fwd", x)
    cuda.note_served("fwd", x)
    assert cuda.serves_again("fwd", x)
    assert not cuda.serves_again("chunk_kda", x) and not cuda.serves_again("fwd", x.tolist())
    for variable, value in (("FLA_FLASH_KDA", "0"), ("KDA_HF_BACKEND", "torch"), ("KDA_HF_CHECK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert not cuda.serves_again("fwd", x)
    monkeypatch.setenv("KDA_HF_BACKEND", "cuda")
    assert cuda.serves_again("fwd", x)


def test_extension_that_does_not_load(monkeypatch, tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cuda, "EXTENSION", broken)
    assert "does not load" in cuda._load()


def test_explicit_backend():
    assert backends.select(call(), "torch") == backends.select(call(), "auto") == "torch"
    with pytest.raises(ValueError, match="`backend` must be .*got 'triton'"):
        backends.select(call(), "triton")
    with pytest.raises(RuntimeError, match="chunk_kda: backend='cuda' cannot serve this call on cuda:0: .*not built"):
        backends.select(call(), "cuda")


def test_environment(monkeypatch, with_fla):
    monkeypatch.setenv("KDA_HF_BACKEND", "torch")
    assert backends.select(call()) == "torch"
    assert backends.select(call(), "fla") == "fla"
    monkeypatch.setenv("KDA_HF_BACKEND", "fla")
    assert backends.select(call()) == "fla"
    assert backends.select(call("causal_conv1d")) == "torch"  # without gradients
    with pytest.raises(RuntimeError, match="KDA_HF_BACKEND=fla .*on cpu"):
        run()
    monkeypatch.setenv("KDA_HF_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="KDA_HF_BACKEND=cuda .*on cpu"):
        run()
    assert backends.select(call(requires_grad=True)) == "fla"  # gradients go where there are some
    monkeypatch.setenv("KDA_HF_BACKEND", "triton")
    with pytest.raises(ValueError, match="KDA_HF_BACKEND must be .*got 'triton'"):
        run()


def test_log_lines_come_once(caplog):
    with caplog.at_level(logging.INFO, "kda_hf"):
        run()
        first = [record.getMessage() for record in caplog.records]
        run()
    assert first == [record.getMessage() for record in caplog.records] == [
        "chunk_kda: backend cuda refused: the tensors are on cpu",
        "chunk_kda: backend fla refused: the tensors are on cpu",
        "chunk_kda: backend torch serves the calls",
    ]  # fmt: skip


def test_log_says_once_that_gradients_change_the_backend(caplog, monkeypatch):
    monkeypatch.setattr(cuda, "_unavailable", None)
    with caplog.at_level(logging.INFO, "kda_hf"):
        for _ in range(2):
            backends.select(call(requires_grad=True))
    assert sum("inputs require grad" in record.getMessage() for record in caplog.records) == 1


def test_report(monkeypatch):
    report = ops.backend_report("recurrent_kda", device="cpu", dtype=torch.float32, K=64, V=64, requires_grad=True)
    assert [row["backend"] for row in report] == ["cuda", "fla", "torch"]
    assert [row["usable"] for row in report] == [False, False, True]
    assert all(row["usable"] == (row["reason"] == "") for row in report)
    assert [row["backend"] for row in ops.backend_report() if row["usable"]] == ["torch"]
    with pytest.raises(ValueError, match="`op`"):
        ops.backend_report("softmax")
    monkeypatch.setenv("KDA_HF_BACKEND", "cuda")
    assert not any(row["usable"] for row in ops.backend_report(device="cpu"))


def test_report_with_fla(with_fla, monkeypatch):
    assert [row["backend"] for row in ops.backend_report(device="cuda") if row["usable"]] == ["fla", "torch"]
    monkeypatch.setenv("KDA_HF_BACKEND", "torch")
    reasons = {row["backend"]: row["reason"] for row in ops.backend_report(device="cuda")}
    assert reasons["fla"] == "KDA_HF_BACKEND=torch" and reasons["torch"] == ""
