"""KDAConfig: defaults, round trip, and errors that name the field."""

import pytest

from kda_hf import KDAConfig


def test_default_layers_are_three_to_one():
    config = KDAConfig(num_hidden_layers=8)
    assert config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2


def test_no_rope_by_default():
    assert KDAConfig().rope_parameters is None


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}]
)
def test_rope(rope):
    assert KDAConfig(**rope).rope_parameters == {"rope_type": "default", "rope_theta": 500.0}


def test_the_decay_has_the_rank_of_a_key_by_default():
    assert KDAConfig(linear_head_dim=64, linear_value_head_dim=32).linear_decay_low_rank_dim == 64


@pytest.mark.parametrize("rope", [None, {"rope_type": "default", "rope_theta": 500.0}])
@pytest.mark.parametrize("lower_bound", [None, -5.0, -2.5])
def test_round_trip(tmp_path, rope, lower_bound):
    config = KDAConfig(
        rope_parameters=rope, linear_lower_bound=lower_bound, linear_num_heads=2, linear_num_value_heads=4
    )
    config.save_pretrained(tmp_path)
    assert KDAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "field, value",
    [
        ("linear_lower_bound", -5.5),
        ("linear_lower_bound", 0.5),
        ("linear_num_value_heads", 3),
        ("linear_num_heads", 0),
        ("linear_head_dim", 0),
        ("linear_conv_kernel_dim", 0),
        ("linear_decay_low_rank_dim", 0),
        ("linear_output_gate_bias", "yes"),
        ("layer_types", ["linear_attention"]),
        ("layer_types", ["sliding_attention"] * 24),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 0),
        ("rms_norm_eps", 0.0),
        ("hidden_size", "wide"),
        ("vocab_size", 0),
        ("allow_neg_eigval", "yes"),
    ],
)
def test_bad_values_name_the_field(field, value):
    with pytest.raises(Exception, match=field):
        KDAConfig(**{field: value})
