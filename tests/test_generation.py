"""generate() in every mode, with our cache: each way of decoding gives the tokens of the plain way."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import CompileConfig, TextIteratorStreamer, set_seed
from transformers.generation.streamers import BaseStreamer

from kda_hf import KDACache, generation, layer, modeling_kda, ops


PURE_KDA = {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2}
NEW = 24


@pytest.fixture(params=["hybrid", "pure", "rope", "softplus"])
def model(request, tiny_model):
    overrides = {
        "hybrid": {},
        "pure": PURE_KDA,
        "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "softplus": {"linear_lower_bound": None},
    }[request.param]
    model = tiny_model(pad_token_id=0, bos_token_id=1, eos_token_id=2, **overrides)
    model.generation_config.update(pad_token_id=0, eos_token_id=None, max_new_tokens=NEW, do_sample=False)
    return model


def prompt(model, batch=1, length=11):
    return torch.randint(3, 97, (batch, length), device=model.device)


@torch.no_grad()
def recomputed(model, sequences, length, mask=None):
    """The logits of each token after the first `length`, without any cache; `mask` is the one of those first tokens."""
    mask = torch.ones_like(sequences[:, :length]) if mask is None else mask
    mask = F.pad(mask, (0, sequences.shape[1] - 1 - length), value=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    output = model(sequences[:, :-1], attention_mask=mask, position_ids=positions, use_cache=False)
    return output.logits[:, length - 1 :]


def assert_continue(sequences, prompts, new=NEW):
    length = prompts.shape[1]
    assert sequences.shape == (len(prompts), length + new) and torch.equal(sequences[:, :length], prompts)


def assert_greedy(model, sequences, ids, mask=None, new=NEW):
    """
    Each token is the best one, judged without a cache.

    Plain decoding gives the same tokens, unless a random model finds two of them equally good, up to rounding: either
    is right then, and what follows differs.
    """
    assert_continue(sequences, ids, new)
    length = ids.shape[1]
    logits = recomputed(model, sequences, length, mask)
    chosen = logits.gather(-1, sequences[:, length:, None])[..., 0]
    torch.testing.assert_close(chosen, logits.amax(-1), rtol=0, atol=1e-4)


def assert_beams(model, output, ids, returned=1):
    """The score of each beam is the one that its tokens have, judged without a cache."""
    assert_continue(output.sequences, ids.repeat_interleave(returned, dim=0))
    length = ids.shape[1]
    scores = recomputed(model, output.sequences, length).log_softmax(-1)
    scores = scores.gather(-1, output.sequences[:, length:, None]).sum((1, 2))
    torch.testing.assert_close(output.sequences_scores, scores / NEW, rtol=0, atol=1e-4)
    assert len({tuple(tokens.tolist()) for tokens in output.sequences}) == returned * len(ids)


def assert_sampled(model, ids, returned=1, new_cache=lambda: None):
    """Tokens are drawn from the logits that there are without a cache, the same ones for the same seed."""
    settings = {"do_sample": True, "num_return_sequences": returned, "output_logits": True}
    sequences = []
    for _ in range(2):
        set_seed(7)
        output = model.generate(ids, past_key_values=new_cache(), return_dict_in_generate=True, **settings)
        sequences.append(output.sequences)
    assert_continue(output.sequences, ids.repeat_interleave(returned, dim=0))
    expected = recomputed(model, output.sequences, ids.shape[1])
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-4)
    assert torch.equal(*sequences)
    assert len({tuple(tokens.tolist()) for tokens in output.sequences}) > 1


@pytest.mark.supports("greedy", model="kda_hf")
def test_greedy_equals_recomputing_everything(model):
    ids = prompt(model, batch=2)
    assert_greedy(model, model.generate(ids), ids)
    assert_greedy(model, model.generate(ids, use_cache=False), ids)


@pytest.mark.parametrize("mode", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}, {"use_cache": False}])
def test_steps_of_one_call_change_nothing(model, monkeypatch, mode):
    ids = prompt(model, batch=1 if "prompt_lookup_num_tokens" in mode else 3)
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | mode
    monkeypatch.setattr(generation, "decode_program", contextlib.nullcontext)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_kda.KimiDeltaAttention, "_steps", lambda *_: False)
        expected = model.generate(ids, **options)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return ops.kda_decode_step(*args, **kwargs)

    monkeypatch.setattr(modeling_kda.KimiDeltaAttention, "steps_at_once", lambda *_: True)
    monkeypatch.setattr(layer, "kda_decode_step", counted)
    actual = model.generate(ids, **options)
    assert bool(calls) == (mode.get("use_cache", True))
    assert torch.equal(actual.sequences, expected.sequences)
    for x, y in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_default_cache_is_ours(model):
    output = model.generate(prompt(model), return_dict_in_generate=True)
    assert isinstance(output.past_key_values, KDACache)


@pytest.mark.supports("left padding", model="kda_hf")
def test_left_padded_batch_equals_single(model):
    prompts = [prompt(model, length=length) for length in (4, 11, 70)]
    ids = torch.zeros(3, 70, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, -tokens.shape[1] :], mask[row, -tokens.shape[1] :] = tokens, 1
    batch = model.generate(ids, attention_mask=mask)
    assert_greedy(model, batch, ids, mask)
    for row, tokens in enumerate(prompts):
        assert_greedy(model, batch[None, row, 70 - tokens.shape[1] :], tokens)


@pytest.mark.supports("{implementation} cache", model="kda_hf")
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_cache_implementations(model, implementation):
    ids = prompt(model, batch=2)
    output = model.generate(ids, cache_implementation=implementation, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, KDACache)
    assert_greedy(model, output.sequences, ids)


@pytest.mark.supports("offloaded cache", model="kda_hf", backend="cuda")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from a GPU only")
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("num_hidden_layers", [4, 8])  # one layer with attention, and two
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache(tiny_model, implementation, num_hidden_layers, settings):
    if implementation == "offloaded_static" and "prompt_lookup_num_tokens" in settings:
        pytest.skip("assisted decoding takes dynamic caches only")
    model = tiny_model(num_hidden_layers=num_hidden_layers, pad_token_id=0).to("cuda")
    model.generation_config.update(max_new_tokens=NEW, do_sample=False, **settings)
    ids = prompt(model)
    output = model.generate(
        ids, cache_implementation=implementation, return_dict_in_generate=True, output_scores="num_beams" in settings
    )
    assert output.past_key_values.offloading
    if "num_beams" in settings:
        assert_beams(model, output, ids)
    else:
        assert_greedy(model, output.sequences, ids)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
def test_static_keys_that_move_are_masked_and_not_compiled(model, settings):
    """The mask, which is another matter than the copies of `test_offloaded_cache`, and needs no GPU."""
    at_rest, cache = (KDACache(model.config, max_cache_len=64, offloading=offloading) for offloading in (False, True))
    config = copy.deepcopy(model.generation_config)
    config.compile_config = CompileConfig()
    config.compile_config._compile_all_devices = True
    ids = prompt(model)
    assert model._valid_auto_compile_criteria({generation.CACHE_NAME: at_rest}, config)
    assert not model._valid_auto_compile_criteria({generation.CACHE_NAME: cache}, config)
    output = model.generate(
        ids, past_key_values=cache, return_dict_in_generate=True, output_scores="num_beams" in settings, **settings
    )
    assert_beams(model, output, ids) if settings else assert_greedy(model, output.sequences, ids)


@pytest.mark.supports("chunked prefill", model="kda_hf")
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill(model, chunk):
    ids = prompt(model, batch=2, length=70)
    assert_greedy(model, model.generate(ids, prefill_chunk_size=chunk), ids)


@pytest.mark.supports("prompt lookup", model="kda_hf")
def test_prompt_lookup_is_lossless(model):
    ids = prompt(model, length=6).repeat(1, 5)
    output = model.generate(ids, max_new_tokens=60, prompt_lookup_num_tokens=5, return_dict_in_generate=True)
    assert_greedy(model, output.sequences, ids, new=60)
    # the cache that comes back is that of the tokens, less the last one, which was never fed
    assert output.past_key_values.get_seq_length() == ids.shape[1] + 60 - 1


@pytest.mark.supports("assisted", model="kda_hf")
@pytest.mark.parametrize("assistant", ["itself", "another"])
def test_assisted_decoding_is_lossless(model, tiny_model, assistant):
    helper = model if assistant == "itself" else tiny_model(**PURE_KDA)
    ids = prompt(model)
    assert_greedy(model, model.generate(ids, assistant_model=helper, max_new_tokens=60), ids, new=60)


@pytest.mark.supports("beams", model="kda_hf")
def test_beams(model):
    ids = prompt(model, batch=2)
    settings = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    assert_beams(model, model.generate(ids, **settings), ids, returned=2)


@pytest.mark.supports("sampling", "several sequences", model="kda_hf")
def test_sampling_and_several_sequences(model):
    assert_sampled(model, prompt(model, batch=2), returned=3)


@pytest.mark.supports("streaming", model="kda_hf")
def test_streaming(model):
    class Tokens(BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens = self.tokens + value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Tokens(), prompt(model)
    output = model.generate(ids, streamer=streamer)
    assert streamer.tokens == output[0].tolist() and streamer.ended


@pytest.mark.supports("inputs_embeds", model="kda_hf")
def test_inputs_embeds(model):
    ids = prompt(model, batch=2)
    output = model.generate(inputs_embeds=model.get_input_embeddings()(ids))
    assert_greedy(model, torch.cat([ids, output], dim=1), ids)


@pytest.mark.parametrize("chunk", [None, 3, 64])
@pytest.mark.parametrize("given", ["the whole sequence", "new tokens", "embeddings"])
@pytest.mark.parametrize("padding", [0, 5])
@torch.no_grad()
def test_going_on_from_a_cached_prefix(model, given, chunk, padding):
    ids = prompt(model, batch=2, length=20)
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    cache, position_ids = KDACache(model.config), (mask.cumsum(1) - 1).clamp_min(0)
    model(ids[:, :9], attention_mask=mask[:, :9], position_ids=position_ids[:, :9], past_key_values=cache)
    inputs = {"attention_mask": mask, "past_key_values": cache, "prefill_chunk_size": chunk}
    if given == "embeddings":
        output = torch.cat([ids, model.generate(inputs_embeds=model.get_input_embeddings()(ids), **inputs)], dim=1)
    elif given == "new tokens":
        output = torch.cat([ids[:, :9], model.generate(ids[:, 9:], **inputs)], dim=1)
    else:
        output = model.generate(ids, **inputs)
    assert_greedy(model, output, ids, mask)


def test_a_prompt_that_the_cache_has_seen_already(model):
    cache, ids = KDACache(model.config), prompt(model)
    model.generate(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="The prompt has 11 tokens, but the cache has seen 34 already"):
        model.generate(ids, past_key_values=cache)


def test_bad_chunks(model):
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"`prefill_chunk_size` must be at least 1, got {size}"):
            model.generate(prompt(model), prefill_chunk_size=size)
    with pytest.raises(ValueError, match="`prefill_chunk_size` needs a cache"):
        model.generate(prompt(model), prefill_chunk_size=4, use_cache=False)


@torch.no_grad()
def test_the_cache_goes_by_either_name(model):
    """`past_key_values`, and `cache`, as transformers calls it from 5.24 on."""
    ids = prompt(model)
    outputs = []
    for name in ("past_key_values", "cache"):
        cache = KDACache(model.config)
        logits = [m(ids, **{name: cache})[0] for m in (model, model.model)]
        assert cache.get_seq_length() == 22
        layer = model.model.layers[0]
        hidden, masks = model.get_input_embeddings()(ids), {"attention_mask": None, "position_ids": None}
        logits += [layer(hidden, **masks, **{name: cache}), layer.linear_attn(hidden, **{name: cache})]
        cache.reset()
        outputs.append((*logits, model.generate(ids, **{name: cache})))
        assert cache.get_seq_length() == 11 + NEW - 1
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    with pytest.raises(ValueError, match="`past_key_values` and `cache`"):
        model(ids, past_key_values=cache, cache=cache)
    with pytest.raises(ValueError, match="`past_key_values` and `cache`"):
        model.generate(ids, past_key_values=cache, cache=cache)


@pytest.mark.supports("several turns", model="kda_hf")
@pytest.mark.parametrize("max_rollback", [0, 64])
def test_conversation_with_a_passed_cache(model, max_rollback):
    cache = KDACache(model.config, max_rollback=max_rollback)
    ids = prompt(model)
    for length in (5, 1, 70):
        mask = torch.ones_like(ids)  # a token that happens to be the padding token is none here
        answer = model.generate(ids, attention_mask=mask, past_key_values=cache)
        assert_greedy(model, answer, ids)
        ids = torch.cat([answer, prompt(model, length=length)], dim=1)


@pytest.mark.supports("save and load", model="kda_hf")
def test_conversation_that_is_saved(model, tmp_path):
    cache = KDACache(model.config)
    first = model.generate(prompt(model), past_key_values=cache)
    ids = torch.cat([first, prompt(model)], dim=1)
    mask = torch.ones_like(ids)
    cache.save(tmp_path / "state.safetensors")
    expected = model.generate(ids, attention_mask=mask, past_key_values=cache)
    loaded = KDACache.load(tmp_path / "state.safetensors", model.config, device=model.device)
    torch.testing.assert_close(model.generate(ids, attention_mask=mask, past_key_values=loaded), expected)


@pytest.mark.supports("fork", "snapshot", model="kda_hf")
@torch.no_grad()
def test_fork_and_restore(model):
    ids = prompt(model, length=20)
    cache = KDACache(model.config)
    model(ids[:, :-1], past_key_values=cache)
    snapshot = cache.snapshot()
    assert_sampled(model, ids.repeat(4, 1), new_cache=lambda: cache.fork(4))

    for _ in range(2):
        assert_greedy(model, model.generate(ids, past_key_values=cache), ids)
        cache.restore(snapshot)


@pytest.mark.supports("crop", model="kda_hf")
@pytest.mark.parametrize("block", [1, 3, 9])
@pytest.mark.parametrize("removed", [1, 2, 9])
@torch.no_grad()
def test_crop_leaves_no_trace(model, block, removed, relative_error):
    if removed > block:
        pytest.skip("there is nothing more to remove")
    ids = prompt(model, batch=2, length=80)
    cache, clean = KDACache(model.config), KDACache(model.config)
    model(ids, past_key_values=cache)
    model(ids, past_key_values=clean)
    new = prompt(model, batch=2, length=block)
    model(new, past_key_values=cache)
    cache.crop(-removed)
    if block > removed:
        model(new[:, :-removed], past_key_values=clean)
    assert cache.get_seq_length() == clean.get_seq_length() == 80 + block - removed
    for ours, theirs in zip(cache.layers, clean.layers, strict=True):
        if hasattr(ours, "recurrent_states"):
            assert relative_error(ours.recurrent_states[0], theirs.recurrent_states[0]) < 1e-5
            assert relative_error(ours.conv_states[0], theirs.conv_states[0]) < 1e-5
    following = prompt(model, batch=2, length=2)
    logits = model(following, past_key_values=cache).logits
    assert relative_error(logits, model(following, past_key_values=clean).logits) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_memory_does_not_grow(tiny_model, device):
    model = tiny_model(**PURE_KDA)
    cache = KDACache(model.config)
    model(torch.randint(97, (1, 300), device=device), past_key_values=cache)
    model(torch.randint(97, (1, 1), device=device), past_key_values=cache)
    sizes = {cache.nbytes}
    for length in [4000, 1, 64, 4000, 2000] + [1] * 200:
        model(torch.randint(97, (1, length), device=device), past_key_values=cache)
        sizes.add(cache.nbytes)
    assert cache.get_seq_length() > 10_000 and len(sizes) == 1


def test_text_iterator_streamer_works_with_a_thread(tiny_model):
    """The way servers stream: generate() in a thread, text from an iterator."""
    from threading import Thread

    class Letters:
        def decode(self, tokens, **kwargs):
            return "".join(chr(97 + token % 26) for token in tokens) + " "

    model = tiny_model()
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)
    ids = prompt(model)
    thread = Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamer, "max_new_tokens": 8})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert len(text) >= 8
