"""`fpo table`: the paper's comparison or its ablations, from a profile to tables, figures and a page.

In: a profile's name and its settings. Out: `results/<profile>/` with Markdown, CSV and JSON lines of every table, the
figures as PNG and SVG, and a self-contained HTML page. Runs lie in `runs/<profile>/`; finished ones are not repeated.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from matplotlib.figure import Figure

from ...cache.errors import UserError
from ...cache.files import write_atomically
from ..commands.jobs import Step, run_steps, seconds_of
from ..config_files import load_config
from ..report_config import TableConfig
from ..world.world import begin, in_the_world, is_made, provide, world_folder, world_steps
from . import figures
from .claims import Claim, Scores, ablation_claims, comparison_claims
from .followed import by_temperature, first_seed, snapshots
from .judged import judged_figure, judged_records
from .page import Page, PageFigure, Table, facts_of, is_toy, note_of, short_note, write_page
from .paper import paper_columns, win_rates
from .plan import Plan, Run, make_plan
from .preflight import missing, print_plan
from .records import (
    ABLATION_COLUMNS,
    COLUMNS,
    JUDGED,
    TABLES,
    Column,
    Curve,
    Record,
    bound_tokens,
    by_row,
    cells,
    curves_of,
    entropy_of_prompts,
    measured,
    mse_by_site,
    pair_wins,
    rank_correlations,
    ranked_activations,
    read_record,
    write_records,
    write_scores,
)
from .style import LABELS, save
from .success import Answers, read_answers, success_record
from .success_report import by_seed, leading_figure, success_figures, wins_table

# The rows whose tokens are compared with the bound of Appendix B.
BOUND_ROWS = ("dpo", "tdpo2", "simpo", "fpo")


def run_table(name: str, config: TableConfig) -> None:
    """`fpo table`: runs what is not done yet, then writes the tables, figures and pages.

    Raises:
        UserError: something is missing that a step needs, or a step failed.
    """
    stem = Path(name).stem
    config = config.model_copy(
        update={"runs": config.runs or Path("runs") / stem, "out": config.out or Path("results") / stem}
    )
    ablations = config.ablations
    if config.dry_run:
        _print_plan(name, config)
        return
    provide(config)
    plan = make_plan(name, config)
    parts, steps = _parts(plan, ablations)
    runs = [run for part in parts.values() for run in part]
    if lacking := missing(steps, config.jobs):
        raise UserError(f"{name}: nothing was started: {'; '.join(lacking)}")
    run_steps(steps, config.jobs)
    if not ablations:
        followed = [step for run in first_seed(plan, runs) for step in snapshots(plan, run).values()]
        steps = unique(
            [*steps, *followed, *(step for by in by_temperature(plan, runs).values() for step in by.values())]
        )
        run_steps(steps, config.jobs)
    command = f"make reproduce-{'ablations' if ablations else 'table'} PROFILE={name}"
    if config.seeds != load_config(TableConfig, name, {}).seeds:
        command += f" SEEDS={len(config.seeds)}"
    facts = facts_of(plan, command) | {
        "Time": f"{sum(map(seconds_of, steps)):.0f} s over {len(steps)} steps, {config.jobs} at a time"
    }
    if ablations:
        _report_ablations(plan, parts, facts)
    else:
        _report_comparison(plan, runs, facts)


def _parts(plan: Plan, ablations: bool) -> tuple[dict[str, list[Run]], list[Step]]:
    """The runs of each table, and the steps that lead to them, without the evaluations of snapshots."""
    parts = _ablations(plan) if ablations else {"comparison": plan.comparison()}
    runs = [run for part in parts.values() for run in part]
    evaluated = [_ablated(plan, run) for run in runs] if ablations else []
    if ablations and is_toy(plan):  # whose answers the wins are counted against
        evaluated += [plan.evaluation(plan.run("sft", "SFT", seed, None)) for seed in plan.config.seeds]
    evaluated = evaluated or [plan.evaluation(run) for run in runs]
    steps = unique([*(run.train for run in runs if run.train), *evaluated])
    return parts, [*plan.base, plan.train_cache, plan.heldout_cache, *steps]


def _print_plan(name: str, config: TableConfig) -> None:
    """Prints what would run and what is missing. An embedded world that does not exist is planned, not made."""
    with tempfile.TemporaryDirectory(prefix="embedded-world-") as scratch:
        world, making = world_folder(), []
        if any(in_the_world(getattr(config, field)) for field in ("model", "sae")) and not is_made(world):
            typer.echo("the embedded world does not exist yet; the first steps make it, once")
            world = Path(scratch)
            begin(world)
            training, saes = world_steps(world)
            making = [training, *saes]
        _, steps = _parts(make_plan(name, config, world), config.ablations)
        for line in missing([*making, *steps], config.jobs):
            typer.echo(f"missing: {line}")
        print_plan([*making, *steps])


def unique(steps: Sequence[Step]) -> list[Step]:
    """Each step once, in the order in which they first appear."""
    return list({step.out: step for step in steps}.values())


def _ablations(plan: Plan) -> dict[str, list[Run]]:
    return {"sites": plan.site_ablation(), "alpha": plan.weight_ablation(), "layers": plan.sum_ablation()}


def _report_comparison(plan: Plan, runs: Sequence[Run], facts: dict[str, str]) -> None:
    evaluations = {run: plan.evaluation(run) for run in runs}
    found, out = _measured(plan, evaluations), _out(plan)
    judged = judged_records(plan, evaluations) if plan.config.judge_endpoint else {}
    records = [record | judged.get(run, {}) for run, record in zip(runs, found.records, strict=True)]
    curves = curves_of({run: snapshots(plan, run) for run in first_seed(plan, runs)})
    write_records(records, (*COLUMNS, *JUDGED) if judged else COLUMNS, out, "comparison")
    write_scores(found.scores.rows, out / "comparison-scores.csv")
    tables = [_table(caption, records, columns) for caption, columns in TABLES.items()]
    if found.answers:
        tables.insert(1, wins_table(found.answers))
    if judged:
        tables.insert(0, _table(f"Sampled answers, judged by {plan.config.judge}", records, JUDGED))
    header, body = paper_columns(plan.base_model, "comparison", list(by_row(records)))
    if header:
        rows = [[LABELS[row], *line] for row, line in zip(by_row(records), body, strict=True)]
        tables.append(Table("The paper's figures; not measured here", ["", *header], rows))
    if rates := win_rates(plan.base_model):
        tables.append(Table("The paper's Table 2, left; not measured here", *rates))
    claims = comparison_claims(records, rank_correlations(curves), found.scores)
    folder = out / "figures"
    lead = leading_figure(plan, records, found.scores, found.answers, folder)
    drawn = comparison_figures(plan, runs, records, curves, folder)
    if found.answers:
        drawn = [*success_figures(plan, runs, folder), *drawn]
        facts |= {"SFT's answers, asked for / the counterpart's, %": _by_family(plan, found.answers)}
    if judged:
        drawn = [judged_figure(plan, runs, folder), *drawn]
        facts |= {"Judge": f"{plan.config.judge}, {plan.config.judge_mode}; first sample to each prompt, both orders"}
    _write(plan, "table", tables, claims, facts, lead, drawn)


def _by_family(plan: Plan, answers: Mapping[Run, Answers]) -> str:
    """What the reference says in each family of tasks, under the first seed."""
    (reference,) = (run for run in answers if run.train is None and run.seed == plan.config.seeds[0])
    shares = answers[reference].by_family()
    return ", ".join(f"{name} {100 * right:.0f} / {100 * other:.0f}" for name, (right, other) in shares.items())


@dataclass(frozen=True)
class _Measured:
    """What evaluations say of runs: a record each, in the order of the runs; judged answers; and the rows' scores."""

    records: list[Record]
    answers: dict[Run, Answers]
    scores: Scores


def _measured(plan: Plan, evaluations: Mapping[Run, Step]) -> _Measured:
    """Reads the evaluations; in the embedded world the score is the share of right answers, elsewhere raw accuracy."""
    records = [read_record(run, evaluation) for run, evaluation in evaluations.items()]
    if not is_toy(plan):
        wins = {run: pair_wins(evaluation.out) for run, evaluation in evaluations.items()}
        return _Measured(records, {}, Scores("pairs ranked right", by_seed(wins)))
    answers = {run: read_answers(evaluation.out) for run, evaluation in evaluations.items()}
    origin = {seed: read_answers(plan.evaluation(plan.run("sft", "SFT", seed, None)).out) for seed in plan.config.seeds}
    records = [
        record | success_record(found, origin[run.seed])
        for record, (run, found) in zip(records, answers.items(), strict=True)
    ]
    scores = Scores("right answers", by_seed({run: found.success_P for run, found in answers.items()}))
    return _Measured(records, answers, scores)


def _out(plan: Plan) -> Path:
    """The folder of the results, which is there from now on."""
    assert isinstance(plan.config.out, Path)
    plan.config.out.mkdir(parents=True, exist_ok=True)
    return plan.config.out


def comparison_figures(
    plan: Plan, runs: Sequence[Run], records: Sequence[Record], curves: Sequence[Curve], folder: Path
) -> list[PageFigure]:
    """Draws and saves every figure.

    Args:
        plan: the plan of the runs.
        runs: every row under every seed.
        records: one for each run, in the same order.
        curves: one for each trained run of the first seed.
        folder: receives the PNG and SVG files.
    """
    note, seed = short_note(plan), f"seed {plan.config.seeds[0]}"
    note_of_seed = f"{note}; {seed} alone" if len(plan.config.seeds) > 1 else note
    trained = {row: found for row, found in by_row(records).items() if row != "sft"}
    memory = {row: [record["train/peak_memory_bytes"] / 1e6 for record in found] for row, found in trained.items()}
    chosen, rejected = (
        figures.Bars(
            {row: [run[f"features/mse_{side}"] for run in found] for row, found in trained.items()}, "activation²"
        )
        for side in ("chosen", "rejected")
    )
    top_k = plan.evaluation(runs[0]).config.top_k
    drawn: list[tuple[str, str, Callable[[], Figure]]] = [
        (
            "figure-2-left",
            "Figure 2, left: how fast pooled feature activations fall with their rank in a response.",
            lambda: figures.activation_by_rank(ranked_activations(plan), top_k, note),
        ),
        (
            "figure-3",
            f"Figure 3: sequential KL to the reference on held-out pairs over training, {seed}.",
            lambda: figures.kl_over_training(curves, note_of_seed),
        ),
        (
            "figure-4-left",
            "Figure 4, left: peak memory of tensors in training.",
            lambda: figures.peak_memory(figures.Bars(memory, "MB"), note),
        ),
        (
            "figure-4-right",
            "Figure 4, right: feature MSE to the reference after training.",
            lambda: figures.feature_mse(chosen, rejected, note),
        ),
        (
            "kl-against-mse",
            f"Not in the paper: KL against feature MSE across methods at equal steps, {seed}.",
            lambda: figures.kl_against_mse(curves, note_of_seed),
        ),
        (
            "token-bound",
            f"Not in the paper: per token, the KL against the bound of its Appendix B, {seed}.",
            lambda: figures.token_bound(bound_tokens(plan, runs, records, BOUND_ROWS), note_of_seed),
        ),
    ]
    made = []
    for name, caption, draw in drawn:
        svg = save(draw(), folder, name)
        made.append(PageFigure(caption, svg.read_text(), caption))
    return made


def _report_ablations(plan: Plan, parts: dict[str, list[Run]], facts: dict[str, str]) -> None:
    captions = {
        "sites": "Table 3, left: the constraint at one site",
        "alpha": "Table 3, right: α, with and without stop-gradient (sg)",
        "layers": "Table 7: the constraint at several sites",
    }
    tables, scores = [], {}
    for name, runs in parts.items():
        if not runs:
            continue
        evaluations = {run: _ablated(plan, run) for run in runs}
        found = _measured(plan, evaluations)
        constrained = [run.train.config.site for run in runs if run.train]
        records = [
            record | mse_by_site(record, sites) for record, sites in zip(found.records, constrained, strict=True)
        ]
        write_records(records, ABLATION_COLUMNS, _out(plan), name)
        write_scores(found.scores.rows, _out(plan) / f"{name}-scores.csv")
        table = _table(captions[name], records, ABLATION_COLUMNS)
        header, more = paper_columns(plan.base_model, name, list(by_row(records)))
        body = [[*left, *right] for left, right in zip(table.rows, more, strict=True)]
        tables.append(Table(table.caption, [*table.header, *header], body))
        scores[name] = found.scores
        if name == "alpha":
            weights = records
            entropies = by_seed({run: entropy_of_prompts(step.out) for run, step in evaluations.items()})
            write_scores(entropies, _out(plan) / "alpha-entropies.csv")
    claims = ablation_claims(weights, scores.get("sites"), scores["alpha"], entropies)
    _write(plan, "ablations", tables, claims, facts)


def _ablated(plan: Plan, run: Run) -> Step:
    """The evaluation of a run of the ablations: feature MSE at every site, so that all rows have the same."""
    return plan.evaluation(run, site=tuple(plan.saes))


def _table(caption: str, records: Sequence[Record], columns: Sequence[Column]) -> Table:
    """Records as a table, without the columns of which none has a value."""
    shown = measured(records, columns)
    return Table(caption, ["", *(column.title for column in shown)], cells(records, shown))


def _write(
    plan: Plan,
    name: str,
    tables: Sequence[Table],
    claims: Sequence[Claim],
    facts: dict[str, str],
    lead: PageFigure | None = None,
    figures: Sequence[PageFigure] = (),
) -> None:
    """Writes the Markdown file and the HTML page."""
    out, note = _out(plan), note_of(plan)
    answers = [[claim.text, claim.answer, claim.figures] for claim in claims]
    judged = Table("The paper's claims", ["claim", "here", "figures"], answers, prose=True)
    tables = [*tables, judged]
    listed = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    text = f"{note}\n\n" + "".join(table.markdown for table in tables) + listed
    write_atomically(out / f"{name}.md", text.encode())
    title = f"FPO: {name}, profile {plan.name}"
    write_page(out / f"{name}.html", Page(title, note, lead, tables, list(figures), facts))
    typer.echo(f"{out}: {name}.md, {name}.html" + (", figures/" if figures else ""))
    typer.echo(tables[0].markdown)
