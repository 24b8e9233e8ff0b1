import math

import pytest
from fpo.stages.train.methods import METHODS, make_objective


def test_defaults_are_those_of_the_table():
    assert {name: method.defaults for name, method in METHODS.items()} == {
        "dpo": {"beta": 0.1},
        "tdpo1": {"beta": 0.1},
        "tdpo2": {"beta": 0.1, "alpha": 0.5, "stop_gradient": True},
        "simpo": {"beta": 2.0, "gamma": 0.5},
        "simpo-kl": {"beta": 2.0, "gamma": 0.5, "alpha": 0.5, "kl_beta": 0.1, "stop_gradient": True},
        "fpo": {"beta": 0.1, "alpha": 0.5, "stop_gradient": True},
    }
    for name, method in METHODS.items():
        made = make_objective(name, beta=None, alpha=None)
        assert all(getattr(made, setting) == value for setting, value in method.defaults.items())
        assert made.rule is method


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ppo", {}, r"method: expected one of dpo, simpo, tdpo1, tdpo2, simpo-kl, fpo, found 'ppo'"),
        ("dpo", {"delta": 1.0}, "setting: expected one of beta, found 'delta'"),
        ("dpo", {"alpha": 0.0}, r"--alpha: method dpo ignores it \(it reads beta\); leave it out"),
        ("simpo", {"stop_gradient": False}, "--no-stop-gradient: method simpo ignores it"),
        ("fpo", {"gamma": 0.5}, "--gamma: method fpo ignores it"),
        ("tdpo1", {"alpha": 1.0}, "--alpha: method tdpo1 ignores it"),
        ("fpo", {"kl_beta": 0.1}, "--kl-beta: method fpo ignores it"),
        ("fpo", {"beta": 0.0}, "--beta: expected a number above 0, found 0.0"),
        ("fpo", {"beta": math.nan}, "--beta: expected a number above 0, found nan"),
        ("simpo-kl", {"kl_beta": -1.0}, "--kl-beta: expected a number above 0, found -1.0"),
        ("fpo", {"alpha": -0.1}, "--alpha: expected a number that is not negative, found -0.1"),
        ("fpo", {"alpha": math.inf}, "--alpha: expected a number that is not negative, found inf"),
        ("simpo", {"gamma": math.nan}, "--gamma: expected a number, found nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        make_objective(method, **settings)
