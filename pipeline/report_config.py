"""What the commands that compare and judge can be told, as `config.py` has it for the stages.

In: values by field name (`config_files.py` reads them). Out: a frozen instance whose values fit together, or one line
that says which do not.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from ..cache.errors import UserError
from .base_config import Config
from .options import Folder, in_file, needed, option


class ComparisonConfig(Config):
    """What `fpo table` and `fpo tune` have in common; a file sets most of it."""

    go_on = "finished steps are kept: run the same command again to go on"
    profile = "embedded"
    panel = "Output"
    first = ("runs", "out", "jobs")
    model: str = in_file(None, "Model that every method starts from, or that is fine-tuned first.")
    split: str = in_file("train_prefs", "Split that the methods are trained on.")
    heldout_split: str = in_file("test_prefs", "Split that the comparison is measured on.")
    sae: tuple[str, ...] = in_file((), "SAEs, one a site, in the order of `site`.")
    site: tuple[str, ...] = in_file((), "Sites of the SAEs.")
    rows: dict[str, dict[str, Any]] = in_file(
        {}, "Options of rows that share a method with another one (fpo-alpha0), by row."
    )
    seeds: tuple[int, ...] = in_file((0,), "Seeds, each a run of every method.")
    ablation_sites: tuple[str, ...] = in_file((), "Sites of the ablation, one run each.")
    ablation_sums: tuple[str, ...] = in_file((), "Several sites at once, joined by '+', of the ablation, one run each.")
    runs: Folder | None = option(None, "Folder of the runs; default runs/<profile>.")
    out: Folder | None = option(None, "Folder of tables, figures and logs; default results/<profile>.")
    jobs: PositiveInt = option(1, "Runs at a time; each has its share of the cores.")

    def check_ready(self) -> None:
        """The comparison looks for what all its steps need, and names it at once."""


class TableConfig(ComparisonConfig):
    """The paper's comparison: every method under every seed, evaluated; tables, figures and a page."""

    command = "table"
    seeds: tuple[int, ...] = option((0,), "Seeds, each a run of every method. Repeatable.")
    ablations: bool = option(False, "The ablations instead of the comparison.")
    judge_endpoint: str | None = option(
        None, "Address up to /v1 of a judge's endpoint; the table then has win rates against SFT by --judge."
    )
    judge: str | None = option(None, "The judge's name there.")
    judge_mode: Literal["logprob", "verdict"] = option("logprob", "As --mode of `fpo judge`.")
    dry_run: bool = option(False, "Print every step, what it reads, and what is missing; run nothing.")

    def check(self) -> None:
        """A judge has an address and a name."""
        if (self.judge_endpoint is None) != (self.judge is None):
            raise UserError("--judge-endpoint, --judge: expected both or neither, found one; give address and name")


class TuneConfig(ComparisonConfig):
    """Search learning rate, β and α of every method on the validation split, with one budget for all."""

    command = "tune"
    validation_split: str | None = in_file(None, "Split to choose on.")
    lr: PositiveFloat = in_file(5e-7, "Learning rate around which the search lies.")
    lr_range: tuple[PositiveFloat, PositiveFloat] = in_file((0.2, 5.0), "Its range, as factors of the learning rate.")
    beta_range: tuple[PositiveFloat, PositiveFloat] = in_file((0.1, 10.0), "As factors of the method's own β.")
    alpha_range: tuple[PositiveFloat, PositiveFloat] = in_file((0.1, 10.0), "As factors of the method's own α.")


class JudgeConfig(Config):
    """Ask a judge, any model behind an OpenAI-compatible endpoint, whose answers are better.

    Needs --answers (and --against, but for mt-bench's scores), or --calibrate. FPO_JUDGE_KEY is the endpoint's key.
    """

    command = "judge"
    go_on = "judgments that were made are kept: run the same command again to go on"
    panel = "Method"
    first = ("benchmark", "answers", "against", "endpoint", "judge", "out")
    benchmark: Literal["alpaca-eval", "arena-hard", "mt-bench", "pairwise"] = option(
        "pairwise", "In whose terms: alpaca-eval, arena-hard, mt-bench, or pairwise for any two files of answers."
    )
    answers: Path | None = option(None, "Answers to judge: the benchmark's file, or the folder of `fpo evaluate`.")
    against: Path | None = option(None, "Answers to compare them with, of the same kind.")
    questions: Path | None = option(
        None, "The benchmark's questions; alpaca-eval and pairwise have them in the answers."
    )
    difficulties: Path | None = option(
        None, "AlpacaEval's instruction_difficulty.csv for its baseline, in the order of --questions."
    )
    calibrate: str | None = option(None, "Preference pairs to ask the judge about instead: hub id, file or folder.")
    split: str = option("test_prefs", "Split of --calibrate.")
    limit: PositiveInt | None = option(None, "Judge only the first N questions; default all.")
    endpoint: str = needed("Address of the endpoint up to /v1, as http://localhost:8000/v1.")
    judge: str = needed("The judge's name there.")
    mode: Literal["logprob", "verdict"] = option(
        "logprob", "What a preference is read from: the probabilities of the two verdicts, or the text."
    )
    prompt: Path | None = option(
        None, "Words for the judge, with fields such as {question}; default the project's own."
    )
    reply_tokens: PositiveInt = option(1024, "Longest reply that is read as text, tokens.")
    temperature: float = option(0.0, "Temperature of the judge.", ge=0)
    seed: NonNegativeInt = option(0, "Seed of the judge's sampling.")
    concurrency: PositiveInt = option(8, "Requests at a time.")
    timeout: PositiveFloat = option(120.0, "Seconds that one reply may take.")
    out: Folder = needed("Folder of judgments and summary; judgments that are there are not asked for again.")

    def check(self) -> None:
        """What is judged must be one thing, in terms that fit."""
        if self.calibrate is not None:
            self.refuse("with --calibrate the pairs are judged", "answers", "against", "questions", "difficulties")
            if self.benchmark != "pairwise":
                raise UserError(f"--calibrate: expected --benchmark pairwise, found {self.benchmark}")
        else:
            self.refuse("there is no --calibrate", "split")
        if self.benchmark in ("arena-hard", "mt-bench"):
            self.refuse(f"{self.benchmark} reads text", "mode")
        elif self.mode == "logprob":
            self.refuse("--mode logprob reads no text", "reply_tokens")
        if self.difficulties is not None and (self.benchmark != "alpaca-eval" or self.questions is None):
            raise UserError("--difficulties: expected --benchmark alpaca-eval with --questions, found other options")

    def check_ready(self) -> None:
        """There must be something to judge."""
        super().check_ready()
        if self.calibrate is None and self.answers is None:
            raise UserError(
                "--answers: expected a file of answers, or --calibrate with preference pairs, found neither"
            )
        if self.answers is not None and self.against is None and self.benchmark != "mt-bench":
            raise UserError(f"--against: expected the answers that {self.answers} is compared with, found none")
        if self.answers is not None and self.questions is None and self.benchmark in ("arena-hard", "mt-bench"):
            raise UserError(f"--questions: expected the questions of {self.benchmark}, found none")
