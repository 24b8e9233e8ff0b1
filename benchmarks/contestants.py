"""The contestants: `fpo align` and TRL's trainers, on the same token ids, model, precision and batch.

In: a contestant's name, and a folder that `prepare.prepare` filled. Out: seconds a pair (of the median step) and peak
memory of the measured steps; loading, tokenising, the parity check, TRL's precomputed pass and the warm-up steps are
not counted.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo.cache.reader import open_cache
from fpo.cache.schema import Pair
from fpo.stages.model.sae import load_sae
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.config import FPOConfig
from fpo.stages.train.methods import METHODS
from transformers import TrainerCallback

from .measuring import Meter, Result
from .prepare import cached_pairs
from .setting import Setting, attention_of, load


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Attributes:
        title: its name in tables.
        method: the method, by the name that `fpo align` gives it.
        trl: whether TRL trains it.
        checkpointing: whether activations are checkpointed.
        precomputed: whether TRL computes the reference's log-probs beforehand.
    """

    title: str
    method: str
    trl: bool = False
    checkpointing: bool = False
    precomputed: bool = False


CONTESTANTS: Mapping[str, Contestant] = {
    "fpo": Contestant("`fpo align`, FPO", "fpo"),
    "simpo": Contestant("`fpo align`, SimPO", "simpo"),
    "dpo": Contestant("`fpo align`, DPO", "dpo"),
    "tdpo1": Contestant("`fpo align`, TDPO-1", "tdpo1"),
    "tdpo2": Contestant("`fpo align`, TDPO-2", "tdpo2"),
    "fpo-ckpt": Contestant("`fpo align`, FPO, checkpointing", "fpo", checkpointing=True),
    "simpo-ckpt": Contestant("`fpo align`, SimPO, checkpointing", "simpo", checkpointing=True),
    "dpo-ckpt": Contestant("`fpo align`, DPO, checkpointing", "dpo", checkpointing=True),
    "tdpo1-ckpt": Contestant("`fpo align`, TDPO-1, checkpointing", "tdpo1", checkpointing=True),
    "tdpo2-ckpt": Contestant("`fpo align`, TDPO-2, checkpointing", "tdpo2", checkpointing=True),
    "trl-simpo-ckpt": Contestant("TRL CPOTrainer, SimPO, checkpointing", "simpo", True, True),
    "trl-simpo": Contestant("TRL CPOTrainer, SimPO", "simpo", True),
    "trl-dpo-precomputed-ckpt": Contestant("TRL DPOTrainer, precomputed, checkpointing", "dpo", True, True, True),
    "trl-dpo-precomputed": Contestant("TRL DPOTrainer, precomputed", "dpo", True, False, True),
    "trl-dpo-ckpt": Contestant("TRL DPOTrainer, checkpointing", "dpo", True, True),
    "trl-dpo": Contestant("TRL DPOTrainer", "dpo", True),
}


class Steps(TrainerCallback):
    """Starts a meter after the warm-up steps, reads it after the last one, and times each step between.

    Attributes:
        result: what the meter read.
        seconds: time of each measured step.
    """

    def __init__(self, meter: Meter, setting: Setting) -> None:
        self._meter, self._setting = meter, setting
        self.result: Result = {}
        self.seconds: list[float] = []
        self._before = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resets or reads the meter."""
        if state.global_step > self._setting.warmup:
            self.seconds.append(self._meter.now() - self._before)
        self._before = self._meter.now()
        if state.global_step == self._setting.warmup:
            self._meter.reset()
        elif state.global_step == self._setting.warmup + self._setting.steps:
            self.result = self._meter.read()


def train(setting: Setting, folder: Path, name: str) -> Result:
    """Trains one contestant on the cache's pairs, once."""
    contestant = CONTESTANTS[name]
    trainer = (trl_trainer if contestant.trl else our_trainer)(setting, folder, contestant)
    with Meter(setting.device) as meter:
        steps = Steps(meter, setting)
        trainer.add_callback(steps)
        trainer.train()
    # The median: a compiler may meet a row of a new kind in any step.
    timed = {"seconds_a_pair": statistics.median(steps.seconds) / setting.batch, "steps": steps.seconds}
    return steps.result | timed


def common(setting: Setting, folder: Path) -> dict[str, Any]:
    """The Trainer's settings that all contestants share."""
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": setting.batch,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": 5e-7,
        "warmup_steps": 0,
        "optim": setting.optimizer,
        "bf16": setting.recipe == "bf16",
        "use_cpu": setting.device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": setting.device == "cuda",
        "seed": 0,
    }


def our_trainer(setting: Setting, folder: Path, contestant: Contestant) -> Any:
    """`FPOTrainer`, as `fpo align` builds it."""
    divergence = METHODS[contestant.method].divergence
    saes = [load_sae(str(folder / "sae"), device=setting.device)] if divergence == "features" else []
    attention = attention_of(setting, folder)
    args = FPOConfig(
        **common(setting, folder),
        method=contestant.method,
        activation_checkpointing=contestant.checkpointing,
        token_budget=setting.token_budget,
        compile_layers=setting.device == "cuda",
        parity_pairs=1,
    )
    return FPOTrainer(
        load(setting, folder, attention),
        args,
        open_cache(folder / "cache", sites=[sae.site.name for sae in saes]),
        saes=saes,
        reference=load(setting, folder, attention) if divergence == "kl" else None,
    )


def trl_trainer(setting: Setting, folder: Path, contestant: Contestant) -> Any:
    """TRL's trainer on the cache's token ids, with the attention that transformers chooses."""
    # TRL sets the old name by default; the new name would override it.
    shared = common(setting, folder) | {"gradient_checkpointing": contestant.checkpointing}
    shared |= {"max_length": setting.max_length}
    policy = load(setting, folder, None)
    pairs = cached_pairs(folder)
    if contestant.method == "simpo":
        return cpo_trainer(policy, shared, pairs)
    reference = None if contestant.precomputed else load(setting, folder, None)
    return dpo_trainer(policy, reference, shared, pairs)


def dpo_trainer(policy: Any, reference: Any, settings: dict[str, Any], pairs: Sequence[Pair]) -> Any:
    """A `DPOTrainer` on token ids; without a reference model it precomputes the log-probs."""
    from trl import DPOConfig, DPOTrainer

    class OnTokens(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    args = DPOConfig(**settings, beta=0.1, precompute_ref_log_probs=reference is None)
    return OnTokens(policy, ref_model=reference, args=args, train_dataset=token_ids(pairs), processing_class=filler())


def cpo_trainer(policy: Any, settings: dict[str, Any], pairs: Sequence[Pair]) -> Any:
    """A `CPOTrainer` with SimPO's loss on token ids."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class OnTokens(CPOTrainer):  # type: ignore[misc]
        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
            prompt, made = feature["prompt_ids"], {}
            for side in ("chosen", "rejected"):
                ids = prompt + feature[f"{side}_ids"]
                made[f"{side}_input_ids"], made[f"{side}_attention_mask"] = ids, [1] * len(ids)
                made[f"{side}_labels"] = [-100] * len(prompt) + ids[len(prompt) :]
            return made

    args = CPOConfig(**settings, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5)
    return OnTokens(policy, args=args, train_dataset=token_ids(pairs), processing_class=filler())


def token_ids(pairs: Sequence[Pair]) -> Any:
    """The token ids of pairs as a data set, under TRL's column names."""
    import datasets

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return datasets.Dataset.from_list([{name: getattr(pair, name).tolist() for name in names} for pair in pairs])


def filler() -> Any:
    """A tokenizer that TRL asks for the padding id alone: the pairs are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<pad>", bos_token="<pad>")
