"""`hf-sparse plan`: the schedule of a config, before anything is spent on it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse.cli.support import Debug, Json, guarded, print_json

if TYPE_CHECKING:
    from hf_sparse.training.schedules import StepPlan

_ROWS = 24
_BAR_WIDTH = 20


@guarded
def plan(
    config: Annotated[Path, typer.Argument(help="JSON file with fields of SparseDistillConfig.", show_default=False)],
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Optimizer steps of the run; max_steps of the config if not given."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a training run would do at each step: sparsity, graft probability, penalty weight."""
    plans = _plans(config, steps)
    if as_json:
        print_json([asdict(step) for step in plans])
    else:
        _print_table(plans)


def _plans(config_file: Path, steps: int | None) -> list[StepPlan]:
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file} is not a file: expected a JSON file with fields of SparseDistillConfig."
        )
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{config_file} must hold a JSON object, found {type(values).__name__}.")

    from transformers import TrainingArguments

    from hf_sparse.training.config import SparseDistillConfig
    from hf_sparse.training.schedules import plan_step

    known = {spec.name for spec in fields(SparseDistillConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{config_file}: SparseDistillConfig has no field {unknown[0]!r}.")
    # The other fields may ask for hardware that this machine, which only plans, does not have.
    own = known - {spec.name for spec in fields(TrainingArguments)}
    settings: dict[str, Any] = {name: value for name, value in values.items() if name in own}
    config = SparseDistillConfig(output_dir=".", use_cpu=True, **settings)
    total = steps or values.get("max_steps", -1)
    if not isinstance(total, int) or total < 1:
        raise ValueError(f"{config_file} has no max_steps above 0, and epochs depend on the data: pass --steps.")
    return [plan_step(config, step, total) for step in range(total)]


def _print_table(plans: list[StepPlan]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "sparsity", "", "graft prob", "penalty weight", "masks", box=None)
    for column in (0, 1, 3, 4):
        table.columns[column].justify = "right"
    for plan in _thinned(plans):
        bar = "█" * round(_BAR_WIDTH * plan.sparsity)
        table.add_row(
            f"{plan.step:,}",
            f"{plan.sparsity:.2%}",
            bar.ljust(_BAR_WIDTH, "·"),
            f"{plan.graft_prob:.3f}",
            f"{plan.penalty_weight:g}",
            "chosen anew" if plan.update_masks else "",
        )
    Console().print(table)
    updates = sum(plan.update_masks for plan in plans)
    final = next(plan.step for plan in plans if plan.final_sparsity)
    typer.echo(
        f"{len(plans):,} steps, {updates} mask updates, final sparsity {plans[-1].sparsity:.2%} from step {final:,}"
    )


def _thinned(plans: list[StepPlan]) -> list[StepPlan]:
    """Keep about two dozen steps, evenly spread, and those at which pruning or grafting ends."""
    shown = {round(i * (len(plans) - 1) / (_ROWS - 1)) for i in range(_ROWS)}
    for done in (lambda p: p.final_sparsity, lambda p: p.graft_prob == 1.0):
        shown |= {next((plan.step for plan in plans if done(plan)), 0)}
    return [plans[step] for step in sorted(shown)]
