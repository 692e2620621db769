"""The program for decode steps: what the modules compute, and the model stays what it is."""

import contextlib
import copy
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kda_hf import KDACache, KDAForCausalLM, decode_graph, decoding, generation
from kda_hf.ops import cpu_rows, kda_decode_step, rows, sampling


NEW = 16


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """On a GPU, widths this small have no kernel, and `generate()` has graphs, which test_decode_graph.py is about."""
    monkeypatch.setattr("kda_hf.modeling_kda.KimiDeltaAttention.steps_at_once", lambda *_: True)
    monkeypatch.setattr(decode_graph, "has_graphs", lambda device: False)


@pytest.fixture
def model(any_model):
    return any_model


@pytest.fixture
def hybrid(tiny_model):
    return tiny_model()


@pytest.fixture
def counted(monkeypatch):
    """The forwards that programs have served."""
    calls = []
    serve = decoding.DecodeProgram.__call__

    def count(*args):
        logits = serve(*args)
        if logits is not None:
            calls.append(args)
        return logits

    monkeypatch.setattr(decoding.DecodeProgram, "__call__", count)
    return calls


def prompt(model, batch=2, length=9):
    return torch.randint(3, 97, (batch, length), device=model.device)


def generate(model, ids, **others):
    output = model.generate(
        ids,
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | others,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits)


def by_modules(model, ids, **others):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "decode_program", contextlib.nullcontext)
        return generate(model, ids, **others)


def assert_same(actual, expected, **tolerance):
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], **tolerance or {"rtol": 1e-4, "atol": 1e-4})


def assert_serves(model, counted, ids=None, **others):
    ids = prompt(model) if ids is None else ids
    expected = by_modules(model, ids, **others)
    assert not counted
    assert_same(generate(model, ids, **others), expected)
    assert len(counted) == NEW - 1
    counted.clear()


def assert_refuses(model, counted):
    ids = prompt(model)
    assert_same(generate(model, ids), by_modules(model, ids))
    assert not counted


@pytest.mark.parametrize("batch", [1, 3])
def test_is_what_the_modules_compute(model, batch, counted):
    assert_serves(model, counted, prompt(model, batch))


LOW_RANK_ARGUMENTS = [
    "q", "k", "v", "g", "beta", "output_gate", "scale", "out", "A_log", "dt_bias", "lower_bound", "recurrent_state",
    "conv_state", "q_conv_weight", "k_conv_weight", "v_conv_weight", "norm_weight", "norm_eps", "state_indices",
    "allow_neg_eigval", "state_v_first", "g_weight", "output_gate_weight",
]  # fmt: skip


def test_what_the_low_rank_step_is_given(tiny_model, counted, monkeypatch):
    """With the operator in the place of the kernel that has second layers besides, a program computes the same."""
    calls = []

    def decode_step(*arguments):
        given = dict(zip(LOW_RANK_ARGUMENTS, arguments, strict=True))
        calls.append(len(given["q"]))
        for name in ("g", "output_gate"):
            weight = given.pop(f"{name}_weight")
            given[name] = F.linear(given[name].flatten(1), weight).view(given["v"].shape)
        given.pop("out").copy_(kda_decode_step(**given))

    if hasattr(torch.ops.kda_hf_cuda, "decode_step"):  # the extension is there
        arguments = torch.ops.kda_hf_cuda.decode_step.default._schema.arguments
        assert [argument.name for argument in arguments] == LOW_RANK_ARGUMENTS
    monkeypatch.setattr(torch.ops, "kda_hf_cuda", types.SimpleNamespace(decode_step=decode_step))
    monkeypatch.setattr(cpu_rows, "refusal", lambda *_: "PyTorch's is asked for")
    monkeypatch.setattr(sampling, "refusal", lambda _: "the extension has one operator")
    monkeypatch.setattr(rows.TorchRows, "low_rank_step", rows.KernelRows.low_rank_step)
    for options in ({}, {"linear_lower_bound": None, "allow_neg_eigval": True}):
        model = tiny_model(linear_head_dim=128, **options)
        assert_serves(model, counted)
        layers = model.config.layer_types.count("linear_attention")
        assert calls == [2] * (NEW - 1) * layers
        calls.clear()
    for options in ({"linear_num_value_heads": 4}, {"linear_value_head_dim": 64}, {"linear_conv_kernel_dim": 3}):
        assert_serves(tiny_model(linear_head_dim=128, **options), counted)
        assert not calls
    generate(model, prompt(model), past_key_values=KDACache(model.config))  # which keeps a history
    assert not calls


def test_states_are_those_of_the_modules(model):
    ids, caches = prompt(model), [KDACache(model.config, max_rollback=0) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
        for token in prompt(model, length=20).split(1, 1):
            expected = model(token, past_key_values=caches[0]).logits
            with decoding.decode_program(model):
                actual = model(token, past_key_values=caches[1]).logits
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("conv_states", "recurrent_states") if hasattr(one, "conv_states") else ("keys", "values"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-4, atol=1e-4)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 29


def test_history_is_that_of_the_modules(model):
    """What the program has fed can be cropped."""
    ids, caches = prompt(model), [KDACache(model.config, max_rollback=8) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
        for step, token in enumerate(prompt(model, length=30).split(1, 1)):
            logits = [model(token, past_key_values=caches[0]).logits]
            with decoding.decode_program(model):
                logits.append(model(token, past_key_values=caches[1]).logits)
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
            if step % 7 == 6:
                for cache in caches:
                    cache.crop(-(step % 5 + 1))
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 3},
        {"min_new_tokens": NEW, "repetition_penalty": 1.3},
    ],
)
def test_modes(hybrid, mode, counted):
    ids = prompt(hybrid)
    if "num_beams" in mode:  # whose logits are of beams in another order where two are alike
        expected = by_modules(hybrid, ids, **mode)[0]
        assert torch.equal(generate(hybrid, ids, **mode)[0], expected) and counted
    else:
        assert_serves(hybrid, counted, ids, **mode)


def test_left_padding(hybrid, counted):
    ids = prompt(hybrid)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    assert_serves(hybrid, counted, ids, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(hybrid, dtype, counted):
    hybrid.to(dtype)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    token, ids = prompt(hybrid, length=1), prompt(hybrid)
    logits = []
    for program in (contextlib.nullcontext(), decoding.decode_program(hybrid)):
        cache = KDACache(hybrid.config, max_rollback=0)
        with torch.no_grad(), program:
            hybrid(ids, past_key_values=cache)
            logits.append(hybrid(token, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, **tolerance)
    assert len(counted) == 1


def test_autocast(hybrid, counted, relative_error):
    token, ids = prompt(hybrid, length=1), prompt(hybrid)
    logits = []
    for program in (contextlib.nullcontext(), decoding.decode_program(hybrid)):
        cache = KDACache(hybrid.config, max_rollback=0)
        with torch.no_grad(), program, torch.autocast(hybrid.device.type, torch.bfloat16):
            hybrid(ids, past_key_values=cache)
            logits.append((hybrid(token, past_key_values=cache).logits, cache.layers[0].recurrent_states[0]))
    for actual, expected in zip(*logits, strict=True):
        assert relative_error(actual, expected) < 1e-3
    assert len(counted) == 1


def test_only_within_generate_and_for_plain_steps(hybrid, counted):
    ids, cache = prompt(hybrid), KDACache(hybrid.config, max_rollback=0)
    generate(hybrid, ids)
    counted.clear()
    with torch.no_grad():
        hybrid(ids, past_key_values=cache)
        hybrid(ids[:, :1], past_key_values=cache)
        assert not counted
        with decoding.decode_program(hybrid):
            assert hybrid(ids[:, :1], past_key_values=cache, output_hidden_states=True).hidden_states is not None
            assert hybrid(ids[:, :1], past_key_values=cache, labels=ids[:, :1]).loss is not None
            hybrid(inputs_embeds=hybrid.get_input_embeddings()(ids[:, :1]), past_key_values=cache)
            hybrid(ids[:, :2], past_key_values=cache)
            hybrid(ids[:, :1])
            hybrid(ids[:, :1], past_key_values=KDACache(hybrid.config))  # has no token yet
            assert not counted
            hybrid(ids[:, :1], past_key_values=cache)
            assert len(counted) == 1
    with decoding.decode_program(hybrid):  # with gradients
        hybrid(ids[:, :1], past_key_values=cache)
    assert len(counted) == 1


def test_hidden_states_are_still_captured(hybrid, counted):
    output = hybrid.generate(
        prompt(hybrid), max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    )
    assert len(output.hidden_states) == 3 and not counted
    assert_serves(hybrid, counted)  # the hooks of that call stay, and do nothing


def _hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def _pre_hook(model):
    model.model.layers[1].linear_attn.q_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _hook_in_attention(model):
    model.model.layers[3].self_attn.v_proj.register_forward_hook(lambda module, args, output: 2 * output)


def _adapter_in_attention(model):
    attention = model.model.layers[3].self_attn
    attention.o_proj = nn.Sequential(attention.o_proj, nn.Tanh())


def _other_class(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = Doubled


def _own_forward(model):
    module = model.model.norm
    plain = module.forward
    module.forward = lambda x: 2 * plain(x)


def _bias(model):
    module = model.model.layers[0].mlp.up_proj
    module.bias = nn.Parameter(torch.ones(module.out_features, device=model.device))


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)


def _sequential(model):
    mlp = model.model.layers[0].mlp
    mlp.gate_proj = nn.Sequential(mlp.gate_proj, nn.LeakyReLU())


def _training(model):
    model.train()


@pytest.mark.parametrize(
    "change",
    [
        _hook,
        _pre_hook,
        _hook_in_attention,
        _adapter_in_attention,
        _other_class,
        _own_forward,
        _bias,
        _parametrized,
        _sequential,
        _training,
    ],
)
def test_changed_models_are_decoded_by_their_modules(hybrid, change, counted):
    change(hybrid)
    assert_refuses(hybrid, counted)


def test_global_hooks(hybrid, counted):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert_refuses(hybrid, counted)
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------- weights that have been joined


def test_the_model_stays_what_it_is(hybrid, counted, tmp_path):
    before = copy.deepcopy(hybrid)
    ids = prompt(hybrid)
    expected = generate(hybrid, ids)
    q, k = (getattr(hybrid.model.layers[0].linear_attn, f"{name}_proj").weight for name in "qk")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert hybrid.state_dict().keys() == before.state_dict().keys()
    assert all(
        torch.equal(x, y) for x, y in zip(hybrid.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert [name for name, _ in hybrid.named_parameters()] == [name for name, _ in before.named_parameters()]

    hybrid.save_pretrained(tmp_path / "saved")
    torch.save(hybrid.state_dict(), tmp_path / "weights")
    loaded = KDAForCausalLM.from_pretrained(tmp_path / "saved").to(hybrid.device)
    before.load_state_dict(torch.load(tmp_path / "weights"))
    for other in (loaded, before, copy.deepcopy(hybrid)):
        assert_same(generate(other, ids), expected)
    size = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
    assert size < 1.1 * sum(x.nbytes for x in hybrid.parameters()) + 50_000


def test_new_values_are_seen(hybrid, counted):
    ids = prompt(hybrid)
    generate(hybrid, ids)
    counted.clear()
    layer = hybrid.model.layers[0]
    changes = [
        lambda: hybrid.load_state_dict({name: x + 0.01 for name, x in hybrid.state_dict().items()}),
        hybrid.double,
        hybrid.float,
        layer.linear_attn.k_proj.reset_parameters,
        lambda: setattr(layer.mlp.up_proj, "weight", nn.Parameter(torch.rand(48, 32, device=ids.device))),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        assert_serves(hybrid, counted, ids)


def test_training_goes_on(hybrid, counted):
    ids = prompt(hybrid)
    optimizer = torch.optim.AdamW(hybrid.parameters(), lr=1e-2)
    alone = copy.deepcopy(hybrid)
    optimizers = [optimizer, torch.optim.AdamW(alone.parameters(), lr=1e-2)]
    for step in range(3):
        for model, own in zip((hybrid, alone), optimizers, strict=True):
            own.zero_grad()
            model(ids, labels=ids).loss.backward()
            own.step()
        if step == 1:
            assert_serves(hybrid, counted, ids)
    for x, y in zip(hybrid.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(x, y)
    assert_serves(hybrid, counted, ids)


@pytest.mark.parametrize("shared", ["parameter", "memory", "across layers", "part of more"])
def test_shared_weights_stay_shared(hybrid, shared, counted):
    first, second = (layer.linear_attn for layer in hybrid.model.layers[:2])
    if shared == "parameter":
        first.k_proj.weight = first.q_proj.weight
    elif shared == "memory":
        first.k_proj.weight.data = first.q_proj.weight.data
    elif shared == "across layers":
        second.q_proj.weight.data = first.q_proj.weight.data
    else:
        more = torch.randn(33, 33, device=hybrid.device)
        first.q_proj.weight.data = more[:32, :32].contiguous().new_empty(64, 32)[:32].copy_(more[:32, :32])
    assert_serves(hybrid, counted)
    with torch.no_grad():
        first.q_proj.weight.mul_(0.5)
    other = {"parameter": first.k_proj, "memory": first.k_proj, "across layers": second.q_proj}.get(shared)
    assert other is None or torch.equal(other.weight, first.q_proj.weight)
    assert_serves(hybrid, counted)


def test_threads(hybrid, counted):
    ids = [prompt(hybrid) for _ in range(4)]
    expected = [by_modules(hybrid, x) for x in ids]
    results = [None] * len(ids)

    def run(index):
        results[index] = generate(hybrid, ids[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, wanted in zip(results, expected, strict=True):
        assert_same(result, wanted)
    assert len(counted) == len(ids) * (NEW - 1)


def test_inference_mode(hybrid, counted):
    with torch.inference_mode():
        assert_serves(hybrid, counted)
    assert_serves(hybrid, counted)
