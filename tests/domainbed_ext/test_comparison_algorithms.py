"""The comparison routers as algorithms: their hyper-parameters, and that they learn."""

import pytest

from domainbed_ext.algorithms import get_algorithm_class
from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import default_hparams, random_hparams, validate_hparams
from domainbed_ext.jobs import TrainArgs
from domainbed_ext.router_hparams import DEEPSEEK_SETTINGS
from domainbed_ext.scripts.train import train
from gmoe_ltdr import preset

# What 200 steps of the defaults were measured to reach on the digits turned by 45 degrees, an angle
# that no training image has; seed 0, one thread. The dense ViT: .846, LTDR: .867.
MEASURED = {"INSTRUCT": 0.858, "DEEPSEEK": 0.825}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_digits_are_learnt(tmp_path, name):
    args = TrainArgs(
        algorithm=name,
        dataset="RotatedDigits",
        test_envs=(3,),
        steps=200,
        checkpoint_freq=199,
        device="cpu",
        output_dir=str(tmp_path),
    )
    assert train(args)[-1]["env3_in_acc"] > MEASURED[name] - 0.08


def spec_of(name: str, **changes):
    hparams = {**default_hparams(name, "Debug28"), **changes}
    return get_algorithm_class(name)((3, 28, 28), 2, 2, hparams).spec


@pytest.mark.parametrize("setting", DEEPSEEK_SETTINGS)
def test_deepseek_settings_are_the_presets(setting):
    spec = spec_of("DEEPSEEK", deepseek_setting=setting)
    assert spec == preset(f"deepseek_{setting}", gate="linear", noise_std=0.0)
    changed = spec_of(
        "DEEPSEEK", deepseek_setting=setting, deepseek_top_k=2, deepseek_init_scale_shared=0.5
    )
    assert (changed.top_k, changed.init_scale_shared) == (2, 0.5)


def test_deepseek_hparams():
    draws = [random_hparams("DEEPSEEK", "PACS", seed)["deepseek_setting"] for seed in range(40)]
    assert set(draws) == set(DEEPSEEK_SETTINGS)
    with pytest.raises(UsageError, match="unknown hparam 'moe_num_experts'"):
        validate_hparams({"moe_num_experts": 6}, "DEEPSEEK", "PACS")
    with pytest.raises(UsageError, match=r"deepseek_setting='2x1\.0'"):
        validate_hparams({"deepseek_setting": "2x1.0"}, "DEEPSEEK", "PACS")
    with pytest.raises(UsageError, match="top_k=4 must lie between 1 and num_experts=3"):
        spec_of("DEEPSEEK", deepseek_setting="1x1.0+3x1.0", deepseek_top_k=4)
