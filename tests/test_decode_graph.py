"""Decode steps at fixed places, as a CUDA graph replays them: what the modules compute, whatever the cache holds."""

import copy
import gc
import weakref

import pytest
import torch

from kda_hf import KDACache, decode_graph, decoding


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
FITS = {"linear_head_dim": 64, "head_dim": 64, "hidden_size": 64}  # widths that there are kernels for


class Recorded:
    """In place of a CUDA graph, where there is none: the same calls, and results in the same place."""

    def __init__(self, program, cache, capacity, records):
        self.buffers = decode_graph.DecodeBuffers(program, cache, capacity)
        self.program, self.graph, self.nbytes = program, self, self.buffers.nbytes
        self.records, self.recorded = records, {} if records else None
        self.logits = self.buffers.tokens.new_full((cache.batch_size, len(program.head)), -1).to(program.head.dtype)

    def replay(self):
        with torch.no_grad():
            self.logits.copy_(self.program.step(self.buffers, self.recorded))


@pytest.fixture(autouse=True)
def everywhere(monkeypatch, device):
    monkeypatch.setattr("kda_hf.modeling_kda.KimiDeltaAttention.steps_at_once", lambda *_: True)
    if device.type == "cpu":
        monkeypatch.setattr(decode_graph, "DecodeGraph", Recorded)
        monkeypatch.setattr(decode_graph, "has_graphs", lambda device: True)
        monkeypatch.setattr(decode_graph, "_memory_of", lambda device: 2**34)


@pytest.fixture
def model(any_model):
    return any_model


@pytest.fixture
def hybrid(tiny_model):
    return tiny_model()


def prefilled(model, ids, mask=None, positions=None, max_rollback=0):
    cache = KDACache(model.config, max_rollback=max_rollback)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


def prompt(model, batch=2, length=9):
    return torch.randint(3, 97, (batch, length), device=model.device)


def stepper_of(model, cache, mask=None, positions=None, keeps_cache=True, max_steps=None):
    program = decoding.program_of(model)
    stepper = decode_graph.graph_stepper(program, cache, keeps_cache, mask, positions, max_steps)
    assert stepper is not None
    return stepper


def run_beside_modules(model, batch=2, steps=12, padded=False, tolerance=1e-4):
    ids, mask, positions = prompt(model, batch), None, None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected, cache = (prefilled(model, ids, mask, positions) for _ in range(2))
    stepper = stepper_of(model, cache, mask, positions)
    for token in prompt(model, batch, steps).unbind(1):
        if padded:
            mask, positions = torch.cat([mask, mask.new_ones(batch, 1)], 1), positions[:, -1:] + 1
        with torch.no_grad():
            logits = model(
                token[:, None], attention_mask=mask, position_ids=positions, past_key_values=expected
            ).logits[:, -1]
        torch.testing.assert_close(stepper.step(token), logits, rtol=tolerance, atol=tolerance)
    stepper.finish()
    assert cache.get_seq_length() == expected.get_seq_length() == ids.shape[1] + steps
    for one, other in zip(cache.layers, expected.layers, strict=True):
        for name in ("conv_states", "recurrent_states") if hasattr(one, "conv_states") else ("keys", "values"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_is_what_the_modules_compute(model, batch, padded):
    run_beside_modules(model, batch, padded=padded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 8, 9, 40])
@pytest.mark.parametrize("others", [{}, ROPE, {"linear_head_dim": 128}], ids=["64", "64 with rope", "128"])
def test_widths_of_kernels(tiny_model, relative_error, dtype, batch, others):
    """As close to the same model in fp32 as its modules are."""
    model = tiny_model(**FITS | others).to(dtype)
    exact = copy.deepcopy(model).float()
    ids = prompt(model, batch)
    cache, by_modules, exactly = prefilled(model, ids), prefilled(model, ids), prefilled(exact, ids)
    stepper, logits = stepper_of(model, cache), ([], [], [])
    for token in prompt(model, batch, 12).unbind(1):
        logits[0].append(stepper.step(token).float().clone())
        with torch.no_grad():
            logits[1].append(model(token[:, None], past_key_values=by_modules).logits[:, -1].float())
            logits[2].append(exact(token[:, None], past_key_values=exactly).logits[:, -1])
    stepper.finish()
    ours, theirs, expected = (torch.stack(own) for own in logits)
    slack = 1e-4 if dtype == torch.float32 else 1e-3
    assert relative_error(ours, expected) < 1.5 * relative_error(theirs, expected) + slack
    for one, other in zip(cache.layers, exactly.layers, strict=True):
        for name in ("recurrent_states",) if hasattr(one, "conv_states") else ("keys", "values"):
            x, y = getattr(one, name), getattr(other, name)
            x, y = (x, y) if isinstance(x, torch.Tensor) else (x[0], y[0])
            assert relative_error(x, y) < (1e-4 if dtype == torch.float32 else 0.15)


def test_a_step_compiles_without_graph_breaks(tiny_model):
    """`scripts/bench_generate.py` compares our steps with that."""
    model = tiny_model(**FITS, **ROPE)
    program, ids, buffers = decoding.program_of(model), prompt(model), []
    for cache in (prefilled(model, ids), prefilled(model, ids)):
        buffers.append(decode_graph.DecodeBuffers(program, cache, capacity=16))
        buffers[-1].load(cache, None, None)
    compiled = torch.compile(program.step, fullgraph=True, backend="aot_eager", dynamic=False)
    for token in prompt(model, length=3).unbind(1):
        for own in buffers:
            own.tokens.copy_(token)
        with torch.no_grad():
            torch.testing.assert_close(compiled(buffers[0]), program.step(buffers[1]), rtol=1e-4, atol=1e-4)


def test_capacity_grows(hybrid, monkeypatch):
    monkeypatch.setattr(decode_graph.GraphStepper, "_capacity", lambda self: self.length + 2)
    run_beside_modules(hybrid)
    run_beside_modules(hybrid, padded=True)


@pytest.mark.parametrize("length, most", [(9, None), (9, 12), (1000, 10**6), (5000, None), (70000, 70001), (65536, 1)])
def test_capacity(hybrid, length, most):
    stepper = decode_graph.GraphStepper.__new__(decode_graph.GraphStepper)
    stepper.has_keys, stepper.length, stepper.most = True, length, most
    capacity = stepper._capacity()
    assert capacity > length
    assert capacity <= 1.25 * max(length + 1, min(length * 1.5 + 1024, most or 10**9)) + 256


def test_goes_on_with_the_cache(hybrid):
    """A second turn starts where the first ended, by modules as well as by graph."""
    ids, more = prompt(hybrid), prompt(hybrid, length=6)
    expected, cache = prefilled(hybrid, ids), prefilled(hybrid, ids)
    for _ in range(2):
        stepper = stepper_of(hybrid, cache)
        for token in more.unbind(1):
            stepper.step(token)
        stepper.finish()
        with torch.no_grad():
            hybrid(more, past_key_values=expected)
            last = [hybrid(ids, past_key_values=own).logits for own in (cache, expected)]
        torch.testing.assert_close(*last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 7, 8, 9, 15, 16, 17, 24, 30])
@pytest.mark.parametrize("length", [1, 5, 20])
def test_history(model, steps, length):
    """As many tokens as ever can be cropped, whether they came by graph or before."""
    rollback, ids, more = 8, prompt(model, length=length), prompt(model, length=steps)
    new = prompt(model, length=3)
    for removed in {min(most, steps + length - 1) for most in (1, rollback // 2, rollback)}:
        cache, kept = prefilled(model, ids, max_rollback=rollback), torch.cat([ids, more], 1)[:, :-removed]
        stepper = stepper_of(model, cache)
        for token in more.unbind(1):
            stepper.step(token)
        stepper.finish()
        assert cache.get_seq_length() == length + steps
        assert all(layer.removable_tokens >= removed for layer in cache.layers if hasattr(layer, "records"))
        cache.crop(-removed)
        expected = prefilled(model, kept)
        with torch.no_grad():
            actual = model(new, past_key_values=cache).logits
            torch.testing.assert_close(actual, model(new, past_key_values=expected).logits, rtol=2e-4, atol=2e-4)


def test_history_over_several_turns(model):
    seen = prompt(model)
    cache = prefilled(model, seen, max_rollback=8)
    for steps, removed in ((3, 2), (20, 7), (5, 0), (1, 8)):
        more, stepper = prompt(model, length=steps), stepper_of(model, cache)
        for token in more.unbind(1):
            stepper.step(token)
        stepper.finish()
        seen = torch.cat([seen, more], 1)
        if removed:
            cache.crop(-removed)
            seen = seen[:, :-removed]
    new, expected = prompt(model, length=2), prefilled(model, seen)
    with torch.no_grad():
        logits = [model(new, past_key_values=own).logits for own in (cache, expected)]
    torch.testing.assert_close(*logits, rtol=2e-4, atol=2e-4)


def test_a_cache_that_nobody_keeps_is_emptied(hybrid):
    cache = prefilled(hybrid, prompt(hybrid))
    before = cache.nbytes
    stepper = stepper_of(hybrid, cache, keeps_cache=False)
    stepper.step(prompt(hybrid)[:, 0])
    stepper.finish()
    assert cache.nbytes < before


def test_graphs_are_kept_and_bounded(hybrid):
    program = decoding.program_of(hybrid)
    for _ in range(3):
        run_beside_modules(hybrid, steps=2)
    assert len(program.graphs.idle) == 1
    for batch in range(1, 12):
        run_beside_modules(hybrid, batch, steps=1)
    assert len(program.graphs.idle) == program.graphs.idle.most
    program.graphs.idle.PART_OF_MEMORY = 0
    run_beside_modules(hybrid, steps=1)
    assert not len(program.graphs.idle)


def test_without_memory_for_a_graph(hybrid, monkeypatch):
    """What is kept goes, and decoding goes on without a graph."""

    def fails(*args):
        raise torch.OutOfMemoryError("there is none")

    run_beside_modules(hybrid, steps=1)
    program, cache = decoding.program_of(hybrid), prefilled(hybrid, prompt(hybrid, 4))
    monkeypatch.setattr(decode_graph, "DecodeGraph", fails)
    assert len(program.graphs.idle) == 1
    assert decode_graph.graph_stepper(program, cache, True, None, None, None) is None
    assert not len(program.graphs.idle) and cache.get_seq_length() == 9


def test_calls_of_many_shapes_leave_little(hybrid):
    """What a hundred calls leave is what the kept graphs have, and goes with the model."""
    hybrid.generation_config.update(pad_token_id=0, eos_token_id=None)
    program, used = decoding.program_of(hybrid), []
    for call in range(100):
        length = 1 + call * 7 % 40
        hybrid.generate(prompt(hybrid, 1 + call % 11, length), max_new_tokens=3, do_sample=call % 2 == 0)
        if call >= 40 and hybrid.device.type == "cuda":
            gc.collect()
            used.append(torch.cuda.memory_allocated())
    assert decoding.program_of(hybrid) is program and len(program.graphs.idle) == program.graphs.idle.most
    assert not used or max(used[-20:]) <= max(used[:20]) * 1.02 + 2**20


def test_two_at_a_time_have_graphs_of_their_own(hybrid):
    caches = [prefilled(hybrid, prompt(hybrid)) for _ in range(2)]
    expected = [copy.deepcopy(cache) for cache in caches]
    steppers = [stepper_of(hybrid, cache) for cache in caches]
    for token in prompt(hybrid, length=5).unbind(1):
        for stepper, cache in zip(steppers, expected, strict=True):
            with torch.no_grad():
                logits = hybrid(token[:, None], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(stepper.step(token), logits, rtol=1e-4, atol=1e-4)
    for stepper in steppers:
        stepper.finish()


def test_other_weights_have_another_program(hybrid, monkeypatch):
    program = decoding.program_of(hybrid)
    assert decoding.program_of(hybrid) is program
    monkeypatch.setenv("KDA_HF_BACKEND", "torch")
    assert decoding.program_of(hybrid) is not program
    monkeypatch.delenv("KDA_HF_BACKEND")
    program = decoding.program_of(hybrid)
    hybrid.model.layers[0].mlp.down_proj.weight.data = hybrid.model.layers[0].mlp.down_proj.weight.data * 2
    assert decoding.program_of(hybrid) is not program
    run_beside_modules(hybrid)
    with torch.no_grad():  # in place: read where it is
        hybrid.model.layers[0].linear_attn.q_proj.weight.mul_(2)
    run_beside_modules(hybrid)


def test_model_is_not_kept(tiny_model):
    model = tiny_model()
    run_beside_modules(model, steps=1)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("reason", ["bias", "static", "dynamic rope", "right padding", "mask"])
def test_refusals(tiny_model, reason):
    changes = {
        "bias": {"attention_bias": True},
        "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    }
    model = tiny_model(**changes.get(reason, {}))
    cache = KDACache(model.config, max_rollback=0, max_cache_len=64 if reason == "static" else None)
    with torch.no_grad():
        model(prompt(model), past_key_values=cache)
    mask = None
    if reason in ("right padding", "mask"):
        mask = torch.ones(2, 9 if reason == "right padding" else 7, dtype=torch.long, device=model.device)
        mask[0, -2:] = reason == "mask"
    program = decoding.program_of(model)
    assert decode_graph.graph_stepper(program, cache, True, mask, None, None) is None
