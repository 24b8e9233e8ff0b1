from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fpo.cache.reader import Cache
from fpo.stages.model.sae import SiteSAE
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.config import FPOConfig
from fpo.stages.train.methods import METHODS
from pairs import assert_same_gradients, calm_gemma2, dense_drift, gradients, score_alone
from tiny import tiny_sae
from tiny_world import SITES, World
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback


class KeepGradients(TrainerCallback):
    """The gradient of the last step, after all of its batches."""

    found: dict[str, Tensor]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def trainer(world, tmp_path_factory) -> Callable[..., FPOTrainer]:
    """A trainer of one step over the whole training cache, unless told otherwise."""

    def make(
        method: str = "fpo",
        policy: Any = None,
        cache: Cache | None = None,
        eval_cache: Cache | None = None,
        sites: Sequence[int] = (0,),
        saes: Sequence[SiteSAE] | None = None,
        callbacks: Any = None,
        attention: str = "packed",
        **settings: Any,
    ) -> FPOTrainer:
        features = METHODS[method].divergence == "features"
        defaults = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False}
        defaults |= {"disable_tqdm": True, "warmup_steps": 0, "per_device_train_batch_size": 12, "max_grad_norm": 0.0}
        return FPOTrainer(
            world.policy(attention) if policy is None else policy,
            FPOConfig(output_dir=str(tmp_path_factory.mktemp("run")), method=method, **(defaults | settings)),
            world.open(sites if features else ()) if cache is None else cache,
            eval_cache,
            saes=([world.load_sae(site) for site in sites] if saes is None else saes) if features else (),
            reference=world.policy(attention) if METHODS[method].divergence == "kl" else None,
            callbacks=callbacks,
        )

    return make


@pytest.fixture
def moved(world) -> Any:
    """A policy that has moved away from the reference."""
    return move(world.policy())


def move(policy: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for weight in policy.parameters():
        weight.data += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    return policy


def losses_alone(policy: Any, cache: Cache, sae: SiteSAE | None, alpha: float, beta: float = 0.1) -> dict[str, Tensor]:
    """FPO (with an SAE) or DPO of every pair by plain transformers, one sequence at a time (method.md section 2)."""
    lpds, margins, deltas = [], [], []
    for i in range(len(cache)):
        row = cache[i]
        sides = score_alone(policy, row.pair, [sae.site] if sae else [])
        scale = [beta / side.num_tokens if sae else beta for side in (row.chosen, row.rejected)]
        logps = [side.token_logps_T.double().sum() for side in sides]
        lpds.append(scale[0] * logps[0] - scale[1] * logps[1])
        margins.append(scale[0] * row.chosen.logp - scale[1] * row.rejected.logp)
        if sae:
            drifts = []
            for side, cached in zip(sides, (row.chosen, row.rejected), strict=True):
                reference_M = torch.zeros(sae.width)
                reference_M[cached.features[0].ids.astype("int64")] = torch.from_numpy(cached.features[0].values.copy())
                drifts.append(dense_drift(side.pooled_M(sae), reference_M, 50))
            deltas.append(alpha * beta * (drifts[1] - drifts[0].detach()))
    lpd, delta = torch.stack(lpds), torch.stack(deltas) if deltas else torch.zeros(len(lpds))
    loss = -torch.nn.functional.logsigmoid(lpd - torch.tensor(margins).double() - delta)
    return {"loss": loss, "lpd": lpd, "delta": delta}


def one_step(make: Callable[..., FPOTrainer], **settings: Any) -> tuple[dict[str, Tensor], float]:
    """Gradient and logged loss of one optimiser step from a policy that has moved."""
    keep = KeepGradients()
    trainer = make(callbacks=[keep], max_steps=1, allow_different_start=True, **settings)
    trainer.train()
    return keep.found, first_step(trainer)["loss"]


def first_step(trainer: FPOTrainer) -> dict[str, float]:
    return next(line for line in trainer.state.log_history if "loss" in line)


# The loss and its gradient.


@pytest.fixture(scope="module")
def one_row(world, trainer) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss with all pairs in one row."""
    return one_step(trainer, policy=move(world.policy()), token_budget=10_000)


@pytest.mark.parametrize("method", ["fpo", "dpo"])
def test_loss_and_gradient_are_the_mean_over_pairs_of_what_plain_transformers_gives(world, trainer, moved, method):
    cache, sae = world.open((0,) if method == "fpo" else ()), world.load_sae() if method == "fpo" else None
    alone = losses_alone(moved, cache, sae, alpha=0.5)["loss"].mean()
    expected, alone = gradients(moved, alone), alone.item()
    found, loss = one_step(trainer, method=method, policy=moved)
    assert loss == pytest.approx(alone, rel=1e-6)
    assert_same_gradients(found, expected, 1e-4)


@pytest.mark.parametrize(
    ("batch", "accumulation", "budget"), [(12, 1, 1), (12, 1, 160), (6, 2, 10_000), (5, 3, 160), (1, 12, 160)]
)
def test_the_gradient_does_not_depend_on_how_pairs_are_packed_and_accumulated(
    world, trainer, one_row, batch, accumulation, budget
):
    expected, loss = one_row
    found, other = one_step(
        trainer,
        policy=move(world.policy()),
        token_budget=budget,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    assert other == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(found, expected, 1e-5)


def test_activation_checkpointing_changes_no_gradient(world, trainer):
    expected, loss = one_step(trainer, policy=move(world.policy()))
    found, other = one_step(trainer, policy=move(world.policy()), activation_checkpointing=True)
    assert other == loss
    assert_same_gradients(found, expected, 1e-6)


class ReadsAndConstants(TorchDispatchMode):
    """Counts what a GPU's host would wait for: numbers read from tensors, and tensors made of the host's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().split(".")[0] in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["fpo", "dpo", "tdpo2"])
def test_no_row_of_a_training_step_waits_for_the_device(world, trainer, method):
    # `packed` is for CPUs and makes its indices from lists; a device takes flex, where eager stands in here.
    run = trainer(method, attention="eager", token_budget=1)
    batch = run.data_collator([run.train_dataset[i] for i in range(6)])
    run._even_out([batch])
    assert len(batch["rows"]) == 6
    with ReadsAndConstants() as found:
        for row in batch["rows"]:
            run.row_losses(run.policy, row, "train").loss.sum().backward()
    assert found.count == 0


def test_alpha_0_is_length_normalised_dpo(world, trainer, moved):
    alone = losses_alone(moved, world.open(), world.load_sae(), alpha=0.0)["loss"].mean()
    expected, alone = gradients(moved, alone), alone.item()
    found, loss = one_step(trainer, policy=moved, alpha=0.0)
    assert loss == pytest.approx(alone, rel=1e-6)
    assert_same_gradients(found, expected, 1e-4)


@pytest.mark.slow
def test_the_constraint_pulls(world, trainer):
    off, _ = one_step(trainer, policy=move(world.policy()), alpha=0.0)
    on, _ = one_step(trainer, policy=move(world.policy()), alpha=2.0)
    with pytest.raises(AssertionError):
        assert_same_gradients(on, off, 1e-2)


def test_the_gradient_ratio_is_that_of_the_constraint_to_the_rest_at_the_lowest_read_layer(world, trainer, moved):
    parts = losses_alone(moved, world.open(), world.load_sae(), alpha=0.5)
    slope = 1 - torch.exp(-parts["loss"].detach())
    weights = list(moved.model.layers[SITES[0].layer].parameters())
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad((slope * part).sum(), weights, retain_graph=True)]).norm()
        for part in (parts["delta"], parts["lpd"])
    ]
    run = trainer(policy=moved, max_steps=1, allow_different_start=True, token_budget=10_000)
    run.train()
    line = first_step(run)
    assert line["constraint/grad_ratio"] == pytest.approx(float(norms[0] / norms[1]), rel=1e-3)
    assert line["constraint/delta"] == pytest.approx(parts["delta"].mean().item(), rel=1e-3)


def test_several_sites_count_by_their_mean(world, trainer, moved):
    found = []
    for sites in ((0,), (1,), (0, 1), (1, 0)):
        run = trainer(policy=moved, sites=sites, eval_cache=world.open(sites, "eval_cache"))
        found.append(run.evaluate())
    for side in ("chosen", "rejected"):
        first, second, both, turned = (line[f"eval_features/mse_{side}"] for line in found)
        assert both == pytest.approx((first + second) / 2) == pytest.approx(turned)
        assert first != pytest.approx(second)


@pytest.mark.parametrize("batch", [7, 5, 2])
def test_an_evaluation_is_the_plain_mean_over_pairs_whatever_the_batches(world, trainer, moved, batch):
    cache = world.open((), "eval_cache")
    with torch.no_grad():
        alone = losses_alone(moved, cache, None, alpha=0.0)
    run = trainer(method="dpo", policy=moved, eval_cache=cache, per_device_eval_batch_size=batch)
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(float(alone["loss"].mean()), rel=1e-5)
    assert run.state.log_history[-1]["eval_loss"] == found["eval_loss"]


# Parity.


def swap_sides(cache: Cache) -> Cache:
    """The same cache, what the reference said of chosen and rejected exchanged."""

    class Swapped(Cache):
        def __getitem__(self, i: int) -> Any:
            row = super().__getitem__(i)
            return type(row)(row.pair, row.rejected, row.chosen)

    return Swapped(cache.folder, cache.manifest, cache.sites, cache._decoded)


def shift(policy: Any, scale: float) -> Any:
    policy.model.layers[0].mlp.up_proj.weight.data[:5] *= 1 + scale
    return policy


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda w: {"policy": another_model(w)}, "log-probs"),
        (lambda w: {"policy": shift(w.policy(), 0.01)}, "log-probs"),
        (lambda w: {"cache": swap_sides(w.open())}, "log-probs"),
    ],
    ids=["another model", "moved weights", "swapped sides"],
)
def test_a_policy_that_is_not_what_the_cache_was_made_with_does_not_start(world, trainer, change, what):
    run = trainer(max_steps=1, **change(world))
    before = {name: weight.clone() for name, weight in run.policy.named_parameters()}
    with pytest.raises(ValueError, match=rf"\Apolicy and cache differ[^\n]*{what}[^\n]*--allow-different-start\Z"):
        run.train()
    for name, weight in run.policy.named_parameters():
        assert torch.equal(weight, before[name])


def test_an_sae_that_the_cache_was_not_made_with_is_refused(world, trainer):
    with pytest.raises(ValueError, match=r"--sae: the cache's features at .* are of another SAE than tiny"):
        trainer(saes=[tiny_sae(seed=5, site=SITES[0])])
    with pytest.raises(ValueError, match=f"expected sites {SITES[1].name}, found {SITES[0].name}"):
        trainer(saes=[world.load_sae(1)])


def another_model(world: World) -> Any:
    policy = world.policy()
    policy.load_state_dict(calm_gemma2(1, vocab_size=policy.config.vocab_size).state_dict())
    return policy


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_weights_that_are_not_finite_do_not_start(world, trainer, name):
    policy = world.policy()
    policy.model.layers[2].mlp.up_proj.weight.data[0, 0] = float(name)
    with pytest.raises((ValueError, FloatingPointError)):
        trainer(policy=policy, max_steps=1).train()


def test_a_different_start_is_allowed_on_request(world, trainer, moved):
    trainer(policy=moved, max_steps=1, allow_different_start=True).train()


def test_weights_in_bf16_are_refused(world, trainer):
    with pytest.raises(ValueError, match="float32"):
        trainer(policy=world.policy().to(torch.bfloat16))


def test_what_a_method_does_not_read_is_refused(world, trainer):
    with pytest.raises(ValueError, match="SAEs"):
        trainer(saes=())
    with pytest.raises(ValueError, match="no SAE"):
        FPOTrainer(world.policy(), trainer("dpo").args, world.open(), saes=[world.load_sae()])
    with pytest.raises(ValueError, match="live reference"):
        FPOTrainer(world.policy(), trainer("tdpo1").args, world.open(()))
    with pytest.raises(ValueError, match="no live reference"):
        FPOTrainer(world.policy(), trainer("dpo").args, world.open(()), reference=world.policy())


def test_another_recipe_than_the_cache_s_is_refused(trainer):
    with pytest.raises(ValueError, match=r"--dtype: .* made with fp32, found bf16"):
        trainer(bf16=True)


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant"):
        FPOConfig(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing_kwargs={"use_reentrant": True})
