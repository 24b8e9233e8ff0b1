"""Settings of a training, as the Trainer takes them.

In: values by name. Out: `RowConfig`, a checked `transformers.TrainingArguments` with the paper's defaults and the token
budget, which every training on packed rows has; `FPOConfig`, those and the objective.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ...cache.errors import UserError
from ..model.models import Recipe
from .methods import make_objective
from .schedules import check_name, check_settings


@dataclass
class RowConfig(TrainingArguments):
    """Settings of a `RowTrainer`: the Trainer's own with the paper's defaults (Table 5), and the token budget.

    `bf16` selects the compute recipe; `per_device_train_batch_size` counts pairs, or conversations.
    """

    token_budget: int = field(default=2048, metadata={"help": "Tokens of a packed row, the unit of one backward."})

    compile_layers: bool = field(default=False, metadata={"help": "Compile decoder layers, one by one."})

    checkpoint_every: int = field(
        default=1,
        metadata={"help": "With activation_checkpointing: every n-th layer is recomputed, the first among them."},
    )

    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Schedule after warm-up."})
    warmup_steps: float = field(default=150, metadata={"help": "Linear warm-up, steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Pairs a step and device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Pairs an evaluation batch."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step: its loss says how it began."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite is shown."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Unused: there are no columns."})
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"use_reentrant": False},
        metadata={"help": "Non-reentrant: under the other kind a hook inside a layer gets no gradient."},
    )

    def __post_init__(self) -> None:
        """Checks what the Trainer cannot know.

        Raises:
            UserError: if reentrant checkpointing is asked for, or the schedule cannot be used (`schedules.py`).
        """
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        check_name(schedule)
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_settings(schedule, self.schedule_settings)
        kwargs = self.activation_checkpointing_kwargs
        if isinstance(kwargs, dict) and kwargs.get("use_reentrant", True):
            raise UserError("activation_checkpointing_kwargs: expected use_reentrant=False; features need gradients")

    @property
    def schedule_settings(self) -> dict[str, Any]:
        """The schedule's own settings."""
        return self.lr_scheduler_kwargs or {}  # type: ignore[return-value]  # JSON was read before

    @property
    def recipe(self) -> Recipe:
        """The compute recipe."""
        return "bf16" if self.bf16 else "fp32"

    @property
    def n_gpu(self) -> int:
        """At most one: several GPUs are the ranks of a launcher, never `DataParallel`."""
        return min(1, int(super().n_gpu))


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
            UserError: as `RowConfig`; if the objective's settings do not fit the method.
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
