"""`fpo evaluate`: the metrics of method.md section 6 for one policy, and its answers to a benchmark's questions.

In: an `EvaluateConfig`. Out: in `--out` `run.yaml`, the answers, every
measured pair, token and sample, and last, when all else is there, `metrics.json`; its content on the terminal. What can
be refused is refused before anything is written; an interrupted evaluation starts over when it is run again.
"""

import datetime
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from ...cache.errors import UserError
from ...cache.files import atomic_file, remove_leftovers, write_atomically
from ...cache.reader import Cache, open_cache
from ...cache.schema import Pair
from ...stages.data.chat import ChatFormat
from ...stages.evaluate.answers import Question, read_questions, write_answers, write_benchmark_answers
from ...stages.evaluate.diversity import closing_token, distinct_prompts, sample_answers, sample_metrics
from ...stages.evaluate.generate import Sampling, check_room
from ...stages.evaluate.heldout import Estimate, measure_policy, pair_metrics
from ...stages.evaluate.token_bound import token_bound
from ...stages.judge.client import Asking, Endpoint
from ...stages.judge.served import answers_of_server
from ...stages.model.adapters import AdapterSource, load_adapter
from ...stages.model.models import ModelSource, attentions_to_try, autocast, load_model
from ...stages.model.sae import SiteSAE, check_fits
from ...stages.model.tokenizer import check_tokens, check_vocabulary, load_tokenizer
from ...stages.scoring.parity import check_cache
from ...stages.scoring.supported import load_supported
from ...stages.train.methods import METHODS
from ..config import EvaluateConfig
from .inputs import (
    FINISHED,
    RECORD,
    Progress,
    check_folder,
    check_new,
    device_of,
    differing,
    find_reference,
    mark_finished,
    policy_of,
    read_record,
    record_of,
    saes_of_sites,
    sites_to_read,
    sole_writer,
    tokenizer_of_cache,
)

# The files that an evaluation writes beside its record.
OUTPUTS = ("answers-*.json*", "pairs.parquet", "tokens.parquet", "samples.jsonl", "metrics.json")

# The pairs on which Appendix B's bound is measured: tens of thousands of tokens.
BOUND_PAIRS = 64


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What was opened and checked; `cache` is None where only answers are written.

    `prompts` holds one pair for each prompt that is sampled from.
    """

    source: ModelSource | AdapterSource
    policy: Any
    chat: ChatFormat
    cache: Cache | None
    saes: list[SiteSAE]
    reference: ModelSource | None
    prompts: list[Pair]

    @property
    def is_reference(self) -> bool:
        return self.cache is not None and self.cache.manifest.meaning.model == self.source.sha256


def run_evaluate(config: EvaluateConfig) -> None:
    """`fpo evaluate`."""
    out = config.out
    questions = read_questions(config.questions, config.outputs) if config.questions and config.outputs else []
    sampled = config.cache is not None and config.prompts
    if questions and not sampled and config.temperature is None and not any(q.temperature for q in questions):
        config.refuse("at temperature 0, which is the benchmark's, nothing is drawn", "top_p", "seed")
    _check_out(config, out, {})  # checked again below, with the hashes of what is measured
    if config.endpoint is not None:
        _ask_server(config, config.endpoint, questions)
        return
    inputs = _prepare(config)
    if inputs.is_reference:
        config.refuse(
            f"{inputs.source.name} is the cache's reference, whose implicit accuracy is not defined", "method"
        )
    sampling = Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        batch=config.generation_batch,
    )
    identity = {"model_sha256": inputs.source.sha256}
    if inputs.cache is not None:
        identity["cache_fingerprint"] = inputs.cache.manifest.meaning.fingerprint()
    day = {} if inputs.chat.date is None else {"date": inputs.chat.date.isoformat()}
    with sole_writer(out):
        _check_out(config, out, identity)
        _remove_interrupted(out)
        versions = {name: importlib.metadata.version(name) for name in ("fpo", "torch", "transformers", "sae-lens")}
        write_atomically(out / RECORD, record_of(config, identity | day | {"versions": versions}).encode())
        if questions:
            _write_answers(config, inputs, sampling, questions)
        if inputs.cache is not None:
            metrics = _measure(config, inputs, inputs.cache, sampling, out, identity | day)
            _print_metrics(metrics)
        mark_finished(out)
    if inputs.cache is not None:
        typer.echo(f"{out}: metrics.json, and what it was computed from")


def _ask_server(config: EvaluateConfig, url: str, questions: Sequence[Question]) -> None:
    """Writes the answers of a model that a server holds."""
    assert config.model is not None
    how = Asking(config.max_new_tokens, seed=config.seed, top_p=config.top_p)
    with sole_writer(config.out):
        _remove_interrupted(config.out)
        versions = {"versions": {"fpo": importlib.metadata.version("fpo")}}
        write_atomically(config.out / RECORD, record_of(config, versions).encode())
        total = sum(len(question.prompts) for question in questions)
        with Progress(total, "answer", "answers") as progress:
            endpoint = Endpoint(url, config.model, concurrency=config.generation_batch)
            answers = answers_of_server(questions, endpoint, how, config.temperature, progress.advance)
        path = _answers_file(config)
        write_answers(path, questions, answers, Path(config.model).name)
        mark_finished(config.out)
    typer.echo(f"{path}: {total} answers of '{config.model}'")


def _answers_file(config: EvaluateConfig) -> Path:
    return config.out / f"answers-{config.outputs}.{'json' if config.outputs == 'alpaca-eval' else 'jsonl'}"


def _measure(
    config: EvaluateConfig, inputs: _Inputs, cache: Cache, sampling: Sampling, out: Path, identity: Mapping[str, str]
) -> dict[str, Estimate]:
    """Writes what was measured and, last, `metrics.json`; returns the metrics."""
    metrics = _measure_pairs(config, inputs, cache, out)
    if inputs.prompts:
        metrics |= _measure_diversity(config, inputs, sampling, out)
    document = {"metrics": metrics, "pairs": len(cache), **identity}
    write_atomically(out / "metrics.json", (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    return metrics


def _check_out(config: EvaluateConfig, out: Path, identity: Mapping[str, str]) -> None:
    """Refuses a folder that holds anything but an interrupted evaluation of the same settings, which starts over.

    Raises:
        ValueError: it does.
    """
    check_folder(out)
    if out.is_dir():
        remove_leftovers(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    found = read_record(out, "--out") if (out / RECORD).is_file() else {}
    if found.get("command") != "evaluate" or FINISHED in found:
        check_new(out)
    if changed := differing(found, config, identity, ("out", "trust_hashes", "date")):
        raise UserError(
            f"--out: expected the settings of the interrupted evaluation in {out}; {changed}; give another folder, or "
            "empty it"
        )


def _remove_interrupted(out: Path) -> None:
    """Removes what an interrupted evaluation left."""
    for pattern in OUTPUTS:
        for path in out.glob(pattern):
            path.unlink()


def _prepare(config: EvaluateConfig) -> _Inputs:
    """Opens what the options name and checks that it belongs together."""
    source = policy_of(config.model, config.base)
    weights, words = (source.base, source.tokenizer) if isinstance(source, AdapterSource) else (source, source)
    device = device_of(config)
    attentions = attentions_to_try(config.attention, weights, device)
    cache, template, day, reference = None, None, None, None
    saes: list[SiteSAE] = []
    if config.cache is None:
        tokenizer = load_tokenizer(words)
    else:
        sites = sites_to_read(config, config.cache) if config.sae else []
        cache = open_cache(config.cache, sites=sites, trust_hashes=config.trust_hashes)
        meaning = cache.manifest.meaning
        if not len(cache):
            raise UserError(f"--cache: expected pairs to measure, found none in {config.cache}; make another cache")
        tokenizer, template = tokenizer_of_cache(words, config.cache, meaning), meaning.chat_template
        day = None if meaning.date is None else datetime.date.fromisoformat(meaning.date)
        saes = saes_of_sites(config, sites, device)
        check_cache(cache, saes, config.dtype, config.top_k)
        reference = find_reference(config, meaning) if config.reference else None

    def load(attention: str) -> Any:
        if isinstance(source, AdapterSource):  # in the layers of its base model, which computes with it
            return load_adapter(source, attention=attention, device=device).get_base_model()
        return load_model(source, attention=attention, device=device)

    policy = load_supported(load, attentions, typer.echo)
    check_vocabulary(policy, tokenizer)
    for sae in saes:
        check_fits(sae, policy)
    if cache is not None:
        name, token = cache.largest_token()
        check_tokens(policy, [(f"cache {config.cache}, pair {name}", [token])], tokenizer)
    prompts = [] if cache is None else distinct_prompts(cache, config.prompts)
    longest = max((len(pair.prompt_ids) for pair in prompts), default=0)
    check_room(policy, "--max-new-tokens", longest, config.max_new_tokens if prompts else 0)
    chat = ChatFormat(tokenizer, template, day)
    return _Inputs(source, policy, chat, cache, saes, reference, prompts)


def _write_answers(config: EvaluateConfig, inputs: _Inputs, sampling: Sampling, questions: Sequence[Question]) -> None:
    path = _answers_file(config)
    # A judge's name for the model: its folder's or file's, as in its hub id.
    name = (Path(inputs.source.name).name or inputs.source.folder.name).removesuffix(".gguf")
    total = sum(len(question.prompts) for question in questions)
    progress = Progress(total, "answer", "answers")
    with progress, autocast(config.dtype, inputs.policy.device):
        write_benchmark_answers(
            inputs.policy,
            inputs.chat,
            questions,
            path,
            model_name=name,
            sampling=sampling,
            temperature=config.temperature,
            on_batch=progress.advance,
        )
    typer.echo(f"{path}: {total} answers of '{name}'")


def _measure_pairs(config: EvaluateConfig, inputs: _Inputs, cache: Cache, out: Path) -> dict[str, Estimate]:
    """Writes `pairs.parquet`, and `tokens.parquet` where there are SAEs and a reference; returns the means."""
    policy, reference = inputs.policy, None
    if inputs.reference is not None:
        same = inputs.reference.sha256 == inputs.source.sha256
        load = partial(load_model, inputs.reference, device=policy.device)
        reference = policy if same else load_supported(load, (policy.config._attn_implementation,))
    with Progress(len(cache), "evaluate") as progress:
        columns = measure_policy(
            policy,
            cache,
            inputs.saes,
            config.dtype,
            top_k=config.top_k,
            token_budget=config.token_budget,
            reference=reference,
            on_pairs=progress.advance,
        )
    _write_table(out / "pairs.parquet", columns)
    metrics = pair_metrics(columns, None if inputs.is_reference else METHODS[config.method].per_token)
    if reference is not None and inputs.saes:
        pairs = [cache[number].pair for number in range(min(BOUND_PAIRS, len(cache)))]
        deepest = max(inputs.saes, key=lambda sae: sae.site)
        bound = token_bound(policy, reference, pairs, deepest, config.dtype, token_budget=config.token_budget)
        _write_table(out / "tokens.parquet", {"kl": bound.kl, "feature_sq": bound.feature_sq})
        metrics |= bound.metrics()
    return metrics


def _measure_diversity(config: EvaluateConfig, inputs: _Inputs, sampling: Sampling, out: Path) -> dict[str, Estimate]:
    """Writes `samples.jsonl`; returns H and the answers' lengths."""
    pairs = inputs.prompts
    if len(pairs) < config.prompts:
        typer.echo(f"--prompts: the cache has {len(pairs)} distinct prompts, all are taken")
    with Progress(len(pairs) * config.samples, "diversity", "answers") as progress:
        samples = sample_answers(
            inputs.policy,
            [pair.prompt_ids for pair in pairs],
            samples=config.samples,
            sampling=sampling,
            end_id=closing_token(pairs, inputs.chat),
            recipe=config.dtype,
            token_budget=config.token_budget,
            on_batch=progress.advance,
        )
    tokenizer = inputs.chat.tokenizer
    lines = []
    for pair, of_prompt in zip(pairs, samples, strict=True):
        prompt = tokenizer.decode(pair.prompt_ids)
        for sample in of_prompt:
            text = tokenizer.decode(sample.ids, skip_special_tokens=True)
            line = {"prompt": prompt, "sample": text, "tokens": len(sample.ids), "logp": sample.logp}
            lines.append(json.dumps(line | {"finished": sample.finished}, ensure_ascii=False) + "\n")
    write_atomically(out / "samples.jsonl", "".join(lines).encode())
    return sample_metrics(samples)


def _write_table(path: Path, columns: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        pq.write_table(pa.table(dict(columns)), file)


def _print_metrics(metrics: Mapping[str, Estimate]) -> None:
    typer.echo(f"{'metric':<24} {'mean':>10}   {'95 % interval':<24} {'units':>6}")
    for name, found in metrics.items():
        interval = f"{found['low']:.4g} to {found['high']:.4g}" if "low" in found else "-"
        typer.echo(f"{name:<24} {found['mean']:>10.4g}   {interval:<24} {found.get('n', '-'):>6}")
