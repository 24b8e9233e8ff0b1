"""One architecture in the product and in plain transformers: the comparison behind the matrix of models."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fpo.stages.anatomy import anatomy
from fpo.stages.models import attentions_to_try, find_model
from fpo.stages.packing import pack
from fpo.stages.scoring import run_body, run_head
from fpo.stages.sites import Site, capture_sites, module_at
from fpo.stages.supported import load_supported
from pairs import random_pair
from tiny_architectures import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

# Beside fp32's rounding, which differs between packed and separate rows: relative to the largest entry of a tensor.
LOGPS, ACTS, GRADIENTS = 2e-5, 2e-5, 2e-4
SHAPES = ((9, 14, 5), (1, 1, 20), (20, 3, 3))


@dataclass
class Verdict:
    """What the matrix says of one architecture."""

    kind: str
    attention: str = ""
    resid_post: bool = False
    mlp_out: bool = False
    refusal: str = ""
    not_built: str = ""
    wrong: list[str] = field(default_factory=list)


def judge(kind: str, folder: Path) -> Verdict:
    """Builds, saves, loads and compares; what our own code raises as a traceback is raised here too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = tiny_model(tiny_config(kind))
            saved(input_ids=torch.arange(3, 20)[None])
            saved.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 (whatever keeps an architecture from being built)
        return Verdict(kind, not_built=f"{type(error).__name__}: {' '.join(str(error).split())}")
    try:
        source = find_model(str(folder))
        model = load_supported(source, attentions_to_try("auto", source, "cpu"), "cpu")
    except ValueError as error:
        assert "\n" not in str(error), str(error)
        return Verdict(kind, refusal=str(error).replace(str(folder), "FOLDER"))
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return compare(kind, model, plain)


def compare(kind: str, model: Any, plain: Any) -> Verdict:
    """Log-probabilities, activations at all sites and gradients: packed, alone, and by plain transformers."""
    found = anatomy(model)
    verdict = Verdict(kind, model.config._attn_implementation, all(found.resid_post), all(found.mlp_out))
    sites = [Site(layer, "resid_post") for layer, known in enumerate(found.resid_post) if known]
    sites += [Site(layer, "mlp_out") for layer, part in enumerate(found.mlp_out) if part is not None]
    pairs = [random_pair(*shape, seed=1, raw_row=number) for number, shape in enumerate(SHAPES)]
    for pair in pairs:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            ids[:] = 3 + ids % 97
    expected = _plain(plain, pairs, sites)
    for budget, way in ((1000, "packed"), (1, "alone")):
        ours = _ours(model, pairs, sites, budget)
        for what, tolerance in (("logps", LOGPS), ("acts", ACTS), ("gradients", GRADIENTS)):
            verdict.wrong += [f"{way} {what}: {line}" for line in _differences(ours[what], expected[what], tolerance)]
    verdict.wrong += [f"site {site.name} is not what is added" for site in sites if not _is_added(plain, site)]
    return verdict


def _loss(logps: list[Tensor], acts: dict[str, Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in logps)
    return loss + sum((part * torch.randn(part.shape, generator=generator)).mean() for _, part in sorted(acts.items()))


def _result(model: Any, logps: list[Tensor], acts: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    model.zero_grad()
    _loss(logps, acts).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    gradients = {name: grad for name, grad in gradients.items() if grad.abs().max() > 0}
    return {
        "logps": {"all": torch.cat(logps).detach()},
        "acts": {name: part.detach() for name, part in acts.items()},
        "gradients": {name: grad.clone() for name, grad in gradients.items()},
    }


def _ours(model: Any, pairs: list[Any], sites: list[Site], budget: int) -> dict[str, dict[str, Tensor]]:
    logps, acts = {}, {}
    for row in pack(pairs, budget):
        hidden_TD, found = run_body(model, row, sites)
        logps_T, _ = run_head(model, hidden_TD, row.targets_T)
        sizes = [sum(row.lengths[side : side + 2]) for side in range(0, len(row.lengths), 2)]
        for number, part in zip(row.pairs, logps_T.split(sizes), strict=True):
            logps[number] = part
        for site in sites:
            for number, part in zip(row.pairs, found[site].split(sizes), strict=True):
                acts[site, number] = part
    inside = {site.name: torch.cat([acts[site, number] for number in range(len(pairs))]) for site in sites}
    return _result(model, [logps[number] for number in range(len(pairs))], inside)


def _plain(model: Any, pairs: list[Any], sites: list[Site]) -> dict[str, dict[str, Tensor]]:
    logps, acts = [], {site.name: [] for site in sites}
    for pair in pairs:
        both = []
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([*pair.prompt_ids.tolist(), *response.tolist()])
            predicting = slice(len(pair.prompt_ids) - 1, len(ids) - 1)
            with capture_sites(model, sites) as captured:
                logits = model(input_ids=ids[None], use_cache=False).logits[0, predicting]
            both.append(logits.log_softmax(-1).gather(1, ids[predicting.start + 1 :, None]).squeeze(1))
            for site in sites:
                acts[site.name].append(captured[site][0, predicting])
        logps.append(torch.cat(both))
    return _result(model, logps, {name: torch.cat(parts) for name, parts in acts.items()})


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> list[str]:
    lines = [f"{name} only on one side" for name in found.keys() ^ expected.keys()]
    scale = max((float(value.abs().max()) for value in expected.values()), default=0.0)
    for name in found.keys() & expected.keys():
        allowed = tolerance * max(1.0, float(expected[name].abs().max()), 0.1 * scale)
        off = float((found[name] - expected[name]).abs().max())
        if not off <= allowed:
            lines.append(f"{name} off by {off:.2g}, allowed {allowed:.2g}")
    return sorted(lines)


@torch.no_grad()
def _is_added(model: Any, site: Site) -> bool:
    """Whether adding something to the activation adds just that to what goes into the next layer, or the final norm."""
    ids = torch.arange(3, 15)[None]
    after = Site(site.layer, "resid_post")

    def run(shift: float) -> Tensor:
        with capture_sites(model, [after]) as captured:
            handle = module_at(model, site).register_forward_hook(lambda module, args, output: _shifted(output, shift))
            model(input_ids=ids, use_cache=False)
            handle.remove()
        return captured[after]

    if site.kind == "resid_post":  # the next layer's input, as transformers itself lists the hidden states
        with capture_sites(model, [site]) as captured:
            states = model.get_decoder()(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return states is None or site.layer + 2 >= len(states) or torch.equal(states[site.layer + 1], captured[site])
    return bool(torch.allclose(run(0.5) - run(0.0), torch.tensor(0.5), atol=1e-5))


def _shifted(output: Any, shift: float) -> Any:
    return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift
