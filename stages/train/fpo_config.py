"""Settings of stage two, as the Trainer takes them.

In: what a user sets. Out: `FPOConfig`, the settings of a `RowTrainer` and the objective.
"""

from dataclasses import dataclass, field

from .methods import make_objective
from .row_config import RowConfig


@dataclass
class FPOConfig(RowConfig):
    """Settings of `FPOTrainer`: those of the objective, and those that every training has.

    `bf16` selects the compute recipe and must be the cache's; `per_device_train_batch_size` counts pairs.
    """

    method: str = field(default="fpo", metadata={"help": "Objective: fpo, dpo, simpo, tdpo1, tdpo2 or simpo-kl."})
    beta: float | None = field(default=None, metadata={"help": "β; None for the method's default."})
    alpha: float | None = field(default=None, metadata={"help": "α, weight of the constraint."})
    gamma: float | None = field(default=None, metadata={"help": "γ, SimPO's constant margin."})
    kl_beta: float | None = field(default=None, metadata={"help": "β of SimPO+KL's constraint."})
    stop_gradient: bool | None = field(default=None, metadata={"help": "Hold D(y_w) fixed in the constraint."})
    top_k: int = field(default=50, metadata={"help": "k of D_F, features."})
    parity_pairs: int = field(default=8, metadata={"help": "Cached pairs scored before the first step."})
    allow_different_start: bool = field(
        default=False, metadata={"help": "Train although the policy is not the cache's reference."}
    )

    def __post_init__(self) -> None:
        """Makes the objective.

        Raises:
            ValueError: as `RowConfig`; if the objective's settings do not fit the method.
        """
        super().__post_init__()
        self.objective = make_objective(
            self.method,
            beta=self.beta,
            alpha=self.alpha,
            gamma=self.gamma,
            kl_beta=self.kl_beta,
            stop_gradient=self.stop_gradient,
        )
