"""`hf-sparse plan`: the schedule of a config and the size of what it gives, before anything is spent on it."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse.cli.support import Debug, Json, Revision, Token, guarded, print_json, quiet_transformers, resolve_model

if TYPE_CHECKING:
    from hf_sparse.core.report import SparsityReport
    from hf_sparse.training.config import SparseDistillConfig
    from hf_sparse.training.schedules import StepPlan

_ROWS = 24
_BAR_WIDTH = 20


@guarded
def plan(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="JSON file with fields of SparseDistillConfig. Not needed with --model.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Optimizer steps of the run; max_steps of the config if not given."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the schedule: a .png or .svg file.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Also tell what this model will weigh, layer by layer: a folder or a repository on the Hub."
        ),
    ] = None,
    block_height: Annotated[int | None, typer.Option(help="Output rows per block, in place of the config's.")] = None,
    block_width: Annotated[int | None, typer.Option(help="Input columns per block, in place of the config's.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Sparsity to plan for, in place of the config's.")] = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a training run would do at each step, and with --model what it would save in bytes."""
    if config is None and model is None:
        raise typer.BadParameter("name a CONFIG, a --model, or both.")
    if plot is not None:
        _check_plot(plot, config)
    given = {"block_height": block_height, "block_width": block_width, "sparsity": sparsity}
    values = _read_values(config) if config else {}
    settings = _settings({**values, **{name: value for name, value in given.items() if value is not None}}, config)
    plans = _plans(settings, config, steps or values.get("max_steps", -1)) if config else []
    size = _size(model, settings, revision, token) if model else None
    if plot is not None:
        _draw(plans, plot)
    if as_json:
        rows = [asdict(step) for step in plans]
        print_json(rows if size is None else {"steps": rows, "scope": settings.budget_scope, "model": size.to_dict()})
        return
    if plans:
        _print_table(plans)
    if size is not None:
        typer.echo(str(size))
        if settings.sparsity and settings.budget_scope == "global":
            typer.echo("One budget for all layers: the sum holds, and training decides which layer keeps how much.")


def _read_values(config_file: Path) -> dict[str, Any]:
    if config_file.is_dir():
        raise IsADirectoryError(f"{config_file} is a folder: expected a JSON file; a model is named by --model.")
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file} is not a file: expected a JSON file with fields of SparseDistillConfig."
        )
    from hf_sparse.core.stored.reading import read_object

    return read_object(config_file)


def _settings(values: dict[str, Any], config_file: Path | None) -> SparseDistillConfig:
    from transformers import TrainingArguments

    from hf_sparse.training.config import SparseDistillConfig

    known = {spec.name for spec in fields(SparseDistillConfig)}
    if model_config := sorted({"model_type", "architectures"} & set(values)):
        raise ValueError(
            f"{config_file} is the config of a model (it holds {model_config[0]!r}): expected a JSON file with fields "
            f"of SparseDistillConfig; a model is named by --model."
        )
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{config_file}: SparseDistillConfig has no field {unknown[0]!r}.")
    # The other fields may ask for hardware that this machine, which only plans, does not have.
    own = known - {spec.name for spec in fields(TrainingArguments)}
    settings = {name: value for name, value in values.items() if name in own}
    return SparseDistillConfig(output_dir=".", use_cpu=True, **settings)


def _plans(settings: SparseDistillConfig, config_file: Path, total: Any) -> list[StepPlan]:
    from hf_sparse.training.schedules import plan_step

    if not isinstance(total, int) or total < 1:
        raise ValueError(f"{config_file} has no max_steps above 0, and epochs depend on the data: pass --steps.")
    return [plan_step(settings, step, total) for step in range(total)]


def _size(model: str, settings: SparseDistillConfig, revision: str | None, token: str | None) -> SparsityReport:
    from hf_sparse.cli.support import is_compressed
    from hf_sparse.core.estimate import estimate
    from hf_sparse.core.structure.feed_forward import find_feed_forwards, unit_overrides
    from hf_sparse.core.structure.targets import find_targets
    from hf_sparse.inference.stored.streaming import empty_model

    quiet_transformers()
    folder = resolve_model(model, revision, token, weights=False)
    if is_compressed(folder):
        raise ValueError(f"{model} is compressed already: `hf-sparse report {model}` tells what it weighs.")
    empty, overrides = empty_model(folder), settings.shape_overrides
    if settings.feed_forward == "units":
        targets = find_targets(empty, settings.target_modules, settings.exclude_modules)
        overrides = {**overrides, **unit_overrides(find_feed_forwards(empty, targets))}
    return estimate(
        empty, settings.block_shape, settings.sparsity, overrides, settings.target_modules, settings.exclude_modules,
        settings.budget_scope, settings.layer_share,
    )  # fmt: skip


def _check_plot(plot: Path, config: Path | None) -> None:
    if config is None:
        raise typer.BadParameter("--plot draws the schedule of a CONFIG: name one.")
    if plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot {plot}: the name must end in .png or .svg.")
    if not plot.parent.is_dir():
        raise FileNotFoundError(f"--plot {plot}: {plot.parent} is no folder.")
    from hf_sparse.hub.plots import require_matplotlib

    require_matplotlib()


def _draw(plans: list[StepPlan], plot: Path) -> None:
    from hf_sparse.hub.plots import draw_training, save

    shown = ("step", "sparsity", "graft_prob", "penalty_weight")
    figure, _ = draw_training([{name: getattr(step, name) for name in shown} for step in plans])
    save(figure, plot)
    typer.echo(f"{plot} shows the schedule.", err=True)


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
