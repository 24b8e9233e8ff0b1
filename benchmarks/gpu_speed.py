"""The timed sections of `gpu_check`: stage one, training, and their profiles.

In: a `Bench`. Out: figures in its report. Compilation and warm-up are timed apart from the steady rate.
"""

import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from fpo.cache.schema import Pair
from fpo.stages.model.flex import FLEX
from fpo.stages.model.sae import SiteSAE
from fpo.stages.scoring.measure import measure_pairs
from fpo.stages.scoring.supported import freeze
from fpo.stages.train.methods import METHODS
from transformers import TrainerCallback

from .gpu_bench import Bench, make_cache, make_sae, make_trainer, tiny_config
from .limit import TRAINING_PASSES, pair_flops
from .pairs import amounts, random_pairs
from .prepare import write_cache
from .setting import KEPT, load
from .shapes import ULTRAFEEDBACK, configuration

# Number of kernels that a profile lists.
NAMED = 24
# The kinds of kernels, by patterns of their names; the first that matches counts.
KINDS = {
    "attention, backward": "flex_attention_backward",
    "attention, forward": "flex_attention",
    "products": "nvjet|gemm|cutlass|splitK",
    "compiled element-wise": "^triton_",
    "optimiser and norm": "multi_tensor",
    "copies": "^Mem",
}


def _prepared(bench: Bench) -> tuple[Any, SiteSAE]:
    """Saves the configuration of the large model; returns it and an SAE."""
    config = tiny_config("gemma2", 32) if bench.tiny else configuration(bench.large.model)
    folder = bench.folder / "large"
    config.save_pretrained(folder / "model")
    return config, make_sae(folder, config, bench.large)


def _flops(config: Any, pairs: Sequence[Pair], bench: Bench) -> dict[str, float]:
    return pair_flops(config, amounts(pairs, bench.large.batch), bench.large)


def stage_one(bench: Bench, count: int) -> None:
    """Times `measure_pairs` and the writing of its shard, and counts where the host waits for the GPU."""
    setting, report = bench.large, bench.report
    start = bench.now()
    config, sae = _prepared(bench)
    folder = bench.folder / "large"
    model = reference_model(bench, sae)
    report.add("stage_one", made_model=round(bench.now() - start, 1))
    pairs = random_pairs(setting, config.vocab_size, count)

    def measure(some: Sequence[Pair], token_budget: int = setting.token_budget) -> Any:
        return measure_pairs(model, some, [sae], setting.recipe, token_budget=token_budget, keep_features=KEPT)

    start, before = bench.now(), bench.compilations()
    measure(pairs[: 2 * setting.batch])
    report.add("stage_one", warmed_up=round(bench.now() - start, 1), compilations=bench.compilations() - before)
    flops = _flops(config, pairs, bench)
    report.add("stage_one", tflop_a_pair={name: value / 1e12 for name, value in flops.items()}, pairs=amounts(pairs, 8))
    before = bench.compilations()
    for budget in (setting.token_budget, setting.token_budget, 2 * setting.token_budget, 2 * setting.token_budget):
        bench.reset_peak()
        start = bench.now()
        rows = measure(pairs, budget)
        seconds = bench.now() - start
        report.add(
            "stage_one",
            token_budget=budget,
            pairs_a_second=len(pairs) / seconds,
            minutes_for_ultrafeedback=ULTRAFEEDBACK * seconds / len(pairs) / 60,
            utilisation=sum(flops.values()) * len(pairs) / seconds / bench.rate if bench.rate else None,
            peak_gb=bench.peak_gb(),
            compilations=bench.compilations() - before,
        )
    start = bench.now()
    write_cache(folder / "cache", rows, [sae], setting, model)
    report.add("stage_one", shard_written=round(bench.now() - start, 2))
    with _waits_counted(bench, "stage one, 32 pairs"):
        measure(pairs[: 4 * setting.batch])


def reference_model(bench: Bench, sae: SiteSAE) -> Any:
    """The large model, as stage one prepares it."""
    model = load(bench.large, bench.folder / "large", FLEX)
    freeze(model, bench.large.recipe, compiled=bench.compiled, sites=[sae.site])
    return model


@contextmanager
def _waits_counted(bench: Bench, what: str) -> Iterator[None]:
    """Reports the operations at which the host waits for the GPU, by torch's debug mode."""
    if bench.device != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{w.filename[-40:]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    bench.report.add("waits", what=what, total=sum(places.values()), places=places.most_common(12))


class StepTimes(TrainerCallback):
    """Reports the time of each step when it ends."""

    def __init__(self, bench: Bench, method: str, watched: int) -> None:
        self._bench, self._method, self._watched, self._last = bench, method, watched, 0.0
        self._waits = ExitStack()
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock at the first step; counts the waits of one step, which is not timed."""
        self._last = self._last or self._bench.now()
        if state.global_step + 1 == self._watched:
            self._waits.enter_context(_waits_counted(self._bench, f"a training step of {self._method}"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the time since the last step's end, loading included."""
        self._waits.close()
        now = self._bench.now()
        self.seconds.append(now - self._last)
        self._last = now
        self._bench.report.add(
            "train",
            method=self._method,
            step=state.global_step,
            took=round(self.seconds[-1], 4),
            compilations=self._bench.compilations(),
        )


def train(bench: Bench, methods: Sequence[str], checkpointing: int) -> None:
    """Times training steps of each method: pairs a second and peak memory."""
    setting, report, folder = bench.large, bench.report, bench.folder / "large"
    config, sae = _prepared(bench)
    steps = setting.warmup + setting.steps + 2  # one more is watched, and the last one logs
    if not (folder / "cache").exists():
        pairs = random_pairs(setting, config.vocab_size, steps * setting.batch)
        make_cache(folder, load(setting, folder, FLEX), pairs, sae, setting)
    for method in methods:
        bench.reset_peak()
        start = bench.now()
        trainer = make_trainer(
            folder,
            setting,
            method,
            sae,
            max_steps=steps,
            logging_steps=steps,
            compile_layers=bench.compiled,
            activation_checkpointing=checkpointing > 0,
            checkpoint_every=max(1, checkpointing),
        )
        times = StepTimes(bench, method, watched=steps - 1)
        trainer.add_callback(times)
        trainer.train()
        cache, measured = trainer.train_cache, range(setting.warmup * setting.batch, (steps - 2) * setting.batch)
        pairs = [cache[number % len(cache)].pair for number in measured]
        flops = _flops(config, pairs, bench)
        passes = TRAINING_PASSES + (METHODS[method].divergence == "kl")  # a live reference runs forward
        useful = passes * flops["model"] + (flops["sae"] if method == "fpo" else 0)
        timed = times.seconds[setting.warmup : -2]
        seconds = statistics.mean(timed)
        report.add(
            "train",
            method=method,
            made_and_warmed_up=round(bench.now() - start - sum(times.seconds[setting.warmup :]), 1),
            pairs_a_second=setting.batch / seconds,
            median_step=statistics.median(timed),
            batch=setting.batch,
            logged_step=times.seconds[-1],
            utilisation=useful * setting.batch / seconds / bench.rate if bench.rate else None,
            tflop_a_pair=useful / 1e12,
            peak_gb=bench.peak_gb(),
            checkpointing=checkpointing,
        )
        del trainer, times


def profiles(bench: Bench) -> None:
    """Reports the slowest kernels of a few rows of stage one, and of one training step."""
    setting, folder = bench.large, bench.folder / "large"
    config, sae = _prepared(bench)
    pairs = random_pairs(setting, config.vocab_size, 4 * setting.batch)
    models = [reference_model(bench, sae)]

    def rows(some: Sequence[Pair]) -> None:
        measure_pairs(models[0], some, [sae], setting.recipe, token_budget=setting.token_budget, keep_features=KEPT)

    rows(pairs[: 2 * setting.batch])
    _profile(bench, "stage one", lambda: rows(pairs[2 * setting.batch :]))
    if not (folder / "cache").exists():
        make_cache(folder, models[0], pairs, sae, setting)
    models.clear()
    for method in ("fpo", "simpo"):
        bench.reset_peak()
        trainer = make_trainer(
            folder, setting, method, sae, max_steps=4, logging_steps=10, compile_layers=bench.compiled
        )
        trainer.add_callback(ProfiledStep(bench, method, 3))
        trainer.train()
        del trainer


class ProfiledStep(TrainerCallback):
    """Profiles one step."""

    def __init__(self, bench: Bench, method: str, step: int) -> None:
        self._bench, self._method, self._step = bench, method, step
        self._profile = torch.profiler.profile(activities=_activities(bench))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the profiler."""
        if state.global_step + 1 == self._step:
            self._started = self._bench.now()
            self._profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the profiler and reports."""
        if state.global_step == self._step:
            seconds = self._bench.now() - self._started
            self._profile.stop()
            _report_kernels(self._bench, f"a training step of {self._method}", self._profile, seconds)


def _activities(bench: Bench) -> list[Any]:
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CUDA] if bench.device == "cuda" else [kinds.CPU]


def _kind(kernel: str) -> str:
    """The kind of work that a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "torch's own")


def _profile(bench: Bench, what: str, work: Callable[[], None]) -> None:
    start = bench.now()
    with torch.profiler.profile(activities=_activities(bench)) as recorded:
        work()
        seconds = bench.now() - start
    _report_kernels(bench, what, recorded, seconds)


def _report_kernels(bench: Bench, what: str, recorded: Any, seconds: float) -> None:
    """Reports time by kernel and by kind from the raw events: the profiler's own tables take minutes."""
    busy: Counter[str] = Counter()
    times: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for event in recorded.profiler.kineto_results.events():
        if bench.device == "cpu" or "CUDA" in str(event.device_type()):
            busy[event.name()] += event.duration_ns()
            times[event.name()] += 1
            kinds[_kind(event.name())] += event.duration_ns()
    total = sum(busy.values())
    bench.report.add("profile", what=what, seconds=round(seconds, 3), kernels=sum(times.values()), busy_ms=total / 1e6)
    bench.report.add("profile", what=what, kinds_ms={kind: round(ns / 1e6, 1) for kind, ns in kinds.most_common()})
    for name, nanoseconds in busy.most_common(NAMED):
        bench.report.add("profile", what=what, ms=round(nanoseconds / 1e6, 2), times=times[name], kernel=name[:150])
