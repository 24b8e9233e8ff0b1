"""Every causal architecture of the installed transformers, tiny and random: right, or refused in one line.

Each goes through the product's own loading, and what it says of random pairs, packed and alone, is held against plain
transformers, each sequence by itself under the model's own forward pass: log-probabilities, activations at all sites,
gradients of all weights.
"""

import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fpo.stages.model.anatomy import anatomy
from fpo.stages.model.models import attentions_to_try, find_model, load_model
from fpo.stages.model.sae import Site, capture_sites, module_at
from fpo.stages.scoring.forward import run_body, run_head
from fpo.stages.scoring.packing import pack
from fpo.stages.scoring.supported import load_supported
from pairs import random_pair
from tiny_architectures import ARCHITECTURES, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

# Beside fp32's rounding, which differs between packed and separate rows: relative to the largest entry of a tensor.
LOGPS, ACTS, GRADIENTS = 2e-5, 2e-5, 2e-4
SHAPES = ((9, 14, 5), (1, 1, 20), (20, 3, 3))


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


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


def judge(kind: str, folder: Path, **settings: Any) -> Verdict:
    """Builds, saves, loads and compares; what our own code raises as a traceback is raised here too."""
    try:
        saved = tiny_model(tiny_config(kind, **settings))
        saved(input_ids=torch.arange(3, 20)[None])
        saved.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 (whatever keeps an architecture from being built)
        return Verdict(kind, not_built=f"{type(error).__name__}: {' '.join(str(error).split())}")
    try:
        source = find_model(str(folder))
        load = partial(load_model, source, device="cpu")
        model = load_supported(load, attentions_to_try("auto", source, "cpu"))
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


def _reason(verdict: Verdict) -> str:
    """The first words of a refusal, without numbers that a rounding may change."""
    found = verdict.refusal.partition(", found ")[2].partition(";")[0]
    if found == "others":
        found = "logits that are not its head's output, scaled and soft-capped"
    return re.sub(r" that differ by .*", " that differ", found)[:70].replace("|", "/")


def _table(verdicts: list[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        if verdict.not_built:
            rows.append([verdict.kind, "", "", "", f"not built: {verdict.not_built.partition(':')[0]}"])
        elif verdict.refusal:
            rows.append([verdict.kind, "", "", "", f"refused: {_reason(verdict)}"])
        else:
            hooks = ["yes" if known else "refused" for known in (verdict.resid_post, verdict.mlp_out)]
            rows.append([verdict.kind, verdict.attention, *hooks, "right" if not verdict.wrong else "WRONG"])
    counts = Counter(row[-1].partition(":")[0] for row in rows)
    head = [
        f"{len(rows)} causal architectures in transformers {transformers.__version__}:",
        f"{counts['right']} score as transformers itself does, {counts['refused']} are refused in one line,",
        f"{counts['WRONG']} are wrong in silence; {counts['not built']} cannot be built tiny and offline, and were not",
        "tried.",
        "",
        "Tiny random models, fp32, CPU, windows of 8 tokens exceeded. `attention` is what `--attention auto` takes; a",
        "site is `refused` where no module of a layer computes it.",
        "",
        "| type | attention | resid_post | mlp_out | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


# Settings that change what is computed, beside those that the tiny configurations have.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Falcon with ALiBi": ("falcon", {"alibi": True}),
    "Falcon of the new form": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, MLP after attention": ("falcon", {"parallel_attn": False}),
    "GPT-NeoX, MLP after attention": ("gpt_neox", {"use_parallel_residual": False}),
    "GPT-2 with scaled attention": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    "MPT with learnt positions": ("mpt", {"attn_config": {"alibi": False}}),
    "OPT with a projected embedding": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "StableLM, side by side": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "Gemma-3, both ways": ("gemma3_text", {"use_bidirectional_attention": True}),
    "Gemma-3 with a soft-cap": ("gemma3_text", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}),
    "Llama, yarn": ("llama", {"rope_parameters": _YARN}),
    "Llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "Mistral without a window": ("mistral", {"sliding_window": None}),
    "DeepSeek-V3, yarn": ("deepseek_v3", {"rope_parameters": _YARN}),
    "Ministral-3 with scaled queries": ("ministral3", {"rope_parameters": _YARN | {"llama_4_scaling_beta": 0.3}}),
    "BERT as a decoder": ("bert", {"is_decoder": True}),
    "BART as a decoder": ("bart", {"is_decoder": True, "is_encoder_decoder": False}),
    "GPT-BigCode, many queries": ("gpt_bigcode", {"multi_query": False}),
    "Phi with norms": ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "Command-R+": ("cohere", {"use_qk_norm": True}),
    "Qwen-2, a window in every layer": ("qwen2", {"layer_types": ["sliding_attention"] * 2}),
}
REFUSED = ("Falcon with ALiBi", "MPT with learnt positions", "Gemma-3, both ways", "BERT as a decoder")
REFUSED += ("BART as a decoder",)

# One or two of each way of building a model; the whole list is slow.
FAMILIES = (
    *("cohere", "falcon", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neo", "gpt_oss", "granite", "llama", "mamba"),
    *(
        "marian",
        "mistral",
        "mixtral",
        "mpt",
        "nemotron",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2_moe",
        "qwen3",
        "stablelm",
    ),
)


@pytest.mark.filterwarnings("ignore")  # of transformers, about configurations that nobody uses
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_right_or_refused(kind, tmp_path):
    verdict = judge(kind, tmp_path)
    assert not verdict.not_built
    assert not verdict.wrong
    assert bool(verdict.refusal) == (kind in ("gpt_neo", "mamba", "marian", "mpt"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_setting_is_right_or_refused(name, tmp_path):
    kind, settings = VARIANTS[name]
    verdict = judge(kind, tmp_path, **settings)
    assert not verdict.not_built
    assert not verdict.wrong
    assert bool(verdict.refusal) == (name in REFUSED), verdict.refusal


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_right_or_refused(committed_section):
    verdicts = []
    for kind in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            verdicts.append(judge(kind, Path(folder)))
    assert {verdict.kind: verdict.wrong for verdict in verdicts if verdict.wrong} == {}
    assert sum(not verdict.refusal and not verdict.not_built for verdict in verdicts) > 95
    committed_section("Models", _table(verdicts))
