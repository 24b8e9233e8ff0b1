"""Checks of the options of `evaluate`: what is measured against what, and how answers are drawn."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fpo.cache.schema import Pair
from judge_server import completion, serving
from scipy.stats import chisquare
from seams.lab import Lab, Run, by_hand, in_turns, lines_of, plain_model, tokens
from seams.options import effect
from seams.oracle import Objective, losses
from tiny_tokenizers import gemma
from tiny_world import SITES
from transformers import GenerationMixin

BOTH = ("chosen", "rejected")


def assert_measured(lab: Lab, run: Run, model: Path, rows: list[dict[str, Any]], per_token: bool) -> None:
    """Pairs and accuracies are those of plain transformers."""
    pairs = by_hand(rows)
    with torch.no_grad():
        reference = plain_model(lab.world.gemma)
        values = losses(Objective("dpo"), plain_model(model), reference, pairs)
        held = losses(Objective("dpo"), reference, reference, pairs)
    lengths = {side: np.array([len(getattr(pair, f"{side}_ids")) for pair in pairs]) for side in BOTH}
    table = pq.read_table(run.folder / "pairs.parquet")
    for side in BOTH:
        assert table[f"{side}_tokens"].to_pylist() == lengths[side].tolist()
        np.testing.assert_allclose(table[f"{side}_logp"], values[f"logps/{side}"], rtol=1e-5)
        np.testing.assert_allclose(table[f"{side}_ref_logp"], held[f"logps/{side}"], rtol=1e-5)
    raw = values["logps/chosen"].numpy() / lengths["chosen"] > values["logps/rejected"].numpy() / lengths["rejected"]
    assert run.metrics["accuracy/raw"] == pytest.approx(raw.mean())
    gains = {side: (values[f"logps/{side}"] - held[f"logps/{side}"]).numpy() for side in BOTH}
    gains = {side: gain / lengths[side] for side, gain in gains.items()} if per_token else gains
    assert run.metrics["accuracy/implicit"] == pytest.approx((gains["chosen"] > gains["rejected"]).mean())


@effect("evaluate", "model", "cache", "method")
def model(lab: Lab, command: str) -> None:
    """The policy's numbers on the cache's pairs; the method says whether implicit accuracy is per token."""
    for cache, rows in ((lab.world.cache, lab.rows), (lab.world.eval_cache, lines_of(lab.world.heldout))):
        for name, per_token in (("dpo", False), ("fpo", True)):
            run = lab.run(command, cache=cache, method=name, sae=None, site=None)
            assert_measured(lab, run, lab.other, rows, per_token)
    by_method = [lab.run(command, cache=lab.world.cache, method=name, sae=None, site=None) for name in ("dpo", "fpo")]
    assert by_method[0].metrics["accuracy/implicit"] != by_method[1].metrics["accuracy/implicit"]
    assert "--method" in lab.refused(command, model=lab.world.gemma, method="dpo")


@effect("evaluate", "reference")
def reference(lab: Lab, command: str) -> None:
    """The KL is that of the reference to the policy, which has to be the cache's; without one there is none."""
    run = lab.run(command, reference=lab.world.gemma)
    with torch.no_grad():
        values = losses(Objective("tdpo1"), plain_model(lab.other), plain_model(lab.world.gemma), lab.pairs())
    for side in BOTH:
        assert run.metrics[f"kl/{side}"] == pytest.approx(values[f"kl_{side}"].mean().item(), rel=1e-4)
    margin = (values["kl_rejected"] - values["kl_chosen"]).mean().item()
    assert run.metrics["kl/margin"] == pytest.approx(margin, rel=1e-3)
    assert "kl/chosen" not in lab.run(command).metrics
    assert "--reference" in lab.refused(command, reference=lab.other)


@effect("evaluate", "sae", "site", "top_k")
def features(lab: Lab, command: str) -> None:
    """D_F at the sites that are named, over the union of the top k; without an SAE there is none."""
    policy, held = plain_model(lab.other), plain_model(lab.world.gemma)
    for sites in ((0,), (1,), (0, 1)):
        for top_k in (2, 50):
            names = tuple(SITES[site].name for site in sites)
            run = lab.run(command, sae=lab.world.saes, site=names, top_k=top_k)
            with torch.no_grad():
                saes = [lab.world.load_sae(site) for site in sites]
                values = losses(Objective("fpo", {}, top_k), policy, held, lab.pairs(), saes)
            for side in BOTH:
                expected = values[f"features/mse_{side}"].mean().item()
                assert run.metrics[f"features/mse_{side}"] == pytest.approx(expected, rel=1e-4)
            margin = (values["features/mse_rejected"] - values["features/mse_chosen"]).mean().item()
            assert run.metrics["features/mse_margin"] == pytest.approx(margin, rel=1e-3)
    assert "features/mse_chosen" not in lab.run(command).metrics
    assert "--top-k" in lab.refused(command, top_k=3)
    cache = lab.run("precompute", keep_features=6).folder
    one, other, both = (
        lab.run(command, cache=cache, sae=lab.world.saes, top_k=6, site=tuple(SITES[i].name for i in sites)).metrics
        for sites in ((0,), (1,), (0, 1))
    )
    name = "features/miss_rate"
    assert both[name] == pytest.approx((one[name] + other[name]) / 2) and one[name] != other[name]


# How answers are drawn.


def samples(run: Run) -> list[dict[str, Any]]:
    return lines_of(run.folder / "samples.jsonl")


def prompts(lab: Lab) -> list[Pair]:
    """A pair of each distinct prompt of the small cache."""
    return list({pair.prompt_ids.tobytes(): pair for pair in reversed(lab.pairs())}.values())[::-1]


def next_token(model: Any, prompt: list[int]) -> torch.Tensor:
    """π of the next token, float64 [V]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompt)[None]).logits[0, -1]
    return torch.softmax(logits.double(), -1)


def nucleus(probabilities_V: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """q: π at a temperature, cut to the fewest likeliest tokens that have `top_p` together."""
    tempered_V = torch.softmax(probabilities_V.log() / temperature, -1)
    order = tempered_V.argsort(descending=True)
    inside = int((tempered_V[order].cumsum(0) < top_p).sum()) + 1
    q_V = torch.zeros_like(tempered_V)
    q_V[order[:inside]] = tempered_V[order[:inside]]
    return q_V / q_V.sum()


def assert_drawn_from(drawn: list[int], q_V: torch.Tensor) -> None:
    """Every token is of q's support, and they are as frequent as q says."""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(q_V)).double()
    assert float(counts[q_V == 0].sum()) == 0
    expected = len(drawn) * q_V
    many = expected >= 5  # what chi-square takes; the others are one class
    found = [*counts[many].tolist(), float(counts[~many].sum())]
    wanted = [*expected[many].tolist(), float(expected[~many].sum())]
    kept = [(a, b) for a, b in zip(found, wanted, strict=True) if b > 0]
    assert len(kept) > 3
    assert chisquare(*zip(*kept, strict=True)).pvalue > 1e-4


@effect("evaluate", "temperature", "top_p")
def temperature(lab: Lab, command: str) -> None:
    """One token each, many times: from q, whose log-probability under the whole π is what H is the mean of."""
    prompt = prompts(lab)[0].prompt_ids.tolist()
    probabilities_V = next_token(plain_model(lab.other), prompt)
    for heat, top_p in ((0.25, 1.0), (1.0, 1.0), (2.0, 0.6), (None, None)):
        options = {"temperature": heat, "top_p": top_p, "generation_batch": 2000, "prompts": 1, "samples": 2000}
        run = lab.run(command, max_new_tokens=1, **options)
        logps = torch.tensor([line["logp"] for line in samples(run)]).double()
        drawn = (logps[:, None] - probabilities_V.log()).abs().argmin(1).tolist()
        assert float((probabilities_V.log()[drawn] - logps).abs().max()) < 1e-4
        q_V = nucleus(probabilities_V, 1.0 if heat is None else heat, 0.95 if top_p is None else top_p)
        assert_drawn_from(drawn, q_V)
        entropy = float(-(q_V * probabilities_V.log()).sum())
        spread = float((q_V * (probabilities_V.log() + entropy).square()).sum()) ** 0.5
        assert run.metrics["diversity/entropy"] == pytest.approx(float(-logps.mean()), rel=1e-6)
        assert abs(run.metrics["diversity/entropy"] - entropy) < 5 * spread / 2000**0.5
    assert "--temperature" in lab.refused(command, temperature=0, prompts=1)


@effect("evaluate", "prompts", "samples", "max_new_tokens")
def counts(lab: Lab, command: str) -> None:
    """So many distinct prompts, so many answers to each, each at most so long; 0 prompts measure no diversity."""
    known = [gemma().decode(pair.prompt_ids) for pair in prompts(lab)]
    for number, each, longest in ((1, 3, 5), (2, 1, 2)):
        run = lab.run(command, prompts=number, samples=each, max_new_tokens=longest)
        lines = samples(run)
        assert Counter(line["prompt"] for line in lines) == dict.fromkeys(known[:number], each)
        assert max(line["tokens"] for line in lines) == longest
        assert all(line["finished"] or line["tokens"] == longest for line in lines)
        assert run.metrics["length/mean"] == pytest.approx(np.mean([line["tokens"] for line in lines]))
        assert run.metrics["length/finished"] == pytest.approx(np.mean([line["finished"] for line in lines]))
        entropy = np.mean([-line["logp"] / line["tokens"] for line in lines])
        assert run.metrics["diversity/entropy"] == pytest.approx(entropy)
    assert not (lab.run(command, prompts=0).folder / "samples.jsonl").exists()


@effect("evaluate", "generation_batch")
def generation_batch(lab: Lab, command: str) -> None:
    sizes: list[int] = []
    real = GenerationMixin.generate

    def generate(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(inputs))
        return real(self, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", generate)
        lab.run(command, prompts=2, samples=5, max_new_tokens=2, generation_batch=4)
    assert sizes == [4, 4, 2]


@effect("evaluate", "seed")
def seed(lab: Lab, command: str) -> None:
    texts = {}
    for number in (0, 1):
        options = {"prompts": 2, "samples": 4, "max_new_tokens": 6, "seed": number}
        texts[number] = samples(lab.run(command, **options))
        again = lab.new()
        assert lab.call(command, again, **options).exit_code == 0
        assert samples(Run(again, "", lab.other)) == texts[number]
    assert texts[0] != texts[1]


# Answers to a benchmark.


def greedy(model: Any, prompt: list[int], longest: int) -> str:
    """The likeliest token, again and again."""
    ids, end = list(prompt), gemma().convert_tokens_to_ids("<end_of_turn>")
    while len(ids) < len(prompt) + longest and (len(ids) == len(prompt) or ids[-1] != end):
        ids.append(int(next_token(model, ids).argmax()))
    text: str = gemma().decode(ids[len(prompt) :], skip_special_tokens=True)
    return text.strip()


@effect("evaluate", "outputs", "questions")
def outputs(lab: Lab, command: str) -> None:
    """Each question is answered in the benchmark's format: at its own temperature, or at that which is given."""
    model, asked = plain_model(lab.other), ["What is Paris?", "Is Lyon the capital?"]
    alpaca = lab.new("alpaca.json")
    alpaca.write_text(json.dumps([{"instruction": text, "dataset": "d"} for text in asked]))
    arena = lab.new("arena.jsonl")
    arena.write_text("".join(json.dumps({"uid": text, "prompt": text}) + "\n" for text in asked))
    expected = [greedy(model, tokens(in_turns(text)), 5) for text in asked]
    options = {"cache": None, "prompts": None, "token_budget": None, "max_new_tokens": 5}
    run = lab.run(command, outputs="alpaca-eval", questions=alpaca, temperature=0, **options)
    answers = json.loads((run.folder / "answers-alpaca-eval.json").read_text())
    assert [answer["output"].strip() for answer in answers] == expected
    run = lab.run(command, outputs="arena-hard", questions=arena, **options)  # its own temperature is 0
    lines = lines_of(run.folder / "answers-arena-hard.jsonl")
    assert [line["messages"][1]["content"]["answer"].strip() for line in lines] == expected
    assert "--questions" in lab.refused(command, **options, outputs="arena-hard")
    assert "--outputs" in lab.refused(command, **options, questions=arena)
    # AlpacaEval's own is 0.7.
    alpaca.write_text(json.dumps([{"instruction": asked[0], "dataset": "d"}] * 1000))
    drawn = {"max_new_tokens": 1, "generation_batch": 1000, "top_p": 1.0}
    run = lab.run(command, outputs="alpaca-eval", questions=alpaca, **options | drawn)
    texts = [answer["output"].strip() for answer in json.loads((run.folder / "answers-alpaca-eval.json").read_text())]
    q_V = nucleus(next_token(model, tokens(in_turns(asked[0]))), 0.7, 1.0)
    vocabulary = [gemma().decode([token], skip_special_tokens=True).strip() for token in range(len(q_V))]
    classes = {text: number for number, text in enumerate(dict.fromkeys(vocabulary))}
    of_class = torch.zeros(len(classes)).double().index_add_(0, torch.tensor([classes[t] for t in vocabulary]), q_V)
    assert_drawn_from([classes[text] for text in texts], of_class)


@effect("evaluate", "endpoint")
def endpoint(lab: Lab, command: str) -> None:
    """The model of that name at that address answers; no model is loaded here."""
    asked = lab.new("alpaca.json")
    asked.write_text(json.dumps([{"instruction": "What is Paris?", "dataset": "d"}]))
    drawn = {"max_new_tokens": 5, "temperature": 0.25, "top_p": 0.5, "seed": 7}
    options = {"model": "served-model", "cache": None, "prompts": None, "token_budget": None, "outputs": "alpaca-eval"}
    with serving(completion(" A town. ")) as server:
        run = lab.run(command, endpoint=server.url, questions=asked, **options | drawn)
    (answer,) = json.loads((run.folder / "answers-alpaca-eval.json").read_text())
    assert answer["output"] == "A town."
    (request,) = server.requests
    assert request["messages"] == [{"role": "user", "content": "What is Paris?"}]
    found = [request[name] for name in ("model", "max_tokens", "temperature", "top_p", "seed")]
    assert found == ["served-model", *drawn.values()]
    assert "--endpoint" in lab.refused(command, endpoint="http://127.0.0.1:9/v1")  # it has a cache to measure
