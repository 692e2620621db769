"""The scripts in `examples/`: they run as they stand, and what they serve is what `generate()` gives."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kda_hf import KDAForCausalLM


EXAMPLE = Path(__file__).parent.parent / "examples" / "continuous_batching.py"
_spec = importlib.util.spec_from_file_location("continuous_batching", EXAMPLE)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

MODELS = {
    "safe": {},
    "softplus": {"linear_lower_bound": None},
    "grouped values": {"linear_num_value_heads": 4, "linear_value_head_dim": 8, "allow_neg_eigval": True},
    "widths with kernels": {"linear_head_dim": 64},
}
SLOTS = 3
# (step of arrival, tokens of the prompt, tokens to generate)
REQUESTS = [(0, 9, 12), (0, 130, 5), (2, 1, 20), (3, 48, 1), (3, 70, 9), (9, 33, 7), (40, 5, 4), (41, 97, 6)]
NEW_TOKENS = [new for _, _, new in REQUESTS]
POISON = 0x7FC12345  # a NaN of fp32 that no arithmetic makes


def test_runs_as_a_script(tmp_path):
    command = [sys.executable, "-P", EXAMPLE]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 10 and "slot 2" in result.stdout


@pytest.fixture(params=MODELS)
def model(request, tiny_config, device):
    """With the same weights each time, for which no two tokens are equally good: see `alone`."""
    torch.manual_seed(3)
    pure = {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2}
    model = KDAForCausalLM(tiny_config(**pure, **MODELS[request.param])).to(device).eval()
    model.generation_config.update(pad_token_id=0, do_sample=False)
    return model


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for _, length, _ in REQUESTS]


def alone(model, prompts, new_tokens):
    """What `generate()` gives for each request by itself. Before a graph is captured: it joins weights in memory."""
    expected = []
    for prompt, new in zip(prompts, new_tokens, strict=True):
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(ids, max_new_tokens=new, output_logits=True, return_dict_in_generate=True)
        best = torch.cat(output.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3  # else rounding decides
        expected.append(output.sequences[0, len(prompt) :].tolist())
    return expected


def serve(scheduler, prompts):
    """
    The requests, after all have come and gone, and the slots that each had. Slots without a request hold poison, which
    has to stay as it is.
    """
    requests = [example.Request(prompt, new) for prompt, new in zip(prompts, NEW_TOKENS, strict=True)]
    slots, step = {request: set() for request in requests}, 0
    pools = [pool.view(torch.int32) for pool in (scheduler.conv_pool, scheduler.state_pool)]
    while step <= REQUESTS[-1][0] or scheduler.waiting or scheduler.running:
        scheduler.waiting += [request for request, (at, _, _) in zip(requests, REQUESTS, strict=True) if at == step]
        for pool in pools:
            pool[:, scheduler.free] = POISON
        had_slot = [*scheduler.step(), *scheduler.running]
        for request in had_slot:
            slots[request].add(request.slot)
        others = sorted(set(range(SLOTS)) - {request.slot for request in had_slot})
        assert all((pool[:, others] == POISON).all() for pool in pools)
        step += 1
    return requests, slots


@pytest.mark.supports("continuous batching", model="kda_hf")
def test_each_request_gets_the_tokens_it_would_get_alone(model, prompts):
    expected = alone(model, prompts, NEW_TOKENS)
    scheduler = example.Scheduler(model, SLOTS)
    assert not scheduler.conv_pool.any() and not scheduler.state_pool.any()  # it has decoded empty rows by now
    if model.device.type == "cuda":
        assert isinstance(scheduler.decode.__self__, torch.cuda.CUDAGraph)
    requests, slots = serve(scheduler, prompts)
    assert [request.tokens for request in requests] == expected
    assert all(len(had) == 1 for had in slots.values()) and set.union(*slots.values()) == set(range(SLOTS))
    assert sorted(scheduler.free) == list(range(SLOTS))


def test_a_request_ends_with_the_end_of_sequence_token(model, prompts):
    end = alone(model, prompts, NEW_TOKENS)[2][5]
    model.generation_config.eos_token_id = model.config.eos_token_id = end
    expected = alone(model, prompts, NEW_TOKENS)
    assert any(len(tokens) < new for tokens, new in zip(expected, NEW_TOKENS, strict=True))
    requests, _ = serve(example.Scheduler(model, SLOTS), prompts)
    assert [request.tokens for request in requests] == expected


def test_a_copied_slot_is_a_cached_prefix(model, prompts):
    prefix, others = prompts[1], prompts[2:5]
    expected = alone(model, [prefix + other for other in others], [8, 8, 8])
    scheduler = example.Scheduler(model, slots=4)
    cached = example.Request(prefix, max_new_tokens=1)
    scheduler.waiting.append(cached)
    scheduler.step()
    scheduler.free.remove(cached.slot)  # keeps it
    requests = [example.Request(other, max_new_tokens=8, slot=scheduler.free.pop()) for other in others]
    for request in requests:
        for pool in (scheduler.conv_pool, scheduler.state_pool):
            pool[:, request.slot] = pool[:, cached.slot]
        tokens = torch.tensor([request.prompt], device=model.device)
        slots, bounds = (tokens.new_tensor(x) for x in ([request.slot], [0, len(request.prompt)]))
        request.tokens += scheduler.forward(tokens, slots, bounds).tolist()
        scheduler.running.append(request)
    while scheduler.running:
        scheduler.step()
    assert [request.tokens for request in requests] == expected
