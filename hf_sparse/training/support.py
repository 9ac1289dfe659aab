"""What a run cannot do yet, refused at construction with the way out instead of trained wrongly."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_sparse.core.structure.readers import reader_of
from hf_sparse.core.structure.targets import find_targets
from hf_sparse.inference.compress import compressed_tensors
from hf_sparse.inference.exits.structure import croppable_layers
from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.pruning.sensitivity import keeps_means, no_means_of_shards

if TYPE_CHECKING:
    from hf_sparse.training.trainer import SparseDistillTrainer


def refuse_unsupported_engine(args: TrainingArguments) -> None:
    """Refuse launch modes in which masks or the penalty would not reach the weights that are trained.

    Raises:
        ValueError: naming the setting and the way out.
    """
    way_out = "Launch with plain DDP (accelerate launch --multi_gpu), or with FSDP2: examples/accelerate/ has both."
    # `accelerate launch` turns engines on through the environment alone.
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            f"deepspeed={args.deepspeed or True!r} is not supported: ZeRO steps on weights and gradients of its own, "
            f"flattened, from which pruned blocks would come back and which the penalty would not reach. {way_out} "
            f"FSDP2 shards weights, gradients and optimizer states as ZeRO-3 does."
        )
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        given: Any = args.fsdp_config or {}
        version = int(given.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", "1"))
        if version != 2 or given.get("xla"):
            raise ValueError(
                f"FSDP version {version}{' on XLA' if given.get('xla') else ''} is not supported: it flattens "
                f"weights, so that a shard has neither rows nor blocks. Use FSDP2: fsdp_version: 2 in the accelerate "
                f"config, or fsdp_config={{'version': 2}}."
            )
        if torch.__version__ < "2.7":
            raise ValueError(
                f"FSDP2 with torch {torch.__version__} is not supported: accelerate asks it for what came with torch "
                f"2.7. Update torch, or launch with plain DDP (accelerate launch --multi_gpu)."
            )
    refuse_other_parallelism(args)
    if args.parallel_mode.name == "SAGEMAKER_MODEL_PARALLEL":
        raise ValueError(f"SageMaker model parallelism is not supported: it cuts through blocks. {way_out}")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would train through nn.DataParallel, which is not supported. {way_out} "
            f"Or show the process one GPU with CUDA_VISIBLE_DEVICES=0."
        )


def refuse_other_parallelism(args: TrainingArguments) -> None:
    """Refuse parallelism in which several ranks see the same samples: steps would be counted as larger than they are.

    Raises:
        ValueError: naming the setting.
    """
    given = getattr(args, "parallelism_config", None)
    if given is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        given = ParallelismConfig()
    for name in ("tp_size", "cp_size", "sp_size"):
        if given is not None and getattr(given, name, 1) > 1:
            raise ValueError(
                f"parallelism_config with {name}={getattr(given, name)} is not supported: only data parallelism is. "
                f"Use dp_shard_size for FSDP2, with dp_replicate_size for copies of the shards."
            )


def refuse_unsupported_model(model: nn.Module, config: SparseDistillConfig) -> None:
    """Refuse models that would be trained but could not be saved, or whose weights are not the ones trained.

    Raises:
        ValueError: naming what was found and the way out.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            f"{type(model).__name__} was sharded while it was loaded. Load it whole, without distributed_config or "
            f"tp_plan, and let accelerate shard it: examples/accelerate/fsdp2.yaml."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} holds PEFT adapters, whose base weights do not train. "
            f"Merge them first: model = model.merge_and_unload()."
        )
    if (config.sparsity or config.penalty_weight) and compressed_tensors(model)[0]:
        raise ValueError(
            f"{type(model).__name__} is compressed already. Make it dense first: hf_sparse.decompress(model), or "
            f"load it with hf_sparse.load_dense."
        )
    if not isinstance(model, PreTrainedModel) and config.save_format != "dense" and config.sparsity > 0.0:
        raise ValueError(
            f"save_format={config.save_format!r} needs a PreTrainedModel with a config, not a {type(model).__name__}: "
            f"use save_format='dense'."
        )
    if config.sparsity and config.save_format != "dense":
        _refuse_linears_read_by_their_parent(model, config)
    if config.save_format == "cropped":
        # Said now, and not after the training.
        croppable_layers(model)


def _refuse_linears_read_by_their_parent(model: nn.Module, config: SparseDistillConfig) -> None:
    read = {name: reader for name, _ in model.named_modules() if (reader := reader_of(model, name))}
    if not read:
        return
    if picked := [name for name in find_targets(model, config.target_modules, config.exclude_modules) if name in read]:
        names = "|".join(sorted({name.rpartition(".")[2] for name in picked}))
        raise ValueError(
            f"{read[picked[0]]} reads the weight of {picked[0]} without calling it, so that the model "
            f"would not run once that is compressed. Leave {len(picked)} layer(s) of this kind out with "
            f"exclude_modules=r'.*({names})', or use save_format='dense'."
        )


def refuse_unsupported_optimizer(trainer: SparseDistillTrainer) -> None:
    """Refuse an optimizer without second moments, where Fisher information could come from nowhere else.

    Raises:
        ValueError: under FSDP2, naming the optimizer and the way out. One that cannot be tried beforehand is let
            through; `SquaredGradients.watch` refuses it in its first step.
    """
    args = trainer.args
    if not trainer.engine.is_sharded or args.importance != "fisher" or not args.sparsity:
        return
    if not hasattr(trainer, "optimizer"):
        # `model_init` makes the model before `Trainer` has taken the optimizer; asked again when training begins.
        return
    given = trainer.optimizer
    if given is not None:
        given = getattr(given, "optimizer", given)
        taken = inspect.signature(type(given)).parameters
        kind, settings = type(given), {name: value for name, value in given.defaults.items() if name in taken}
        name = kind.__name__
    else:
        try:
            kind, settings = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args)
        except (ValueError, ImportError):
            # It wants the model, or is not installed: Trainer will say so.
            return
        named = getattr(args.optim, "value", args.optim)
        name = kind.__name__ if trainer.optimizer_cls_and_kwargs else f"optim={named!r}"
    if keeps_means(kind, settings, args.device) is False:
        raise no_means_of_shards(name)


def predicts_next(model: nn.Module) -> bool:
    """Tell whether position i of the logits predicts label i + 1, as in causal language models."""
    # Classes that are older than the naming scheme, GPT-2's among them, declare no loss type.
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return True
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss and not encoder_decoder


@contextlib.contextmanager
def explaining_loss(model: nn.Module) -> Iterator[None]:
    """Turn what `Trainer` says of a model without a loss of its own into what such a model needs."""
    try:
        yield
    except ValueError as error:
        if "did not return a loss" not in str(error):
            raise
        raise ValueError(
            f"{type(model).__name__} returns no loss for these inputs, which task_weight needs: set task_weight=0 to "
            f"learn from the teacher alone, pass compute_loss_func, or use a model with a head, and labels. ({error})"
        ) from error
