"""Checks of the options that say what `align` minimises: the method, its settings, what it reads and measures against.

The second step's log line is compared with the loss, its terms and its gradient by plain transformers, at the weights
that the first step left.
"""

import shutil
from typing import Any

import pytest
import torch
from fpo.stages.model.sae import load_sae
from seams.lab import Lab, Run, bracket_template, lines_of, plain_model
from seams.options import effect
from seams.oracle import DEFAULTS, Objective, losses
from tiny import save_tiny_sae
from tiny_world import SITES

# β and α at which the constraint is no small part of loss and gradient.
STRONG = {"dpo": {}, "simpo": {}, "tdpo1": {"beta": 0.5}, "tdpo2": {"beta": 0.5, "alpha": 3.0}}
STRONG |= {"simpo-kl": {"alpha": 3.0}, "fpo": {"beta": 0.5, "alpha": 3.0}}


def second_step(lab: Lab, objective: Objective, run: Run, sites: tuple[int, ...] = (0,)) -> dict[str, float]:
    """What the log should say of the second step: means over pairs, and the gradient's norm."""
    policy = run.model(1)
    saes = [lab.world.load_sae(site) for site in sites] if objective.method == "fpo" else []
    values = losses(objective, policy, plain_model(lab.world.gemma), lab.pairs(), saes)
    values["loss"].mean().backward()
    slopes = [weight.grad for weight in policy.parameters() if weight.grad is not None]
    return {name: value.mean().item() for name, value in values.items()} | {
        "grad_norm": float(torch.nn.utils.get_total_norm(slopes))
    }


def assert_second_step(lab: Lab, method: str, top_k: int = 50, sites: tuple[int, ...] = (0,), **changes: Any) -> None:
    """The run's second line is the oracle's for these settings, and not the oracle's for the defaults."""
    named = {"site": tuple(SITES[site].name for site in sites)} if method == "fpo" and sites != (0,) else {}
    named |= {"top_k": top_k} if top_k != 50 else {}
    settings = STRONG[method] | changes
    run = lab.run("align", method=method, max_steps=2, **settings, **named)
    found = run.steps[1]
    expected = second_step(lab, Objective(method, settings, top_k), run, sites)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name
    if not changes and not named:
        return
    before = second_step(lab, Objective(method, STRONG[method]), run)
    assert any(before[name] != pytest.approx(value, rel=0.02, abs=1e-5) for name, value in expected.items())


@effect("align", "method")
def method(lab: Lab, command: str) -> None:
    for name in DEFAULTS:
        assert_second_step(lab, name)
        if name != "simpo":  # whose default margin is told from none by the first loss already
            first = lab.run(command, method=name, max_steps=2, **STRONG[name]).steps[0]
            assert (first["rewards/margins"], first["rewards/accuracies"]) == (0, 0.5)  # a tie is one half
    # Without settings: the method's own.
    for name in DEFAULTS:
        run = lab.run(command, method=name, max_steps=2, lr=1e-2)
        expected = second_step(lab, Objective(name), run)
        for key, value in expected.items():
            assert run.steps[1][key] == pytest.approx(value, rel=2e-3, abs=1e-6), (name, key)


@effect("align", "beta")
def beta(lab: Lab, command: str) -> None:
    for name in DEFAULTS:
        assert_second_step(lab, name, beta=0.7)


@effect("align", "alpha")
def alpha(lab: Lab, command: str) -> None:
    for name in ("tdpo2", "simpo-kl", "fpo"):
        assert_second_step(lab, name, alpha=1.3)
    assert_second_step(lab, "fpo", alpha=0.0)
    assert "--alpha" in lab.refused(command, method="dpo", alpha=1.0)


@effect("align", "gamma")
def gamma(lab: Lab, command: str) -> None:
    for name in ("simpo", "simpo-kl"):
        assert_second_step(lab, name, gamma=1.7)
    assert "--gamma" in lab.refused(command, method="fpo", gamma=1.0)


@effect("align", "kl_beta")
def kl_beta(lab: Lab, command: str) -> None:
    assert_second_step(lab, "simpo-kl", kl_beta=0.6)
    assert "--kl-beta" in lab.refused(command, method="tdpo2", kl_beta=1.0)


@effect("align", "stop_gradient")
def stop_gradient(lab: Lab, command: str) -> None:
    """It changes the gradient and not the loss."""
    for name in ("tdpo2", "simpo-kl", "fpo"):
        assert_second_step(lab, name, stop_gradient=False)
    assert "--no-stop-gradient" in lab.refused(command, method="dpo", stop_gradient=False)


@effect("align", "top_k")
def top_k(lab: Lab, command: str) -> None:
    for number in (1, 4):
        assert_second_step(lab, "fpo", top_k=number)
    assert "--top-k" in lab.refused(command, method="dpo", top_k=4)


@effect("align", "site")
def site(lab: Lab, command: str) -> None:
    """One site, another, or the mean of both; the error bound and the share of misses too are means over all sites."""
    assert_second_step(lab, "fpo", sites=(1,))
    assert_second_step(lab, "fpo", sites=(0, 1))
    assert "--site" in lab.refused(command, method="fpo", site=None)
    cache = lab.run("precompute", keep_features=6).folder
    lines = [
        lab.run(command, method="fpo", cache=cache, top_k=6, lr=1e-2, max_steps=2, site=tuple(names)).steps[1]
        for names in ([SITES[0].name], [SITES[1].name], [site.name for site in SITES])
    ]
    # The first step is the same for each, as the constraint is 0 at the start: so are the weights that are measured.
    for name in ("features/miss_rate", "features/error_bound"):
        first, second, both = (line[name] for line in lines)
        assert min(first, second) > 0 and first != pytest.approx(second, rel=0.01)
        assert both == pytest.approx((first + second) / 2, rel=1e-6)


@effect("align", "sae")
def sae(lab: Lab, command: str) -> None:
    """Its features are compared; it has to be the cache's."""
    folder = lab.folder / "another-sae"
    save_tiny_sae(folder, 32, 64, 9, "jumprelu", SITES[0])
    assert "--sae" in lab.refused(command, method="fpo", sae=folder)
    cache = lab.run("precompute", sae=folder).folder
    run = lab.run(command, method="fpo", sae=folder, cache=cache, max_steps=2)
    values = losses(Objective("fpo"), run.model(1), plain_model(lab.world.gemma), lab.pairs(), [load_sae(str(folder))])
    for side in ("chosen", "rejected"):
        expected = values[f"features/mse_{side}"].mean().item()
        assert run.steps[1][f"features/mse_{side}"] == pytest.approx(expected, rel=1e-3)


@effect("align", "reference")
def reference(lab: Lab, command: str) -> None:
    """The KL is to this model, which has to be the cache's; methods without a KL take none."""
    assert_second_step(lab, "tdpo2", alpha=1.0)
    assert "--reference" in lab.refused(command, method="tdpo1", reference=None)
    assert "--reference" in lab.refused(command, method="tdpo1", reference=lab.other)
    assert "--reference" in lab.refused(command, method="fpo", reference=lab.world.gemma)


@effect("align", "cache")
def cache(lab: Lab, command: str) -> None:
    """Its pairs are trained on, and its log-probabilities are the margin."""
    with torch.no_grad():
        policy, reference = plain_model(lab.world.gemma), plain_model(lab.other)
        values = losses(Objective("dpo"), policy, reference, lab.pairs())
    made = lab.run("precompute", model=lab.other).folder
    run = lab.run(command, cache=made, allow_different_start=True)
    for name, value in values.items():
        assert run.steps[0][name] == pytest.approx(value.mean().item(), rel=1e-3), name


@effect("align", "allow_different_start")
def allow_different_start(lab: Lab, command: str) -> None:
    assert "--allow-different-start" in lab.refused(command, model=lab.other)
    run = lab.run(command, model=lab.other, allow_different_start=True)
    assert run.log[0]["parity/logps"] > run.log[0]["parity/logps_allowed"]


@effect("align", "eval_cache")
def eval_cache(lab: Lab, command: str) -> None:
    """At the end every pair of it is measured under the method's loss, by the weights of the end."""
    made = lab.run("precompute", dataset=lab.world.heldout, split="test", limit=None).folder
    held = lines_of(lab.world.heldout)
    run = lab.run(command, method="fpo", eval_cache=made, max_steps=2, lr=1e-2, beta=0.5, alpha=3.0)
    before, line = (line for line in run.log if "eval_loss" in line)
    assert before["step"] == 0
    with torch.no_grad():
        values = losses(
            Objective("fpo", {"beta": 0.5, "alpha": 3.0}),
            run.model(),
            plain_model(lab.world.gemma),
            lab.pairs(held, limit=len(held)),
            [lab.world.load_sae(0)],
        )
    assert line["step"] == 2
    for name, value in values.items():
        assert line[f"eval_{name}"] == pytest.approx(value.mean().item(), rel=2e-3, abs=1e-6), name
    other = lab.run("precompute", keep_features=8, dataset=lab.world.heldout).folder
    assert "--eval-cache" in lab.refused(command, eval_cache=other)


@effect("align", "eval_steps")
def eval_steps(lab: Lab, command: str) -> None:
    run = lab.run(command, eval_cache=lab.small_cache, eval_steps=2, max_steps=5)
    assert [line["step"] for line in run.log if "eval_loss" in line] == [0, 2, 4, 5]
    assert "--eval-steps" in lab.refused(command, eval_steps=2)


@effect("align, evaluate", "trust_hashes")
def trust_hashes(lab: Lab, command: str) -> None:
    """A shard that was decoded before is not hashed again: damage that came since is seen without the option alone."""
    folder = lab.new("cache")
    shutil.copytree(lab.small_cache, folder)
    assert lab.call(command, lab.new(), cache=folder).exit_code == 0
    (shard,) = (folder / "data").iterdir()
    data = shard.read_bytes()
    shard.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    assert "SHA-256" in lab.refused(command, cache=folder)
    assert lab.call(command, lab.new(), cache=folder, trust_hashes=True).exit_code == 0


@effect("align", "chat_template")
def chat_template(lab: Lab, command: str) -> None:
    """It has to be the cache's, and is saved with the model."""
    text, path = bracket_template(), lab.folder / "template.jinja"
    path.write_text(text)
    assert "--chat-template" in lab.refused(command, chat_template=path)
    made = lab.run("precompute", chat_template=path).folder
    assert "--chat-template" in lab.refused(command, cache=made)
    run = lab.run(command, cache=made, chat_template=path)
    assert (run.folder / "chat_template.jinja").read_text() == text
