"""What a run says and changes before it begins."""

import pytest

from configs import sd15, tiny
from spo_jax import methods
from spo_jax.errors import UserError
from spo_jax.kernels.attention import describe_choice


def test_remat_is_off_on_a_cpu_and_a_sentence_says_so(capsys):
    config = sd15.get_config()
    assert config.remat and methods.without_remat_on_cpu(config, "tpu").remat
    assert not methods.without_remat_on_cpu(config, "cpu").remat
    assert "config.remat is off on a CPU" in capsys.readouterr().err
    assert config.remat, "the config itself stays"
    methods.without_remat_on_cpu(tiny.get_config(), "cpu")
    assert not capsys.readouterr().err


def test_a_run_says_which_attention_it_takes():
    assert describe_choice("auto", "cpu", "float32").startswith("attention by xla (")
    assert describe_choice("auto", "cuda", "bfloat16").startswith("attention by cudnn, and by xla where")
    assert "splash" in describe_choice("auto", "tpu", "bfloat16")


@pytest.mark.parametrize(
    "kind, message", [("splash", "is for TPUs, and this is a cpu"), ("flash", "must be auto or xla")]
)
def test_an_attention_that_cannot_run_ends_a_run_before_it_begins(tmp_path, kind, message):
    config = tiny.get_config()
    config.attention = kind
    config.prompts_per_batch = config.train.minibatch_size = 8
    with pytest.raises(UserError, match=message):
        methods.train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()
