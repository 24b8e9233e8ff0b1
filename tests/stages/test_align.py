import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fpo.cache.reader import Cache, open_cache
from fpo.pipeline import runs
from fpo.stages.align import FPOConfig, FPOTrainer
from fpo.stages.methods import METHODS
from fpo.stages.models import load_model
from fpo.stages.sites import SiteSAE
from pairs import assert_same_gradients, calm_gemma2, dense_drift, gradients, score_alone
from peft import PeftModel
from tiny import tiny_sae
from tiny_world import SITES, World, files, losses, metrics, ran
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

LOG_2 = pytest.approx(math.log(2), rel=1e-6)
# What differs between two runs of the same command.
CLOCK = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second")
CLOCK += ("train_peak_memory_bytes", "train_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class KeepGradients(TrainerCallback):
    """The gradient of the last step, after all of its batches."""

    found: dict[str, Tensor]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def trainer(world, tmp_path) -> Callable[..., FPOTrainer]:
    """A trainer of one step over the whole training cache, unless told otherwise."""

    def make(
        method: str = "fpo",
        policy: Any = None,
        cache: Cache | None = None,
        eval_cache: Cache | None = None,
        sites: Sequence[int] = (0,),
        saes: Sequence[SiteSAE] | None = None,
        callbacks: Any = None,
        **settings: Any,
    ) -> FPOTrainer:
        features = METHODS[method].divergence == "features"
        defaults = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False}
        defaults |= {"disable_tqdm": True, "warmup_steps": 0, "per_device_train_batch_size": 12, "max_grad_norm": 0.0}
        return FPOTrainer(
            world.policy() if policy is None else policy,
            FPOConfig(output_dir=str(tmp_path / "run"), method=method, **(defaults | settings)),
            world.open(sites if features else ()) if cache is None else cache,
            eval_cache,
            saes=([world.load_sae(site) for site in sites] if saes is None else saes) if features else (),
            reference=world.policy() if METHODS[method].divergence == "kl" else None,
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
    return keep.found, trainer.state.log_history[0]["loss"]


# Runs through the command line.


@pytest.fixture(scope="module")
def runs_of_all(world, tmp_path_factory) -> dict[str, Path]:
    """Two epochs of every method; FPO is evaluated too."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        options = {"eval_cache": world.eval_cache, "eval_steps": 2} if method == "fpo" else {}
        ran(world.align(folder / method, method=method, epochs=2, **options))
    return {method: folder / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(runs_of_all, method):
    found = losses(runs_of_all[method])
    assert len(found) == 4
    assert sum(found[2:]) < sum(found[:2])


@pytest.mark.parametrize("method", ["fpo", "dpo", "tdpo1", "tdpo2"])
def test_the_first_loss_is_log_2_where_the_margin_is_the_reference_s(runs_of_all, method):
    assert losses(runs_of_all[method])[0] == LOG_2


@pytest.mark.parametrize("method", METHODS)
def test_metrics_have_the_names_that_people_are_used_to(runs_of_all, method):
    line = next(line for line in metrics(runs_of_all[method]) if "loss" in line)
    names = {"loss", "grad_norm", "learning_rate", "epoch", "step", "logps/chosen", "logps/rejected"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    divergence = METHODS[method].divergence
    if divergence:
        names |= {"constraint/delta", "constraint/grad_ratio"}
        prefix = "features/mse" if divergence == "features" else "kl"
        names |= {f"{prefix}_chosen", f"{prefix}_rejected"}
    if divergence == "features":
        names |= {"features/miss_rate", "features/error_bound"}
    assert set(line) == names
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])


def test_parity_is_logged_for_what_was_compared(runs_of_all):
    assert {name for name in metrics(runs_of_all["dpo"])[0] if "parity" in name} == {
        "parity/logps",
        "parity/logps_allowed",
    }
    first = metrics(runs_of_all["fpo"])[0]
    assert first["parity/mse"] <= first["parity/mse_allowed"]


def test_evaluations_are_logged_under_their_own_names(runs_of_all):
    lines = [line for line in metrics(runs_of_all["fpo"]) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert {"eval_rewards/accuracies", "eval_features/mse_chosen", "eval_logps/chosen"} <= set(line)
        assert not [name for name in line if name.startswith(("rewards", "logps", "features"))]


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_a_folder_that_transformers_loads(world, runs_of_all, method):
    run = runs_of_all[method]
    model = AutoModelForCausalLM.from_pretrained(run)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert any(not torch.equal(w, world.policy().get_parameter(name)) for name, w in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.chat_template == open_cache(world.cache, sites=[]).manifest.meaning.chat_template
    result = [name for name in files(run) if not name.startswith("checkpoint-")]
    assert not [name for name in result if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not list(run.rglob("training_args.bin"))


def test_the_record_holds_configuration_fingerprint_and_versions(world, runs_of_all):
    record = yaml.safe_load((runs_of_all["fpo"] / "run.yaml").read_text())
    assert (record["method"], record["lr"], record["site"]) == ("fpo", 1e-3, [SITES[0].name])
    assert record["cache_fingerprint"] == open_cache(world.cache).manifest.meaning.fingerprint()
    assert set(record["versions"]) >= {"fpo", "torch", "transformers", "sae-lens"}
    assert all(record["versions"].values())


def test_the_same_command_gives_the_same_weights_and_another_seed_others(world, runs_of_all, tmp_path):
    ran(world.align(tmp_path / "again", method="dpo", epochs=2))
    ran(world.align(tmp_path / "other", method="dpo", epochs=2, seed=1))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (runs_of_all["dpo"], *tmp_path.iterdir())]
    assert len(set(weights)) == 2


def test_simpo_loads_the_policy_and_nothing_else(world, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(runs, "load_sae", lambda *_, **__: pytest.fail("loads an SAE"))
    monkeypatch.setattr(
        runs, "load_model", lambda source, **kwargs: loaded.append(source) or load_model(source, **kwargs)
    )
    ran(world.align(tmp_path / "run", method="simpo", max_steps=1))
    assert [source.folder for source in loaded] == [world.gemma]


def test_fpo_loads_no_reference(world, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        runs, "load_model", lambda source, **kwargs: loaded.append(source) or load_model(source, **kwargs)
    )
    ran(world.align(tmp_path / "run", max_steps=1))
    assert len(loaded) == 1


def test_rmsprop_takes_other_steps_than_adam(world, runs_of_all, tmp_path):
    ran(world.align(tmp_path / "run", "--optimizer", "rmsprop", epochs=2, lr=1e-4))
    found = losses(tmp_path / "run")
    assert found[0] == LOG_2
    assert found[-1] != losses(runs_of_all["fpo"])[-1]


# The loss and its gradient.


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
    world, trainer, batch, accumulation, budget
):
    expected, loss = one_step(trainer, policy=move(world.policy()), token_budget=10_000)
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


def test_alpha_0_is_length_normalised_dpo(world, trainer, moved):
    alone = losses_alone(moved, world.open(), world.load_sae(), alpha=0.0)["loss"].mean()
    expected, alone = gradients(moved, alone), alone.item()
    found, loss = one_step(trainer, policy=moved, alpha=0.0)
    assert loss == pytest.approx(alone, rel=1e-6)
    assert_same_gradients(found, expected, 1e-4)


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
    line = run.state.log_history[0]
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
        (lambda w: {"saes": [tiny_sae(seed=5, site=SITES[0])]}, f"features at {SITES[0].name}"),
        (lambda w: {"saes": [tiny_sae(seed=0, site=SITES[1])]}, f"features at {SITES[1].name}"),
    ],
    ids=["another model", "moved weights", "swapped sides", "another SAE", "another site"],
)
def test_a_policy_that_is_not_what_the_cache_was_made_with_does_not_start(world, trainer, change, what):
    run = trainer(max_steps=1, **change(world))
    before = {name: weight.clone() for name, weight in run.policy.named_parameters()}
    with pytest.raises(ValueError, match=rf"\Apolicy and cache differ[^\n]*{what}[^\n]*--allow-different-start\Z"):
        run.train()
    for name, weight in run.policy.named_parameters():
        assert torch.equal(weight, before[name])


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
    with pytest.raises(ValueError, match="recipe bf16"):
        trainer(bf16=True)


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant"):
        FPOConfig(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing_kwargs={"use_reentrant": True})


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path):
    result = world.align(tmp_path / "run", method="dpo", lr=1e30, epochs=2)
    assert (result.exit_code, "not finite" in result.stderr) == (1, True), result.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()


# Resuming.


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupts training in the middle of the step after `steps` steps."""
    real = FPOTrainer.row_losses

    def row_losses(self: FPOTrainer, *args: Any) -> Any:
        if self.state.global_step == steps:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(FPOTrainer, "row_losses", row_losses)


class Planted:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(("method", "extra"), [("fpo", ()), ("dpo", ("--lora-r", "2"))])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_stopped_and_resumed_ends_where_one_in_one_go_ends(world, tmp_path, monkeypatch, method, extra, steps):
    options: dict[str, Any] = {"method": method, "epochs": 2, "batch_size": 5, "save_steps": 2}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    ran(world.align(straight, *extra, **options))
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        result = world.align(broken, *extra, **options)
    assert result.exit_code == 130
    assert "run the same command" in result.stderr
    for checkpoint in broken.glob("checkpoint-*"):
        torch.save(Planted(tmp_path / "trace"), checkpoint / "training_args.bin")
    ran(world.align(broken, "--resume", *extra, **options))
    assert not (tmp_path / "trace").exists()
    name = "adapter_model.safetensors" if extra else "model.safetensors"
    assert (broken / name).read_bytes() == (straight / name).read_bytes()
    expected, found = (
        [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics(run)]
        for run in (straight, broken)
    )
    assert found == expected


def test_a_finished_run_resumed_stays_as_it_is(world, tmp_path):
    run = tmp_path / "run"
    ran(world.align(run, method="dpo", max_steps=2))
    before, lines = (run / "model.safetensors").read_bytes(), losses(run)
    ran(world.align(run, "--resume", method="dpo", max_steps=2))
    assert (run / "model.safetensors").read_bytes() == before
    assert losses(run) == lines


def test_resuming_with_other_settings_is_refused(world, tmp_path):
    run = tmp_path / "run"
    ran(world.align(run, method="dpo", max_steps=1))
    before = files(run)
    result = world.align(run, "--resume", method="dpo", max_steps=1, lr=1e-4)
    assert (result.exit_code, "lr: was 0.001, is 0.0001" in result.stderr) == (2, True), result.stderr
    assert files(run) == before


# LoRA.


@pytest.fixture(scope="module")
def lora(world, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    ran(world.align(run, "--lora-r", 4, epochs=2, lr=1e-2))
    return run


def test_an_adapter_starts_at_the_reference_and_learns(lora):
    found = losses(lora)
    assert found[0] == LOG_2
    assert sum(found[2:]) < sum(found[:2])
    assert (lora / "adapter_model.safetensors").exists()
    assert not (lora / "model.safetensors").exists()


def test_an_adapter_s_run_can_be_repeated(world, lora, tmp_path):
    torch.manual_seed(77)
    ran(world.align(tmp_path / "again", "--lora-r", 4, epochs=2, lr=1e-2))
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (lora / name).read_bytes()


def test_a_merged_adapter_is_the_base_model_with_the_adapter(world, lora, tmp_path):
    merged = tmp_path / "merged"
    ran(world.align(merged, "--lora-r", 4, "--merge", epochs=2, lr=1e-2))
    assert not (merged / "adapter_model.safetensors").exists()
    whole = AutoModelForCausalLM.from_pretrained(merged)
    adapted = PeftModel.from_pretrained(world.policy(), str(lora))
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        found, expected, base = (model(tokens).logits for model in (whole, adapted, world.policy()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((found - base).abs().max()) > 1e-3


def test_an_adapter_names_its_base_model(world, lora):
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == str(world.gemma)
