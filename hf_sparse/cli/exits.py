"""`hf-sparse crop` and `export`: what is dead cut away for good, and files for other engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hf_sparse.cli.folders import Destination, check_folders, copy_others, write_folder
from hf_sparse.cli.support import Debug, Force, Json, ModelFolder, guarded, load_model, print_json

if TYPE_CHECKING:
    from hf_sparse.inference.exits.crop import LayerUnits

# Beside the weights, an exported model needs what prepares its inputs; cards and pictures tell of another folder.
_LEFT_OUT = ("config.json", "README.md", "*.png", "hf_sparse_card.json")


@guarded
def crop(
    src: ModelFolder,
    dst: Destination,
    multiple: Annotated[int, typer.Option(help="Leave a multiple of so many units.")] = 1,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut dead units out of a pruned model for good, and dead heads where its config counts them. Any engine gains.

    The copy is dense, loads without hf_sparse, and gives the same outputs up to rounding: what the dead still gave is
    folded into biases. All layers stay as large as the one that needs most, since a config holds one size for them.
    """
    check_folders(src, dst, force)
    if multiple < 1:
        raise ValueError(f"--multiple {multiple} must be at least 1.")
    from hf_sparse.inference.exits.crop import crop as crop_model
    from hf_sparse.inference.exits.crop import sizes_told, units_of

    model = load_model(src)
    before, units = sizes_told(model), units_of(model)
    after = sizes_told(crop_model(model, multiple=multiple))
    if before == after:
        raise ValueError(_nothing_to_crop(src, units, multiple))

    def convert(staging: Path) -> None:
        model.save_pretrained(staging)
        # What plain from_pretrained would not read back as it was is no exit.
        load_model(staging)

    written = write_folder(convert, src, dst, "dense")
    left = sum(units_of(model)[name].total - found.live for name, found in units.items())
    if as_json:
        sizes = {"before": before, "after": after}
        print_json({"path": str(dst), **sizes, "dead_units_left": left, "bytes": written.dense_bytes})
        return
    sizes_said = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name])
    typer.echo(f"{dst}: {sizes_said}, {written.dense_bytes:,} bytes")
    if left:
        typer.echo(
            f"{left} dead units stay, because all layers are as large as the one that needs most: `hf-sparse export` "
            f"cuts each as far as it goes.",
            err=True,
        )


@guarded
def export(
    src: ModelFolder,
    dst: Destination,
    to: Annotated[
        Literal["onnx", "openvino", "torch"], typer.Option(help="Form to write; torch is a program of torch.export.")
    ] = "onnx",
    crop: Annotated[
        bool | None,
        typer.Option(
            "--crop/--no-crop",
            help="Cut away dead heads and units, layer by layer. (default: where the model is known, not for torch)",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model for another engine, and check there that it computes the same.

    Pruned blocks become zeros, which those engines do not skip; what died as a whole is cut away.
    """
    check_folders(src, dst, force)
    from hf_sparse.inference.exits.export import FILES
    from hf_sparse.inference.exits.export import export as export_model

    errors = export_model(load_model(src), dst, to=to, crop=crop)
    copied = copy_others(src, dst, (*_LEFT_OUT, *FILES[to]), overwrite=True)
    # Those of an earlier export of another form or model, which may lie there, were not checked now.
    written = sorted({"config.json", *FILES[to], *copied})
    files = {name: (dst / name).stat().st_size for name in written}
    if as_json:
        print_json({"path": str(dst), "to": to, "largest_difference": errors, "files": files})
    else:
        told = ", ".join(f"{name} within {error:.1e}" for name, error in errors.items())
        typer.echo(f"{dst}: {', '.join(files)}; checked: {told}")


def _nothing_to_crop(src: Path, units: dict[str, LayerUnits], multiple: int) -> str:
    dead = sum(found.total - found.live for found in units.values())
    if not dead:
        return (
            f"{src} has no dead unit, so nothing can be cropped: units die as a whole where they are pruned so, "
            f'with feed_forward="units" or the preset "hybrid".'
        )
    fullest = max(units, key=lambda name: units[name].live / units[name].total)
    needed = units[fullest]
    rounded = f" in multiples of {multiple}" if multiple > 1 else ""
    return (
        f"{src} has {dead} dead units, but {fullest} needs {needed.live} of its {needed.total}{rounded}, and a config "
        f"holds one size for all layers: `hf-sparse export` cuts each as far as it goes, and a budget for each layer "
        f'(sparsity_scope="layer") makes them equal.'
    )
