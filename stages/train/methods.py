"""All that a method is: its terms, its defaults, and how figures show it. A new method is one entry in `METHODS`.

In: a method's name and the settings that a user gave. Out: a checked `Objective`, which `objectives.py` computes.
Imports no torch, so that the command line lists methods at once.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from ...cache.errors import UserError

MethodName = Literal["fpo", "dpo", "simpo", "tdpo1", "tdpo2", "simpo-kl"]


class Look(NamedTuple):
    """How figures draw a method: colour, marker and line (matplotlib's)."""

    colour: str
    marker: str
    line: Literal["-", "--", "-.", ":"] | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Method:
    """What distinguishes one method from another.

    Attributes:
        per_token: whether log-probabilities are divided by the response's length in the LPD and in the margin.
        reference_margin: whether the margin is the reference's LPD; if not, it is the constant γ.
        divergence: what the constraint δ is made of.
        defaults: the method's settings (method.md section 4); a setting that is not named here has no effect on it.
        label: what tables and figures call it.
        look: how figures draw it.
    """

    per_token: bool
    reference_margin: bool
    divergence: Literal["features", "kl"] | None
    defaults: dict[str, float | bool]
    label: str
    look: Look


# Colours of Okabe and Ito, which colour-blind readers tell apart; their yellow is too faint on white.
METHODS: dict[str, Method] = {
    "dpo": Method(False, True, None, {"beta": 0.1}, "DPO", Look("#000000", "s", "--")),
    "simpo": Method(True, False, None, {"beta": 2.0, "gamma": 0.5}, "SimPO", Look("#E69F00", "D", ":")),
    "tdpo1": Method(False, True, "kl", {"beta": 0.1}, "TDPO-1", Look("#56B4E9", "^", "-.")),
    "tdpo2": Method(
        per_token=False,
        reference_margin=True,
        divergence="kl",
        defaults={"beta": 0.1, "alpha": 0.5, "stop_gradient": True},
        label="TDPO-2",
        look=Look("#0072B2", "v", (0, (5, 1, 1, 1, 1, 1))),
    ),
    "simpo-kl": Method(
        per_token=True,
        reference_margin=False,
        divergence="kl",
        defaults={"beta": 2.0, "gamma": 0.5, "alpha": 0.5, "kl_beta": 0.1, "stop_gradient": True},
        label="SimPO+KL",
        look=Look("#CC79A7", "P", (0, (3, 1))),
    ),
    "fpo": Method(
        per_token=True,
        reference_margin=True,
        divergence="features",
        defaults={"beta": 0.1, "alpha": 0.5, "stop_gradient": True},
        label="FPO",
        look=Look("#D55E00", "o", "-"),
    ),
}


@dataclass(frozen=True)
class Objective:
    """A method with its settings.

    Attributes:
        method: one of `METHODS`.
        beta: β, scales log-probabilities and divergences.
        alpha: α, weight of the constraint (0 switches it off).
        gamma: γ, the constant margin of SimPO.
        kl_beta: β of SimPO+KL's divergence, whose own β is that of SimPO.
        stop_gradient: whether the chosen response's divergence carries no gradient (sg).
    """

    method: MethodName
    beta: float
    alpha: float = 1.0
    gamma: float = 0.0
    kl_beta: float | None = None
    stop_gradient: bool = False

    @property
    def rule(self) -> Method:
        """What distinguishes this objective's method."""
        return METHODS[self.method]


def make_objective(method: str, **settings: float | bool | None) -> Objective:
    """A method with its defaults, overridden by the settings that are not None.

    Args:
        method: one of `METHODS`.
        settings: fields of `Objective`.

    Raises:
        UserError: if the method is unknown, or ignores a setting that was given, or a setting is out of range.
    """
    if method not in METHODS:
        raise UserError(f"method: expected one of {', '.join(METHODS)}, found '{method}'")
    given = {name: value for name, value in settings.items() if value is not None}
    defaults = METHODS[method].defaults
    for name in given:
        if name not in {field.name for field in fields(Objective)}:
            raise UserError(f"setting: expected one of {', '.join(defaults)}, found '{name}'")
        if name not in defaults:
            option = "--no-stop-gradient" if name == "stop_gradient" else f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: method {method} ignores it (it reads {', '.join(defaults)}); leave it out")
    values = defaults | given
    for name, value in values.items():  # not (a < b) refuses NaN too
        if name in ("beta", "kl_beta") and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, found {value}")
        if name == "alpha" and not 0 <= value < math.inf:
            raise UserError(f"--alpha: expected a number that is not negative, found {value}")
        if name == "gamma" and not math.isfinite(value):
            raise UserError(f"--gamma: expected a number, found {value}")
    return Objective(method=method, **values)  # type: ignore[arg-type]
