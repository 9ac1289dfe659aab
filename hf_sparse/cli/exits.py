"""`hf-sparse crop` and `export`: what is dead cut away for good, and files for other engines."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_sparse.cli.convert import Destination, write_folder
from hf_sparse.cli.support import (
    Debug,
    Force,
    Json,
    ModelFolder,
    check_destination,
    check_model_folder,
    guarded,
    load_model,
    print_json,
    quiet_transformers,
)

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
    """Cut units that died in every layer out of a pruned model, for good. Any engine gains; loads without hf_sparse.

    The copy is dense and gives the same outputs up to rounding: what dead units still gave is folded into biases.
    """
    check_model_folder(src)
    check_destination(src, dst, force)
    quiet_transformers()
    from hf_sparse.inference.exits.crop import crop as crop_model
    from hf_sparse.inference.exits.structure import croppable_layers

    model = load_model(src)
    fields = sorted({layer.feed_forward.size for layer in croppable_layers(model)})
    before = _sizes(model, fields)
    after = _sizes(crop_model(model, multiple=multiple), fields)
    if before == after:
        raise ValueError(
            f"{src} has no units that are dead in every layer, so nothing can be cropped. `hf-sparse export` cuts "
            f"each layer as far as it goes."
        )
    written = write_folder(model.save_pretrained, src, dst, "dense")
    if as_json:
        print_json({"path": str(dst), "before": before, "after": after, "bytes": written.dense_bytes})
    else:
        sizes = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in fields)
        typer.echo(f"{dst}: {sizes}, {written.dense_bytes:,} bytes")


@guarded
def export(
    src: ModelFolder,
    dst: Destination,
    to: Annotated[str, typer.Option(help="onnx, openvino or torch (a program of torch.export).")] = "onnx",
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
    check_model_folder(src)
    check_destination(src, dst, force)
    quiet_transformers()
    from hf_sparse.hub.push import TRAINING_STATE, WEIGHT_FILES
    from hf_sparse.inference.exits.export import export as export_model

    errors = export_model(load_model(src), dst, to=to, crop=crop)
    left_out = (*_LEFT_OUT, *TRAINING_STATE, *WEIGHT_FILES)
    for file in sorted(path for path in src.iterdir() if path.is_file()):
        if not any(fnmatch.fnmatch(file.name, pattern) for pattern in left_out):
            shutil.copy2(file, dst / file.name)
    files = {file.name: file.stat().st_size for file in sorted(Path(dst).iterdir()) if file.is_file()}
    if as_json:
        print_json({"path": str(dst), "to": to, "largest_difference": errors, "files": files})
    else:
        told = ", ".join(f"{name} within {error:.1e}" for name, error in errors.items())
        typer.echo(f"{dst}: {', '.join(files)}; checked: {told}")


def _sizes(model: Any, fields: list[str]) -> dict[str, int]:
    return {name: getattr(model.config, name) or 4 * model.config.hidden_size for name in fields}
