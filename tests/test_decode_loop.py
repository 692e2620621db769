"""Our own decoding loop: each call gives what it gives with the loop of transformers, to the bit."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import (
    CompileConfig,
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    stopping_criteria,
)
from transformers.generation.streamers import BaseStreamer

from kda_hf import KDACache, decode_graph, decode_loop, decoding
from kda_hf.decoding import DecodeProgram
from kda_hf.generation import CACHE_NAME, KDAGenerationMixin
from kda_hf.ops import sampling


NEW = 14
NEVER = 500  # no token of the vocabulary
SHIPPED = Path(__file__).parents[1] / "models" / "kda-hf-tiny"
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SAMPLED = {"do_sample": True, "top_k": 0}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """On a GPU, widths this small have no kernel."""
    monkeypatch.setattr("kda_hf.modeling_kda.KimiDeltaAttention.steps_at_once", lambda *_: True)


@pytest.fixture
def model(tiny_model):
    model = tiny_model()
    model.generation_config.update(pad_token_id=0, eos_token_id=None, max_new_tokens=NEW, do_sample=False)
    return model


@pytest.fixture
def served(monkeypatch):
    """The calls that our loop has served."""
    calls, own = [], decode_loop.decode

    def counted(*args, **kwargs):
        calls.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(decode_loop, "decode", counted)
    return calls


@pytest.fixture
def steps(monkeypatch):
    """The tokens that programs have been given, which takes programs that are no graphs."""
    monkeypatch.setattr(decode_graph, "has_graphs", lambda device: False)
    calls, own = [], DecodeProgram.__call__

    def counted(self, input_ids, *args):
        calls.append(input_ids)
        return own(self, input_ids, *args)

    monkeypatch.setattr(DecodeProgram, "__call__", counted)
    return calls


class Watching(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """A processor, a criterion and a streamer that keep what they are shown, in the order of the calls."""

    def __init__(self, stop_at=None, fail_at=None, writes=False):
        self.seen, self.stop_at, self.fail_at, self.writes = [], stop_at, fail_at, writes

    def __call__(self, input_ids, scores):
        self.seen.append(("ids", input_ids))
        if isinstance(scores, torch.Tensor):
            self.seen.append(("scores", scores.clone()))
            return scores.mul_(0.5) if self.writes else scores
        self.seen.append(("all scores", -1 if scores is None else len(scores)))
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.stop_at is not None:  # one row after the other
            done |= torch.arange(len(done), device=done.device) < input_ids.shape[1] - self.stop_at
        return done

    def put(self, value):
        assert value.device.type == "cpu"
        self.seen.append(("streamed", value))
        if len([name for name, _ in self.seen if name == "streamed"]) == self.fail_at:
            raise InterruptedError

    def end(self):
        self.seen.append(("end", 0))


def prompt(model, batch=3, length=9):
    return torch.randint(3, 97, (batch, length), device=model.device)


def assert_same(actual, expected):
    """Equal in kind, order, dtypes and bits; on a GPU, logits are equal up to rounding."""
    assert type(actual) is type(expected)
    if isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif isinstance(actual, torch.Tensor):
        assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
        assert actual.stride() == expected.stride()
        tolerance = 1e-4 if actual.is_cuda and actual.is_floating_point() else 0
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    elif isinstance(actual, GenerateDecoderOnlyOutput):
        assert actual.keys() == expected.keys()
        for name in actual:
            assert_same(actual[name], expected[name])
    elif isinstance(actual, KDACache):
        assert_same(int(actual.get_seq_length()), int(expected.get_seq_length()))
        for one, other in zip(actual.layers, expected.layers, strict=True):
            for name in ("conv_states", "recurrent_states") if hasattr(one, "conv_states") else ("keys", "values"):
                x, y = getattr(one, name), getattr(other, name)
                assert_same(*((x, y) if isinstance(x, torch.Tensor) else (x[0], y[0])))
    else:
        assert actual == expected


def generator_state(model):
    return torch.cuda.get_rng_state() if model.device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def their_loop():
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(KDAGenerationMixin, "_sample")
        yield


def results(model, ids, options):
    """What a call returns, does to the generator and to a cache that it is given, and shows to what watches."""
    options = {"max_new_tokens": NEW} | (options() if callable(options) else options)
    if options.get("max_length"):
        del options["max_new_tokens"]
    torch.manual_seed(5)
    if options.get("inputs_embeds") is not None:
        ids = None
    output = model.generate(ids, **options)
    watching = [options.get("streamer"), *options.get("logits_processor", ()), *options.get("stopping_criteria", ())]
    seen = [watcher.seen for watcher in watching if isinstance(watcher, Watching)]
    return [output, generator_state(model), seen, options.get("past_key_values", 0)]


def assert_same_results(model, ids, options, served, calls=1):
    """Returns what both loops give."""
    with their_loop():
        expected = results(model, ids, options)
    assert not served
    actual = results(model, ids, options)
    assert len(served) == calls
    served.clear()
    assert_same(actual, expected)
    return actual


def tokens_to_end_with(model, ids, **options):
    """Tokens with which rows end at different steps, before the last one."""
    for _ in range(50):
        torch.manual_seed(5)
        with their_loop():
            new = model.generate(ids, max_new_tokens=NEW, **options)[:, -NEW:]
        ends = torch.stack([new[row, 1 + 3 * row] for row in range(len(new))])
        found = torch.isin(new, ends).int()
        if len({int(step) for step in found.argmax(1)}) > 1 and found[:, : NEW - 2].any(1).all():
            return ends.tolist()
        ids.copy_(prompt(model, *ids.shape))
    raise AssertionError("no such tokens")


# ----------------------------------------------------------------------------------------------------- the same results


@pytest.mark.parametrize(
    "options",
    [
        {},
        ALL,
        SAMPLED,
        SAMPLED | {"temperature": 0.7, "top_k": 20, "top_p": 0.8} | ALL,
        SAMPLED | {"num_return_sequences": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]], "repetition_penalty": 1.2} | ALL,
        {"guidance_scale": 1.5},
        {"max_length": 13, "max_new_tokens": None},
        {"max_new_tokens": 1} | ALL,
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static", "disable_compile": True} | ALL,
        {"max_time": 1e6},
        {"max_time": 0.0},
        {"return_dict_in_generate": True},
        {"output_scores": True, "return_dict_in_generate": False},
        {"logits_to_keep": 0} | ALL,
    ],
    ids=str,
)
def test_same_results(model, options, served):
    assert_same_results(model, prompt(model), options, served)


@pytest.mark.parametrize("overrides", [{"layer_types": ["linear_attention"] * 4}, {"rope_parameters": {}}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_results_of_other_models(tiny_model, overrides, dtype, served):
    if "rope_parameters" in overrides:
        overrides = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    model = tiny_model(**overrides).to(dtype)
    options = SAMPLED | {"pad_token_id": 0, "eos_token_id": 96} | ALL
    output = assert_same_results(model, prompt(model), options, served)[0]
    assert all(x.dtype == torch.float32 for x in output.logits)


@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("others", [{}, ALL, {"min_new_tokens": 8}, {"repetition_penalty": 1.01}], ids=str)
def test_rows_end_at_different_steps(model, sampled, others, served):
    ids = prompt(model)
    ends = tokens_to_end_with(model, ids, **sampled)
    output = assert_same_results(model, ids, sampled | others | {"eos_token_id": ends}, served)[0]
    new = (output if isinstance(output, torch.Tensor) else output.sequences)[:, ids.shape[1] :]
    if others in ({}, ALL):
        assert new.shape[1] < NEW and (new == 0).any()
        first = torch.isin(new, torch.tensor(ends, device=new.device)).int().argmax(1)
        for row, step in zip(new, first, strict=True):
            assert not row[step + 1 :].any()


def test_one_token_to_end_with(model, served):
    ids = prompt(model, batch=1)
    end = int(model.generate(ids)[0, 12])
    served.clear()
    output = assert_same_results(model, ids, {"eos_token_id": end}, served)[0]
    assert output.shape[1] <= 13 and output[0, -1] == end


@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_what_watches_sees_the_same(model, sampled, served):
    ids = prompt(model)
    ends = tokens_to_end_with(model, ids, **sampled)
    for keeps in ({}, ALL):
        for roles in ("logits_processor", "stopping_criteria", "streamer"), ("streamer",), ("stopping_criteria",):

            def options(keeps=keeps, roles=roles):
                watchers = {role: Watching() if role == "streamer" else [Watching()] for role in roles}
                return sampled | keeps | watchers | {"eos_token_id": ends}

            *_, seen, _ = assert_same_results(model, ids, options, served)
            assert len(seen) == len(roles) and all(seen)


def test_a_processor_may_write_to_what_it_is_given(model, served):
    options = lambda: ALL | {"logits_processor": LogitsProcessorList([Watching(writes=True)])}  # noqa: E731
    assert_same_results(model, prompt(model), options, served)


def test_a_processor_that_wants_more_raises_as_ever(model, served):
    class Wants(LogitsProcessor):
        def __call__(self, input_ids, scores, more):
            raise AssertionError

    with pytest.raises(ValueError, match="required parameters"):
        model.generate(prompt(model), logits_processor=[Wants()])
    assert served


@pytest.mark.parametrize("ends", [{}, {"eos_token_id": NEVER}], ids=["no token ends", "a token ends"])
def test_custom_criteria_end_rows(model, ends, served):
    ids = prompt(model)
    options = lambda: ends | {"stopping_criteria": [Watching(stop_at=12)]}  # noqa: E731
    output = assert_same_results(model, ids, options, served)[0]
    assert output.shape[1] == 15  # the last of three rows
    expected = model.generate(ids)[:, :15]
    if ends:
        expected[0, 13:] = expected[1, 14:] = 0
    assert torch.equal(output, expected)


def test_criteria_of_the_caller(model, served):
    """Of the kinds that the loop knows, and one with an `eos_token_id` of its own: then finished rows are padded."""

    class Own(EosTokenCriteria):
        pass

    ids = prompt(model)
    ends = tokens_to_end_with(model, ids)
    for criteria in (
        [EosTokenCriteria(ends[:1])],
        [MaxLengthCriteria(12), EosTokenCriteria(ends)],
        [Own(ends)],
        [Own(ends[:1]), EosTokenCriteria(torch.tensor(ends[1]))],
    ):
        assert_same_results(model, ids, {"stopping_criteria": StoppingCriteriaList(criteria)}, served)


def test_stop_strings(served):
    tokenizer, model = AutoTokenizer.from_pretrained(SHIPPED), AutoModelForCausalLM.from_pretrained(SHIPPED)
    ids = tokenizer("And the king said", return_tensors="pt").input_ids
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    new = tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :])
    stop = new[len(new) // 2 :][:3]
    served.clear()
    output = assert_same_results(model, ids, options | {"stop_strings": [stop], "tokenizer": tokenizer}, served)[0]
    assert stop in tokenizer.decode(output[0, ids.shape[1] :]) and output.shape[1] < ids.shape[1] + 40


def test_streaming(model, served):
    *_, [seen], _ = assert_same_results(model, prompt(model, batch=1), lambda: {"streamer": Watching()}, served)
    assert [name for name, _ in seen] == ["streamed"] * (NEW + 1) + ["end"]


def test_a_reader_that_has_enough(model, served):
    """The cache goes on from what it has read."""
    ids, seen = prompt(model, batch=1), []
    for loop in (their_loop, contextlib.nullcontext):
        cache, streamer = KDACache(model.config, max_rollback=0), Watching(fail_at=5)
        with loop(), pytest.raises(InterruptedError):
            model.generate(ids, streamer=streamer, past_key_values=cache)
        assert cache.get_seq_length() == 9 + 3  # the prompt is put first, and the last token has not been fed
        seen.append([streamer.seen, cache])
    assert_same(*seen)
    assert served


@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_left_padding(model, sampled, served):
    ids = prompt(model)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    assert_same_results(model, ids, sampled | {"attention_mask": mask}, served)


def test_embeddings(model, served):
    embeds = model.get_input_embeddings()(prompt(model)).detach()
    for others in ({}, {"repetition_penalty": 1.2}, {"prefill_chunk_size": 4}):
        output = assert_same_results(model, None, others | {"inputs_embeds": embeds}, served)[0]
        assert output.shape == (3, NEW)


@pytest.mark.parametrize("kind", [{}, {"max_rollback": 0}, {"max_rollback": 0, "max_cache_len": 99}], ids=str)
def test_a_conversation(model, kind, served):
    questions = [prompt(model, length=length) for length in (9, 1, 20)]
    turns = []
    for loop in (their_loop, contextlib.nullcontext):
        cache, ids = KDACache(model.config, **kind), prompt(model, length=0)
        turns.append([])
        for question in questions:
            ids = torch.cat([ids, question], dim=1)
            with loop():
                mask = torch.ones_like(ids)
                ids = model.generate(ids, attention_mask=mask, past_key_values=cache, disable_compile=True)
            assert int(cache.get_seq_length()) == ids.shape[1] - 1
            turns[-1] += [ids, cache.fork(1)]
    assert_same(*turns)
    assert len(served) == len(questions) and ids.shape[1] == 9 + 1 + 20 + 3 * NEW


def test_the_cache_in_the_output(model, served):
    cache = KDACache(model.config, max_rollback=0)
    for given in (cache, None):
        output = model.generate(prompt(model), past_key_values=given, return_dict_in_generate=True)
        assert isinstance(output[CACHE_NAME], KDACache) and output[CACHE_NAME].get_seq_length() == 9 + NEW - 1
        assert given is None or output[CACHE_NAME] is given
    assert len(served) == 2


@pytest.mark.parametrize("limit", [4, 9, 11, 9 + NEW - 1, 9 + NEW])
def test_more_tokens_than_the_model_was_made_for(tiny_model, limit, monkeypatch, served):
    model = tiny_model(max_position_embeddings=limit)
    warnings = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", warnings.append)
    options = {"pad_token_id": 0, "eos_token_id": None}
    assert_same_results(model, prompt(model), options, served)
    assert len(set(warnings)) == (limit < 9 + NEW - 1)  # by their loop for each token, by ours once
    served.clear()
    warnings.clear()
    model.generate(prompt(model), max_new_tokens=NEW, **options)
    assert len(warnings) == (limit < 9 + NEW - 1) and served


# ------------------------------------------------------------------------------------------------------------- steppers


def test_as_many_steps_as_it_takes(model, served, steps):
    ids = prompt(model)
    model.generate(ids, max_new_tokens=1)
    assert served and not steps
    model.generate(ids)
    assert len(steps) == NEW - 1
    assert all(x.shape == (3, 1) for x in steps)


class Reusing:
    """A stepper whose logits are always in the same place, as those of a CUDA graph."""

    made: list["Reusing"] = []

    def __init__(self, *args):
        self.own, self.logits, self.finished, self.max_steps = own_stepper(*args), None, 0, args[-1]
        self.made.append(self)

    def step(self, tokens):
        assert not self.finished
        logits = self.own.step(tokens)
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        return self.logits.copy_(logits)

    def finish(self):
        self.own.finish()
        self.finished += 1


own_stepper = decode_loop.make_stepper


@pytest.mark.parametrize("run_ahead", [False, True])
def test_steps_may_overwrite_logits(model, run_ahead, served, monkeypatch):
    monkeypatch.setattr(decode_loop, "make_stepper", Reusing)
    monkeypatch.setattr(decode_loop, "may_run_ahead", lambda *_: run_ahead)
    monkeypatch.setattr(Reusing, "made", [])
    ids = prompt(model)
    processor = lambda: {"logits_processor": [Watching(writes=True)]}  # noqa: E731
    for options in (ALL, SAMPLED, processor, {"return_dict_in_generate": True, "output_logits": True}):
        assert_same_results(model, ids, options, served)
    assert [stepper.finished for stepper in Reusing.made] == [1] * 4
    assert all(stepper.max_steps == NEW - 1 for stepper in Reusing.made)


def test_steppers_finish_whatever_happens(model, monkeypatch):
    monkeypatch.setattr(decode_loop, "make_stepper", Reusing)
    monkeypatch.setattr(Reusing, "made", [])
    with pytest.raises(InterruptedError):
        model.generate(prompt(model, batch=1), streamer=Watching(fail_at=5))
    assert [stepper.finished for stepper in Reusing.made] == [1]


@pytest.mark.parametrize("declines", ["always", "sometimes"])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("implementation", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
def test_where_the_program_declines_the_modules_step(model, declines, padding, implementation, served, monkeypatch):
    ids = prompt(model)
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    options = ALL | implementation | {"attention_mask": mask, "max_new_tokens": NEW}
    with their_loop():
        expected = model.generate(ids, **options)
    own, calls = DecodeProgram.__call__, []

    def sometimes(*args):
        calls.append(args)
        return None if len(calls) % 4 < 2 else own(*args)

    monkeypatch.setattr(decode_graph, "has_graphs", lambda device: False)
    if declines == "always":
        monkeypatch.setattr(DecodeProgram, "takes", lambda *_: False)
    monkeypatch.setattr(DecodeProgram, "__call__", sometimes)
    actual = model.generate(ids, **options)
    assert len(served) == 1 and bool(calls) == (declines == "sometimes")
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual.sequences, expected.sequences)
    assert int(actual[CACHE_NAME].get_seq_length()) == 9 + NEW - 1


# -------------------------------------------------------------------------------------------------------- running ahead


@pytest.mark.parametrize("sampled", [{}, SAMPLED | {"temperature": 0.9, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stops", ["by tokens", "by a criterion", "by length"])
def test_running_ahead_shows_nowhere(model, sampled, stops, served, steps, monkeypatch):
    monkeypatch.setattr(decode_loop, "may_run_ahead", lambda *_: True)
    ids = prompt(model, batch=1 if stops == "by length" else 3)
    ends = tokens_to_end_with(model, ids, **sampled) if stops == "by tokens" else NEVER

    def options(**watchers):
        watchers = {"logits_processor": [Watching()], **watchers}
        if stops == "by a criterion":
            watchers["stopping_criteria"] = [Watching(stop_at=12)]
        return sampled | {"eos_token_id": ends} | watchers

    served.clear()
    output = assert_same_results(model, ids, options, served)[0]
    assert_same_results(model, ids, lambda: options(streamer=Watching()), served)
    steps.clear()
    results(model, ids, options)
    # One step too many, unless the length says that there is none
    assert len(steps) == output.shape[1] - 9 - (stops == "by length")
    assert (output.shape[1] == 9 + NEW) == (stops == "by length")


@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_it_may_run_ahead_where_nobody_sees_the_cache(model, returned, given, monkeypatch):
    asked, own = [], decode_loop.may_run_ahead
    monkeypatch.setattr(decode_loop, "may_run_ahead", lambda *args: bool(asked.append(args)))
    cache = KDACache(model.config, max_rollback=0) if given else None
    model.generate(prompt(model), past_key_values=cache, return_dict_in_generate=returned)
    [(device, keeps_cache)] = asked
    assert device == model.device and keeps_cache == (returned or given)
    assert own(torch.device("cuda"), keeps_cache) is not keeps_cache
    assert not own(torch.device("cpu"), keeps_cache)


@pytest.fixture
def in_kernel(monkeypatch, device):
    """The parameters of the choices that the kernel has made, which on a CPU is transformers' and torch's operators."""
    calls, own = [], decode_loop.KernelChoice.__call__

    def counted(self, *args):
        calls.append(tuple(self.parameters.values()))
        return own(self, *args)

    def choose(logits, noise, temperature, top_k, top_p, min_p, pad, eos, unfinished, tokens):
        assert logits.dtype in sampling.DTYPES and logits.stride(1) == 1
        assert noise is None or (noise.shape == logits.shape and noise.dtype == torch.float32)
        if noise is not None:
            filters = [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
            scores = LogitsProcessorList([*filters, MinPLogitsWarper(min_p)])(None, logits.float())
            logits = scores.softmax(-1) / noise
        chosen = logits.argmax(-1)
        tokens.copy_(chosen if pad is None else torch.where(unfinished, chosen, pad))
        if eos is not None:
            unfinished &= ~torch.isin(tokens, eos)

    monkeypatch.setattr(decode_loop.KernelChoice, "__call__", counted)
    if device.type == "cpu":
        monkeypatch.setattr(sampling, "refusal", lambda _: None)
        monkeypatch.setattr(torch.ops, "kda_hf_cuda", SimpleNamespace(choose_tokens=choose))
    return calls


FILTERS = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.01}


@pytest.mark.parametrize(
    "options, parameters",
    [
        ({}, (1.0, 2**18, 1.0, 0.0)),
        (SAMPLED, (1.0, 2**18, 1.0, 0.0)),
        ({"do_sample": True}, (1.0, 50, 1.0, 0.0)),
        ({"do_sample": True, **FILTERS}, tuple(FILTERS.values())),
        (
            {"do_sample": True, "top_k": 0, "eos_token_id": list(range(3, 40)), "pad_token_id": 1},
            (1.0, 2**18, 1.0, 0.0),
        ),
        ({"eos_token_id": 7, "pad_token_id": 2}, (1.0, 2**18, 1.0, 0.0)),
        ({"do_sample": True, "return_dict_in_generate": True, "output_logits": True}, (1.0, 50, 1.0, 0.0)),
        ({"stopping_criteria": "Watching"}, (1.0, 2**18, 1.0, 0.0)),
        ({"repetition_penalty": 1.2}, (1.0, 2**18, 1.0, 0.0)),
        ({"repetition_penalty": 1.2, "do_sample": True, "temperature": 0.7}, (0.7, 50, 1.0, 0.0)),
        ({"min_new_tokens": 5, "eos_token_id": 7, "pad_token_id": 2}, (1.0, 2**18, 1.0, 0.0)),
        ({"output_logits": True, "return_dict_in_generate": True, "bad_words_ids": [[5]]}, (1.0, 2**18, 1.0, 0.0)),
    ],
)
def test_choices_in_a_kernel(model, options, parameters, in_kernel, served):
    if "stopping_criteria" in options:
        options = {"stopping_criteria": StoppingCriteriaList([Watching(stop_at=12)])}
    assert_same_results(model, prompt(model), options, served)
    has_kernel = sampling.refusal(torch.zeros(1, 97, device=model.device)) is None
    assert set(in_kernel) == ({parameters} if has_kernel else set())


class Doubles(LogitsProcessor):
    """Gives scores that lie otherwise in memory, and are wider."""

    def __call__(self, input_ids, scores):
        return scores.t().contiguous().t().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("before", [[], [Doubles()]], ids=len)
def test_logits_of_other_kinds(device, dtype, before, in_kernel):
    choice = decode_loop.Choice([*before, TopKLogitsWarper(5)], True, None, None)
    logits = torch.randn(97, 3, device=device).t()
    own = decode_loop.KernelChoice.of(choice, logits)
    if own is None:
        pytest.skip("there is no kernel")
    seed, unfinished = torch.seed(), torch.ones(3, dtype=torch.bool, device=device)
    tokens = own(None, logits.to(dtype), unfinished)
    torch.manual_seed(seed)
    assert torch.equal(tokens, choice.tokens(choice.scores(None, logits.contiguous()), unfinished)[0])
    assert unfinished.all() and in_kernel == [(1.0, 5, 1.0, 0.0)]


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "typical_p": 0.5}, {"do_sample": True, "renormalize_logits": True}, ALL],
)
def test_choices_that_no_kernel_makes(model, options, in_kernel, served):
    assert_same_results(model, prompt(model), options, served)
    assert not in_kernel


@pytest.mark.parametrize(
    "processors, do_sample, serves",
    [
        ([], False, True),
        ([TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.5), MinPLogitsWarper(0.1)], True, True),
        ([TemperatureLogitsWarper(0.5)], False, False),
        ([TopPLogitsWarper(0.5), TopKLogitsWarper(5)], True, False),
        ([TopKLogitsWarper(5), TopKLogitsWarper(5)], True, False),
        ([TopKLogitsWarper(5, filter_value=-1e4), TopPLogitsWarper(0.5)], True, False),
        ([TopPLogitsWarper(0.5, min_tokens_to_keep=2)], True, False),
        ([Watching(), TopKLogitsWarper(5)], True, True),
        ([Watching(), TopKLogitsWarper(5), Watching()], True, False),
        ([Watching()], False, True),
    ],
)
def test_which_choices_are_for_a_kernel(monkeypatch, processors, do_sample, serves):
    choice = decode_loop.Choice(processors, do_sample, None, None)
    logits = torch.zeros(2, 97)
    assert decode_loop.KernelChoice.of(choice, logits) is None  # on a CPU
    monkeypatch.setattr(sampling, "refusal", lambda _: None)
    own = decode_loop.KernelChoice.of(choice, logits)
    assert (own is not None) is serves
    assert own is None or own.before == [process for process in processors if isinstance(process, Watching)]


class Constant:
    """Steps that take no time. From the first to the last of `strict` ones, the host must not wait for a GPU."""

    def __init__(self, logits, strict):
        self.logits, self.strict = logits, strict

    def step(self, tokens):
        if self.strict:
            torch.cuda.set_sync_debug_mode("error")
        return self.logits

    def finish(self):
        if self.strict:
            torch.cuda.set_sync_debug_mode("default")


def decode(device, criteria, strict=False, **options):
    logits, ids = torch.randn(2, 97, device=device), torch.ones(2, 4, dtype=torch.long, device=device)
    criteria = StoppingCriteriaList([MaxLengthCriteria(30, 20), *criteria])
    config = SimpleNamespace(do_sample=False, return_dict_in_generate=False, _pad_token_tensor=torch.tensor(0))
    start = lambda *_: Constant(logits, strict)  # noqa: E731
    return decode_loop.decode(logits, start, ids, LogitsProcessorList(), criteria, config, **options)


def test_the_length_alone_is_known_without_a_look_at_tensors(device):
    class Looks(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    with Looks() as looks:
        assert decode(device, [])[0].shape == (2, 30)
        assert not looks.seen
        decode(device, [EosTokenCriteria([-1])])
        assert looks.seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which one could wait for")
@pytest.mark.parametrize("criteria", [[], [EosTokenCriteria([-1])], [EosTokenCriteria([-1, -2])]], ids=len)
def test_nothing_waits_for_the_gpu_but_an_event(criteria):
    assert decode(torch.device("cuda"), criteria, strict=True, run_ahead=True)[0].shape == (2, 30)


# ------------------------------------------------------------------------------------------------- what is not for this


def _compiled_module(model):
    model.compile(backend="eager", dynamic=True)


def _hooked(model):
    model.model.norm.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"compile_config": CompileConfig(), "cache_implementation": "static"},
        {"model": _compiled_module},
        {"model": _hooked},
        {"logits_to_keep": torch.tensor([-1])},
        {"cu_seqlens": None},
        {"synced_gpus": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_not_served(model, options, served, monkeypatch):
    options = dict(options)
    if "model" in options:
        options.pop("model")(model)
    if "compile_config" in options:
        options["compile_config"]._compile_all_devices = True
        monkeypatch.setattr(type(model), "get_compiled_call", lambda self, _: self.__call__)
    if "synced_gpus" in options:
        monkeypatch.setattr(type(model), "_has_unfinished_sequences", lambda _, finished, *args, **kwargs: not finished)
    if "output_attentions" in options:
        model.set_attn_implementation("eager")
    ids = prompt(model, batch=1)
    output = model.generate(ids, **options)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    assert not served and sequences.shape == (1, 9 + NEW)


def test_a_direct_call_is_not_served(model, served):
    """Without `generate()`, no program is active; and with gradients none may be."""
    config, ids = model.generation_config, prompt(model)
    config._pad_token_tensor, config.is_assistant = None, False
    criteria = StoppingCriteriaList([MaxLengthCriteria(length) for length in (15, 12, 13)])

    def call():
        kwargs = {"use_cache": True, CACHE_NAME: KDACache(model.config, max_rollback=0)}
        return model._sample(ids, LogitsProcessorList(), criteria, config, **kwargs)

    with torch.no_grad():
        call()
    with decoding.decode_program(model):
        call()
        assert not served
        with torch.no_grad():
            assert call().shape == (3, 12)
            config.output_hidden_states = True
            assert call().shape == (3, 12)
    assert len(served) == 1
