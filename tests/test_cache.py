"""KDACache by itself, under a KDA layer of a few lines in float64: what it undoes must equal never having happened."""

import copy
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from kda_hf import KDACache


HEADS, KEY, VALUE, WIDTH = 2, 3, 4, 4
CHANNELS = HEADS * (2 * KEY + VALUE)
CONV_WEIGHT = torch.randn(CHANNELS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ROLLBACK = 4


def run_tokens(conv_inputs, g, beta, valid=None, conv_state=None, recurrent_state=None):
    """Convolution and KDA, token by token; padding leaves the states of its row alone. Returns the two final states."""
    batch, length = conv_inputs.shape[:2]
    conv = torch.zeros(batch, CHANNELS, WIDTH, dtype=torch.float64) if conv_state is None else conv_state.clone()
    state = torch.zeros(batch, HEADS, KEY, VALUE, dtype=torch.float64)
    if recurrent_state is not None:
        state = recurrent_state.to(torch.float64, copy=True)
    for t in range(length):
        keep = torch.ones(batch, dtype=torch.bool) if valid is None else valid[:, t]
        conv[keep] = torch.cat([conv[keep][..., 1:], conv_inputs[keep, t, :, None].to(conv.dtype)], dim=-1)
        mixed = (conv[keep].double() * CONV_WEIGHT).sum(-1)
        _, k, v = mixed.split([HEADS * KEY, HEADS * KEY, HEADS * VALUE], dim=-1)
        k = torch.nn.functional.normalize(k.view(-1, HEADS, KEY), dim=-1)
        decayed = state[keep] * g[keep, t].exp()[..., None]
        u = beta[keep, t][..., None] * (v.view(-1, HEADS, VALUE) - (decayed * k[..., None]).sum(-2))
        state[keep] = decayed + k[..., None] * u[..., None, :]
    return conv, state


class Tokens:
    """A batch of random tokens, as a KDA layer hands them to the cache; also keys and values for an attention layer."""

    def __init__(self, batch, length, padded=False):
        self.conv_inputs = torch.randn(batch, length, CHANNELS, dtype=torch.float64)
        self.g = -torch.rand(batch, length, HEADS, KEY, dtype=torch.float64)
        self.beta = torch.rand(batch, length, HEADS, dtype=torch.float64)
        self.keys = torch.randn(batch, 2, length, 5)
        self.values = torch.randn(batch, 2, length, 6)
        self.valid = torch.rand(batch, length) > 0.3 if padded else None

    def map(self, function):
        result = copy.copy(self)
        vars(result).update({name: None if x is None else function(x, name) for name, x in vars(self).items()})
        return result

    def __getitem__(self, tokens):
        return self.map(lambda x, name: x[:, :, tokens] if name in ("keys", "values") else x[:, tokens])

    def __add__(self, other):
        return self.map(
            lambda x, name: torch.cat([x, getattr(other, name)], dim=2 if name in ("keys", "values") else 1)
        )

    def rows(self, indices):
        return self.map(lambda x, name: x[indices])

    def __len__(self):
        return self.g.shape[1]

    def inputs(self):
        return self.conv_inputs, self.g, self.beta, self.valid


def feed(cache, tokens, replay=run_tokens):
    """What the forward of a model does with its cache."""
    for idx, layer in enumerate(cache.layers):
        if cache.is_linear[idx]:
            head = max(0, len(tokens) - layer.max_rollback) if layer.records else 0
            for block in (tokens[:head], tokens[head:]):
                if len(block) == 0:
                    continue
                states = (layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else ()
                conv_state, recurrent_state = run_tokens(*block.inputs(), *states)
                if layer.records and block.g.data_ptr() == tokens[head:].g.data_ptr():
                    layer.record(replay, *block.inputs())
                cache.update_conv_state(conv_state, idx)
                cache.update_recurrent_state(recurrent_state, idx)
            layer.advance(len(tokens))
        else:
            cache.update(tokens.keys, tokens.values, idx)


def check(cache, tokens, tolerance=1e-12):
    """`cache` is what it would be had it seen `tokens` and nothing else."""
    length = len(tokens)
    assert cache.get_seq_length() == length
    expected = run_tokens(*tokens.inputs())
    for idx, layer in enumerate(cache.layers):
        if cache.is_linear[idx]:
            assert layer.has_previous_state[0] == (length > 0)
            assert layer.get_seq_length() == length
            for state, wanted in zip((layer.conv_states[0], layer.recurrent_states[0]), expected, strict=True):
                if length > 0:
                    torch.testing.assert_close(state.double(), wanted, rtol=tolerance, atol=tolerance)
                else:
                    assert state is None or not state.any()
        elif length > 0:
            torch.testing.assert_close(layer.keys[:, :, :length], tokens.keys, rtol=0, atol=0)
            torch.testing.assert_close(layer.values[:, :, :length], tokens.values, rtol=0, atol=0)
            assert not layer.keys[:, :, length:].any()


@pytest.fixture
def make_cache(tiny_config):
    """Makes caches: `hybrid` (KDA, attention, KDA) or `pure` (two KDA layers)."""

    def make(kind="hybrid", state_dtype=torch.float64, max_rollback=ROLLBACK, **kwargs):
        return KDACache(config(kind), state_dtype=state_dtype, max_rollback=max_rollback, **kwargs)

    def config(kind="hybrid", **overrides):
        layer_types = ["linear_attention"] * 2
        if kind == "hybrid":
            layer_types.insert(1, "full_attention")
        return tiny_config(num_hidden_layers=len(layer_types), layer_types=layer_types, **overrides)

    make.config = config
    return make


@pytest.fixture(params=["hybrid", "pure", "static", "pure static"])
def cache(request, make_cache):
    kind = "pure" if "pure" in request.param else "hybrid"
    return make_cache(kind, max_cache_len=200 if "static" in request.param else None)


def storage(cache):
    return [
        (layer.conv_states[0].data_ptr(), layer.recurrent_states[0].data_ptr())
        for layer, is_linear in zip(cache.layers, cache.is_linear, strict=True)
        if is_linear
    ]


# Going back


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_crop_equals_never_having_seen(cache, seed, padded):
    torch.manual_seed(seed)
    supply = Tokens(2, 160, padded)
    seen = supply[:0]
    drawn = removable = 0
    for _ in range(30):
        if torch.rand(()) < 0.6:
            length = int(torch.tensor([1, 1, 1, 2, 3, ROLLBACK, ROLLBACK + 1, 9])[torch.randint(8, ())])
            block = supply[drawn : drawn + length]
            drawn += len(block)
            feed(cache, block)
            seen = seen + block
            removable = ROLLBACK if length > ROLLBACK else min(removable + length, ROLLBACK)
        else:
            most = cache.layers[0].removable_tokens
            assert removable <= most <= 2 * ROLLBACK
            num_tokens = int(torch.randint(most + 1, ()))
            cache.crop(-num_tokens)
            seen = seen[: len(seen) - num_tokens]
            removable = max(removable - num_tokens, 0)
        check(cache, seen)


@pytest.mark.parametrize("length", [1, 2, ROLLBACK - 1, ROLLBACK, ROLLBACK + 1, 2 * ROLLBACK, 3 * ROLLBACK + 1])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_every_crop_after_every_length(make_cache, length, one_by_one):
    tokens = Tokens(2, length)
    for num_tokens in range(min(length, ROLLBACK) + 1):
        cache = make_cache()
        for block in [tokens[t : t + 1] for t in range(length)] if one_by_one else [tokens]:
            feed(cache, block)
        cache.crop(-num_tokens)
        check(cache, tokens[: length - num_tokens])
        feed(cache, tokens[length - num_tokens :])
        check(cache, tokens)


def test_crop_accepts_zero_and_integer_tensors(make_cache):
    cache, tokens = make_cache(), Tokens(1, 3)
    cache.crop(0)
    feed(cache, tokens)
    cache.crop(0)
    check(cache, tokens)
    cache.crop(torch.tensor(-2))
    check(cache, tokens[:1])


def test_crop_everything_then_start_again(cache):
    first, second = Tokens(2, 3), Tokens(2, 5)
    feed(cache, first)
    addresses = storage(cache)
    cache.crop(-3)
    check(cache, first[:0])
    feed(cache, second)
    check(cache, second)
    assert storage(cache) == addresses


def test_rejected_crop_changes_nothing(cache):
    tokens = Tokens(2, 3 * ROLLBACK)
    feed(cache, tokens)
    most = cache.layers[0].removable_tokens
    with pytest.raises(ValueError, match="`tokens_to_remove` must not be positive, got 2"):
        cache.crop(2)
    with pytest.raises(TypeError, match="`tokens_to_remove` must be an integer"):
        cache.crop(-1.5)
    with pytest.raises(RuntimeError, match=rf"(?s){most}.*max_rollback"):
        cache.crop(-most - 1)
    check(cache, tokens)


def test_crop_is_rejected_before_any_layer_changes(make_cache):
    cache, tokens = make_cache(), Tokens(1, 4)
    feed(cache, tokens)
    cache.layers[2].forget()
    with pytest.raises(RuntimeError, match="can remove 0"):
        cache.crop(-1)
    check(cache, tokens)


def test_crop_of_more_than_an_attention_layer_holds(tiny_config):
    cache = KDACache(tiny_config(num_hidden_layers=1, layer_types=["full_attention"]))
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    with pytest.raises(RuntimeError, match="it holds 3"):
        cache.crop(-4)


def test_a_verified_block_is_undone_without_running_the_whole_history(make_cache):
    lengths = []

    def replay(conv_inputs, *args):
        lengths.append(conv_inputs.shape[1])
        return run_tokens(conv_inputs, *args)

    cache, tokens = make_cache(max_rollback=32), Tokens(1, 40)
    feed(cache, tokens[:30], replay)
    feed(cache, tokens[30:36], replay)
    cache.crop(-4)
    assert lengths == [2, 2]
    check(cache, tokens[:32])


def test_decoding_token_by_token_runs_nothing_again(make_cache):
    def replay(*args):
        raise AssertionError("a token was run again")

    cache, tokens = make_cache(), Tokens(1, 10 * ROLLBACK)
    for t in range(len(tokens)):
        feed(cache, tokens[t : t + 1], replay)
    check(cache, tokens)


def test_padding_of_before_a_reset_is_forgotten(make_cache):
    cache, old, new = make_cache(), Tokens(2, ROLLBACK), Tokens(2, 3)
    old.valid = torch.zeros(2, ROLLBACK, dtype=torch.bool)
    feed(cache, old)
    cache.reset()
    feed(cache, new)  # no mask, so these tokens are valid, as the next block's mask makes the replay see
    block = Tokens(2, 1, padded=True)
    feed(cache, block)
    cache.crop(-2)
    check(cache, new[:2])


def test_updates_without_record_cannot_be_cropped(make_cache):
    cache, tokens = make_cache("pure"), Tokens(1, 2)
    feed(cache, tokens)
    for idx in range(2):
        layer = cache.layers[idx]
        cache.update_recurrent_state(layer.recurrent_states[0] * 2, idx)
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match="can remove 0"):
        cache.crop(-1)


def test_a_forward_that_failed_midway_is_not_replayed(make_cache):
    cache, tokens = make_cache("pure"), Tokens(1, 3)
    feed(cache, tokens[:2])
    for layer in cache.layers:
        layer.record(run_tokens, *tokens[2:].inputs())
    assert cache.layers[0].removable_tokens == 0
    feed(cache, tokens[2:])
    check(cache, tokens)
    cache.crop(-1)
    check(cache, tokens[:2])


def test_no_rollback_keeps_no_history(make_cache):
    cache, tokens = make_cache(max_rollback=0), Tokens(2, 5)
    assert not cache.is_croppable
    feed(cache, tokens)
    check(cache, tokens)
    with pytest.raises(RuntimeError, match="max_rollback=0"):
        cache.crop(-1)


def test_activate_past_recording(make_cache):
    cache, tokens = make_cache(max_rollback=0), Tokens(1, 100)
    feed(cache, tokens[:10])
    cache.activate_past_recording()
    feed(cache, tokens[10:])
    cache.crop(-90)
    check(cache, tokens[:10])
    with pytest.raises(RuntimeError):
        cache.crop(-1)
    feed(cache, tokens[10:])
    cache.activate_past_recording()
    cache.crop(-50)
    check(cache, tokens[:50])


# The batch


def test_batch_operations_take_the_history_along(cache):
    tokens = Tokens(3, 2 * ROLLBACK + 2, padded=True)
    for block in (tokens[: ROLLBACK + 1], tokens[ROLLBACK + 1 : -1], tokens[-1:]):
        feed(cache, block)
    addresses = storage(cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    check(cache, tokens.rows(order))
    assert storage(cache) == addresses
    cache.batch_repeat_interleave(2)
    order = order.repeat_interleave(2)
    check(cache, tokens.rows(order))
    assert cache.batch_size == 6
    cache.crop(-2)
    check(cache, tokens[:-2].rows(order))
    cache.batch_select_indices(torch.tensor([5, 1]))
    order = order[[5, 1]]
    assert cache.batch_size == 2
    cache.crop(-2)
    check(cache, tokens[:-4].rows(order))
    feed(cache, tokens[-4:].rows(order))
    check(cache, tokens.rows(order))


def test_batch_size(cache):
    assert cache.batch_size == -1
    feed(cache, Tokens(3, 2))
    assert cache.batch_size == 3


def test_batch_operations_on_an_empty_cache(cache):
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.batch_size == -1


def test_another_batch_size(make_cache):
    cache, tokens = make_cache(), Tokens(3, 2)
    feed(cache, Tokens(1, 2))
    with pytest.raises(ValueError, match="`conv_states` has batch size"):
        cache.update_conv_state(torch.zeros(3, CHANNELS, WIDTH), 0)
    with pytest.raises(ValueError, match="`recurrent_states` has shape"):
        cache.update_recurrent_state(torch.zeros(3, HEADS, KEY, VALUE), 0)
    cache.reset()
    feed(cache, tokens)
    check(cache, tokens)


# Copies


def test_snapshot_restores_any_number_of_times(cache):
    tokens, other = Tokens(2, 2 * ROLLBACK + 1), Tokens(2, 5)
    feed(cache, tokens)
    snapshot = cache.snapshot()
    addresses = storage(cache)
    for _ in range(2):
        feed(cache, other)
        cache.restore(snapshot)
        check(cache, tokens)
        assert storage(cache) == addresses
        cache.crop(-2)
        check(cache, tokens[:-2])
        cache.restore(snapshot)
        check(cache, tokens)


def test_snapshot_of_an_empty_cache(cache):
    snapshot = cache.snapshot()
    feed(cache, Tokens(2, 5))
    addresses = storage(cache)
    cache.restore(snapshot)
    tokens = Tokens(2, 3)
    check(cache, tokens[:0])
    feed(cache, tokens)
    check(cache, tokens)
    assert storage(cache) == addresses


def test_snapshot_into_an_empty_cache_and_another_batch_size(cache):
    tokens = Tokens(2, 7)
    empty = copy.deepcopy(cache)
    feed(cache, tokens)
    snapshot = cache.snapshot()
    empty.restore(snapshot)
    check(empty, tokens)
    cache.batch_repeat_interleave(2)
    cache.restore(snapshot)
    check(cache, tokens)
    feed(cache, tokens)
    check(empty, tokens)


def test_restore_rejects_what_does_not_fit(make_cache):
    cache, tokens = make_cache(), Tokens(1, 3)
    feed(cache, tokens)
    with pytest.raises(TypeError, match="`snapshot`"):
        cache.restore({"layers": []})
    with pytest.raises(ValueError, match="`layer_types`"):
        cache.restore(make_cache("pure").snapshot())
    with pytest.raises(ValueError, match="`max_cache_len` is 9"):
        cache.restore(make_cache(max_cache_len=9).snapshot())
    with pytest.raises(ValueError, match="`state_dtype` is torch.float32"):
        cache.restore(make_cache(state_dtype=torch.float32).snapshot())
    check(cache, tokens)


def test_fork_is_independent(cache):
    tokens, more = Tokens(2, 6), Tokens(4, 3)
    feed(cache, tokens)
    forked = cache.fork(2)
    order = torch.tensor([0, 0, 1, 1])
    check(forked, tokens.rows(order))
    feed(forked, more)
    check(cache, tokens)
    forked.crop(-3)
    check(forked, tokens.rows(order))
    cache.reset()
    check(forked, tokens.rows(order))
    check(forked.fork(1), tokens.rows(order))


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_fork_rejects(make_cache, n, error):
    with pytest.raises(error, match="`n` must be"):
        make_cache().fork(n)


def test_deepcopy_shares_the_model(make_cache):
    class Layer:
        def replay(self, *args):
            return run_tokens(*args)

        def __deepcopy__(self, memo):
            raise AssertionError("the cache copied the model")

    cache, tokens = make_cache(), Tokens(2, 5)
    feed(cache, tokens, Layer().replay)
    for copied in (copy.deepcopy(cache), cache.fork(1)):
        copied.crop(-2)
        check(copied, tokens[:-2])
    check(cache, tokens)


def test_copies_while_autograd_tracks(make_cache):
    cache = make_cache()
    tokens = Tokens(1, 3).map(lambda x, name: x.requires_grad_())
    feed(cache, tokens)
    assert not cache.layers[0].recurrent_states[0].requires_grad
    snapshot = cache.snapshot()
    cache.crop(-1)
    cache.restore(snapshot)
    check(cache.fork(1), tokens.map(lambda x, name: x.detach()))


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(cache, make_cache, tmp_path, dtype):
    config = make_cache.config("hybrid" if len(cache) == 3 else "pure")
    cache = KDACache(config, max_cache_len=cache.max_cache_len, state_dtype=dtype, max_rollback=ROLLBACK)
    tokens = Tokens(2, 9)
    feed(cache, tokens.map(lambda x, name: x.to(dtype) if name in ("keys", "values") else x))
    cache.crop(-2)
    path = tmp_path / "a.safetensors"
    cache.save(path)
    cache.save(str(path))
    assert os.listdir(tmp_path) == [path.name]

    loaded = KDACache.load(path, config)
    assert (loaded.max_cache_len, loaded.state_dtype) == (cache.max_cache_len, dtype)
    assert loaded.get_seq_length() == 7
    for layer, original, is_linear in zip(loaded.layers, cache.layers, cache.is_linear, strict=True):
        names = ("conv_states", "recurrent_states") if is_linear else ("keys", "values")
        for name in names:
            ours, theirs = getattr(layer, name), getattr(original, name)
            ours, theirs = (ours[0], theirs[0]) if is_linear else (ours, theirs)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="can remove 0"):
        loaded.crop(-1)
    more = tokens[7:].map(lambda x, name: x.to(dtype) if name in ("keys", "values") else x)
    feed(loaded, more)
    loaded.crop(-2)
    assert loaded.get_seq_length() == 7


def test_save_and_load_an_empty_cache(cache, make_cache, tmp_path):
    cache.save(tmp_path / "empty")
    loaded = KDACache.load(tmp_path / "empty", make_cache.config("hybrid" if len(cache) == 3 else "pure"))
    tokens = Tokens(2, 3)
    feed(loaded, tokens)
    check(loaded, tokens)


def test_failed_save_keeps_the_old_file(make_cache, tmp_path, monkeypatch):
    cache = make_cache()
    feed(cache, Tokens(1, 3))
    cache.save(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    feed(cache, Tokens(1, 3))

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.save(tmp_path / "cache")
    assert os.listdir(tmp_path) == ["cache"]
    assert (tmp_path / "cache").read_bytes() == before


def test_damaged_files(make_cache, tmp_path):
    cache, config = make_cache(), make_cache.config()
    feed(cache, Tokens(1, 3))
    good, bad = tmp_path / "good", tmp_path / "bad"
    cache.save(good)
    data = good.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        bad.write_bytes(data[:length])
        with pytest.raises(ValueError, match="bad"):
            KDACache.load(bad, config)
    for position in torch.randint(len(data), (200,), generator=generator).tolist():
        bad.write_bytes(data[:position] + bytes([data[position] ^ 0x11]) + data[position + 1 :])
        with pytest.raises(ValueError, match="bad"):
            KDACache.load(bad, config)
    bad.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="bad"):
        KDACache.load(bad, config)


def test_other_files(make_cache, tmp_path):
    cache, config = make_cache(), make_cache.config()
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        cache.save(tmp_path / "nowhere" / "cache")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        KDACache.load(tmp_path / "nowhere", config)
    with pytest.raises(FileNotFoundError):
        KDACache.load(tmp_path, config)
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not a cache file"):
        KDACache.load(tmp_path / "weights", config)
    feed(cache, Tokens(1, 3))
    cache.save(tmp_path / "cache")
    save_file(load_file(tmp_path / "cache"), tmp_path / "newer", {"format": "kda_hf.KDACache", "version": "2"})
    with pytest.raises(ValueError, match="`version` '2'"):
        KDACache.load(tmp_path / "newer", config)


@pytest.mark.parametrize(
    "overrides",
    [
        {"linear_head_dim": 8},
        {"linear_conv_kernel_dim": 3},
        {"linear_num_heads": 4},
        {"linear_value_head_dim": 64},
        {"num_key_value_heads": 4},
        {"head_dim": 64},
    ],
)
def test_load_names_what_the_configuration_changed(make_cache, tmp_path, overrides):
    cache = make_cache()
    feed(cache, Tokens(1, 3))
    cache.save(tmp_path / "cache")
    (name,) = overrides
    with pytest.raises(ValueError, match=f"`{name}` is"):
        KDACache.load(tmp_path / "cache", make_cache.config(**overrides))


def test_load_names_other_layers(make_cache, tmp_path):
    make_cache().save(tmp_path / "cache")
    with pytest.raises(ValueError, match="`layer_types` is"):
        KDACache.load(tmp_path / "cache", make_cache.config("pure"))


# What transformers expects of a cache


def test_reset(cache):
    tokens = Tokens(2, 5)
    feed(cache, Tokens(2, 9, padded=True))
    addresses = storage(cache)
    cache.reset()
    check(cache, tokens[:0])
    assert not any(layer.recurrent_states[0].any() for layer in cache.layers if hasattr(layer, "recurrent_states"))
    feed(cache, tokens)
    check(cache, tokens)
    assert storage(cache) == addresses
    with pytest.raises(RuntimeError):
        cache.crop(-6)
    cache.crop(-ROLLBACK)
    check(cache, tokens[:-ROLLBACK])


def test_lengths_of_pure_kda(make_cache):
    for max_cache_len in (None, 20):
        cache = make_cache("pure", max_cache_len=max_cache_len)
        assert cache.get_seq_length() == 0
        feed(cache, Tokens(1, 7))
        assert cache.get_seq_length() == cache.get_seq_length(1) == 7
        assert isinstance(cache.get_seq_length(), int if max_cache_len is None else torch.Tensor)
        assert cache.get_mask_sizes(3, 0) == ((10, 0) if max_cache_len is None else (20, 0))
        assert cache.get_max_length() == (-1 if max_cache_len is None else 20)
        assert cache.is_compileable == (max_cache_len is not None)
        assert cache.is_linear == [True, True]


@pytest.mark.parametrize("max_cache_len", [None, 20])
def test_lengths_of_a_hybrid_are_those_of_transformers(make_cache, max_cache_len):
    config = make_cache.config()
    cache = make_cache(max_cache_len=max_cache_len)
    theirs = DynamicCache(config=config) if max_cache_len is None else StaticCache(config, max_cache_len)
    for _ in range(2):
        tokens = Tokens(1, 4)
        feed(cache, tokens)
        theirs.update(tokens.keys, tokens.values, 1)
        assert cache.get_seq_length() == theirs.get_seq_length()
        assert type(cache.get_seq_length()) is type(theirs.get_seq_length())
        assert cache.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0)
        assert cache.get_max_length() == theirs.get_max_length()
        assert cache.is_compileable == (max_cache_len is not None)
        assert len(cache) == len(theirs) == 3


def test_models_of_transformers_may_update_it(make_cache):
    """They pass any number of convolution inputs, read back the window, never record, and never count."""
    ours, theirs = make_cache(), DynamicCache(config=make_cache.config())
    for length in (2, 1, WIDTH, 7, 1):
        inputs, state = torch.randn(2, CHANNELS, length), torch.randn(2, HEADS, KEY, VALUE)
        windows = [cache.update_conv_state(inputs, 0, conv_kernel_size=WIDTH) for cache in (ours, theirs)]
        torch.testing.assert_close(*windows, rtol=0, atol=0)
        states = [cache.update_recurrent_state(state, 0) for cache in (ours, theirs)]
        torch.testing.assert_close(states[0].float(), states[1], rtol=0, atol=0)
        torch.testing.assert_close(ours.layers[0].conv_states[0], theirs.layers[0].conv_states[0], rtol=0, atol=0)
        for cache in (ours, theirs):
            cache.update(torch.ones(2, 1, length, 4), torch.ones(2, 1, length, 4), 1)
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert not ours.is_croppable


def test_gradients_reach_what_an_update_returns(make_cache):
    inputs = torch.randn(1, CHANNELS, 6, requires_grad=True)
    make_cache().update_conv_state(inputs, 0, conv_kernel_size=WIDTH).sum().backward()
    assert inputs.grad.eq(1).all()


def test_is_croppable(cache):
    tokens = Tokens(1, 3)
    assert cache.is_croppable
    feed(cache, tokens)
    assert cache.is_croppable
    cache.layers[0].forget()
    assert not cache.is_croppable


def test_state_dtype(make_cache):
    cache, tokens = make_cache(state_dtype=torch.bfloat16), Tokens(2, 9)
    feed(cache, tokens)
    assert cache.layers[0].recurrent_states[0].dtype == torch.bfloat16
    assert cache.layers[0].conv_states[0].dtype == torch.float64
    check(cache, tokens, tolerance=0.02)
    cache.crop(-3)
    check(cache, tokens[:-3], tolerance=0.02)
    assert KDACache(make_cache.config()).state_dtype == torch.float32


def test_memory_is_constant(make_cache):
    cache = make_cache("pure")
    assert cache.nbytes == 0
    feed(cache, Tokens(1, 1))
    nbytes = cache.nbytes
    supply = Tokens(1, 100)
    for step in range(150):
        length = (1, 1, 1, 3, 6)[step % 5]
        feed(cache, supply[:length])
        if step % 7 == 0:
            cache.crop(-1)
        assert cache.nbytes == nbytes
    assert nbytes > sum(layer.conv_states[0].nbytes + layer.recurrent_states[0].nbytes for layer in cache.layers)
    assert make_cache("pure", max_rollback=0).nbytes == 0


def test_states_of_inference_mode_are_usable_outside(make_cache):
    cache, tokens = make_cache("pure", max_cache_len=64), Tokens(1, 12)
    with torch.inference_mode():
        feed(cache, tokens[:6])
        snapshot = cache.snapshot()
    feed(cache, tokens[6:])
    check(cache, tokens)
    cache.crop(-3)
    cache.restore(snapshot)
    feed(cache, tokens[6:])
    check(cache, tokens)


def test_offloading_on_cpu(make_cache):
    cache, tokens = make_cache(offloading=True), Tokens(2, 5)
    feed(cache, tokens[:3])
    feed(cache, tokens[3:])
    for idx in range(len(cache)):
        cache.offload(idx)
        cache.prefetch(idx)
    check(cache, tokens)
    cache.crop(-2)
    check(cache, tokens[:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offloading", [False, True])
def test_offloading_on_gpu(make_cache, offloading):
    cache = make_cache(offloading=offloading)
    keys = torch.randn(1, 2, 3, 4, device="cuda")
    history = [x.cuda() for x in Tokens(1, 3).inputs()[:3]]
    layer = cache.layers[0]
    layer.record(lambda *args: None, *history)
    cache.update_conv_state(torch.ones(1, CHANNELS, WIDTH, device="cuda"), 0)
    cache.update_recurrent_state(torch.ones(1, HEADS, KEY, VALUE, device="cuda"), 0)
    for _ in range(3):
        assert cache.update(keys, keys, 1)[0].is_cuda
    for idx in range(2):
        cache.offload(idx)
    assert not layer.recurrent_states[0].is_cuda
    assert not cache.layers[1].keys.is_cuda
    for idx in range(2):
        cache.prefetch(idx)
    torch.cuda.synchronize()
    assert layer.recurrent_states[0].is_cuda
    assert cache.layers[1].keys.is_cuda


def offloaded(tiny_config, attention_layers, max_cache_len=None):
    """A cache of `attention_layers` offloaded layers and the keys that each was fed, from a host far ahead of the GPU.

    Also returns what the updates returned, as the stream saw it then.
    """
    kinds = ["full_attention"] * attention_layers
    cache = KDACache(
        tiny_config(num_hidden_layers=len(kinds), layer_types=kinds), max_cache_len=max_cache_len, offloading=True
    )
    with cache.prefetch_stream:  # memory that is fetched into holds no keys by chance
        [torch.full((2, 2, 4096, 128), torch.nan, device="cuda") for _ in range(8)]
    fed = [torch.randn(2, 2, 0, 128, device="cuda") for _ in kinds]
    returned = []
    for _ in range(4):
        for idx in range(attention_layers):
            block = torch.randn(2, 2, 1024, 128, device="cuda")
            fed[idx] = torch.cat([fed[idx], block], 2)
            torch.cuda._sleep(20_000_000)  # some 10 ms, in which the host issues all that follows
            keys, values = cache.update(block, -block, idx)
            returned.append((keys.clone(), values.clone(), fed[idx]))
    return cache, fed, returned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("max_cache_len", [None, 4100])
@pytest.mark.parametrize("attention_layers", [1, 2, 3])
def test_offloading_copies_wait_for_each_other(tiny_config, attention_layers, max_cache_len):
    for keys, values, fed in offloaded(tiny_config, attention_layers, max_cache_len)[2]:
        length = fed.shape[2]
        torch.testing.assert_close(keys[:, :, :length], fed, rtol=0, atol=0)
        torch.testing.assert_close(values[:, :, :length], -fed, rtol=0, atol=0)


def _restored(cache):
    snapshot = cache.snapshot()
    torch.cuda.synchronize()
    cache.reset()
    cache.restore(snapshot)
    return cache


def _in_place(method, *args):
    def call(cache):
        getattr(cache, method)(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in args))
        return cache

    return call


OPERATIONS = {
    "deepcopy": (copy.deepcopy, lambda x: x),
    "snapshot": (_restored, lambda x: x),
    "fork": (lambda cache: cache.fork(2), lambda x: x.repeat_interleave(2, 0)),
    "reorder": (_in_place("reorder_cache", torch.tensor([1, 0])), lambda x: x.flip(0)),
    "repeat": (_in_place("batch_repeat_interleave", 2), lambda x: x.repeat_interleave(2, 0)),
    "select": (_in_place("batch_select_indices", torch.tensor([1])), lambda x: x[1:]),
    "crop": (_in_place("crop", -100), lambda x: x[:, :, :-100]),
    "reset": (_in_place("reset"), lambda x: x[:, :, :0]),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("max_cache_len", [None, 4100])
@pytest.mark.parametrize("attention_layers", [1, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_offloaded_layers_are_whole_outside_of_a_forward(tiny_config, operation, attention_layers, max_cache_len):
    cache, fed, _ = offloaded(tiny_config, attention_layers, max_cache_len)
    apply, expect = OPERATIONS[operation]
    cache = apply(cache)
    torch.cuda.synchronize()
    for layer, keys in zip(cache.layers, fed, strict=True):
        expected = expect(keys)
        length = expected.shape[2]
        assert layer.get_seq_length() == length
        if layer.keys is not None:
            torch.testing.assert_close(layer.keys[:, :, :length].cuda(), expected, rtol=0, atol=0)
            torch.testing.assert_close(layer.values[:, :, :length].cuda(), -expected, rtol=0, atol=0)
            assert not layer.keys[:, :, length:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_saving_waits_for_offloading(tiny_config, tmp_path):
    cache, fed, _ = offloaded(tiny_config, 2)
    cache.save(tmp_path / "cache")
    kinds = ["full_attention"] * 2
    loaded = KDACache.load(tmp_path / "cache", tiny_config(num_hidden_layers=2, layer_types=kinds), "cuda")
    for layer, keys in zip(loaded.layers, fed, strict=True):
        torch.testing.assert_close(layer.keys, keys, rtol=0, atol=0)


def test_compiled_static_updates_neither_break_nor_recompile(make_cache):
    cache = make_cache(max_cache_len=64)
    tokens = Tokens(1, 12)
    feed(cache, tokens[:6])
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(conv_state, recurrent_state, keys, values):
        assert not cache.layers[0].records
        for idx in (0, 2):
            cache.update_conv_state(conv_state, idx)
            cache.update_recurrent_state(recurrent_state, idx)
            cache.layers[idx].advance(1)
        cache.update(keys, values, 1)
        return cache.get_seq_length() * 2

    for t in range(6, 12):
        token = tokens[t : t + 1]
        states = run_tokens(*token.inputs(), cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0])
        assert step(*states, token.keys, token.values) == 2 * (t + 1)
    assert len(compilations) <= 2
    check(cache, tokens)
    with pytest.raises(RuntimeError, match="can remove 0"):
        cache.crop(-1)


def test_repr(make_cache):
    cache = make_cache()
    feed(cache, Tokens(2, 5))
    assert "KDACache(kda_layers=2, attention_layers=1, batch_size=2, seq_length=5" in repr(cache)
    assert f"removable_tokens={ROLLBACK}" in repr(cache.layers)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("max_cache_len", 0, ValueError),
        ("max_cache_len", 8.0, TypeError),
        ("max_rollback", -1, ValueError),
        ("max_rollback", None, TypeError),
        ("state_dtype", torch.int32, ValueError),
        ("state_dtype", "bfloat16", TypeError),
    ],
)
def test_arguments_are_checked(make_cache, argument, value, error):
    with pytest.raises(error, match=f"`{argument}` must be"):
        make_cache(**{argument: value})


def test_layer_types_are_checked(make_cache):
    config = make_cache.config()
    config.layer_types[1] = "sliding_attention"
    with pytest.raises(ValueError, match=r"`config.layer_types\[1\]`.*'sliding_attention'"):
        KDACache(config)
