"""The teacher: found, frozen, and checked against what the losses will ask of it."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import cached_file

from hf_sparse.inference.compress import compressed_tensors
from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.distillation.graft import graft_sites
from hf_sparse.training.distillation.layerwise import check_sides, depths, resolve_layer_map

logger = logging.getLogger(__name__)


def load_teacher(teacher: nn.Module | str | os.PathLike[str], student: nn.Module) -> nn.Module:
    """Give the teacher, frozen and in eval mode.

    Args:
        teacher: a model, or the folder or repo id of one for the student's task; it may be of another family.
        student: decides the task head with which a path is loaded.

    Raises:
        TypeError: if `teacher` is neither a module nor a path or repo id, or no Auto class fits the student.
        OSError: if nothing can be loaded from there.
        ValueError: if the teacher is the student itself.
    """
    if isinstance(teacher, str | os.PathLike):
        auto_class, path = _auto_class(student), os.fspath(teacher)
        try:
            teacher = auto_class.from_pretrained(path)
        except OSError as error:
            raise OSError(
                f"teacher_model={path!r} cannot be loaded with {auto_class.__name__}: {str(error).splitlines()[0]} "
                f"Use the folder or repo id of a model, a loaded model, or None for a copy of the one being trained."
            ) from error
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher_model={teacher!r} must be a model, a path or a repo id, or None for a copy of the student."
        )
    if teacher is student or {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
        raise ValueError(
            "teacher_model shares parameters with the model being trained, so both would be pruned. "
            "Pass teacher_model=None: a frozen copy of the model is then taken when training starts."
        )
    return teacher.requires_grad_(False).eval()


def copy_as_teacher(student: nn.Module) -> nn.Module:
    """Take a frozen copy of the student as it is now: the papers' teacher, where the model is fine-tuned already."""
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for module in teacher.modules():
        module.__dict__.pop("block_mask", None)
    return teacher


def check_tokenizer(tokenizer: Any, teacher: nn.Module | str | os.PathLike[str] | None) -> None:
    """Refuse a teacher that was trained with another tokenizer, where both tokenizers are at hand.

    Args:
        tokenizer: what the trainer was given as processing class; looked at if it has a vocabulary.
        teacher: as the caller chose it. Its tokenizer is looked for where it was loaded from.

    Raises:
        ValueError: naming the first token with two ids.
    """
    path = getattr(teacher, "name_or_path", None) if isinstance(teacher, nn.Module) else teacher
    if not path or not hasattr(tokenizer, "get_vocab"):
        return
    # What a model in memory was loaded from is looked up on this machine alone.
    local: dict[str, Any] = {"local_files_only": isinstance(teacher, nn.Module)}
    try:
        # Asked for by name, because a folder without a tokenizer is read as an empty one.
        cached_file(path, "tokenizer_config.json", **local)
        theirs = AutoTokenizer.from_pretrained(path, **local).get_vocab()
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.info("teacher_model has no tokenizer that could be compared: %s", str(error).splitlines()[0])
        return
    mine = tokenizer.get_vocab()
    if different := sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)):
        raise ValueError(
            f"teacher_model reads other tokens: {different[0]!r} is {mine.get(different[0])} for the trainer's "
            f"tokenizer and {theirs.get(different[0])} for that of {path}, and {len(different)} tokens differ in all. "
            f"Token ids would mean something else to it: use a teacher with the same tokenizer."
        )


def check_teacher(student: nn.Module, teacher: nn.Module, config: SparseDistillConfig, hidden_weight: float) -> None:
    """Refuse a teacher that does not fit the requested losses.

    Args:
        student, teacher: the models.
        config: the run's settings.
        hidden_weight: the weight in effect, with None resolved.

    Raises:
        ValueError: naming the setting, what the student and the teacher have, and the way out.
    """
    mine, theirs = getattr(student, "config", None), getattr(teacher, "config", None)
    padded = "call teacher.resize_token_embeddings if the tokenizer is the same and one of the embeddings only padded"
    same_ids = "the same tokenizer, so that both read the same token ids"
    _same(mine, theirs, "vocab_size", "teacher_model", same_ids, padded)
    if config.kd_weight:
        _same(mine, theirs, "num_labels", f"kd_weight={config.kd_weight}", "the same labels", "set kd_weight=0")
        labels: list[dict[str, int]] = [getattr(c, "label2id", None) or {} for c in (mine, theirs)]
        # The same names in another order would teach the student the wrong classes.
        if set(labels[0]) == set(labels[1]) and labels[0] != labels[1]:
            raise ValueError(
                f"teacher_model orders the labels as {labels[1]}, the model as {labels[0]}: reload one of them with "
                f"the other's label2id and id2label."
            )
    by_layers = hidden_weight or config.attention_weight or config.graft_start < 1.0
    if by_layers and compressed_tensors(teacher)[0]:
        raise ValueError(
            "teacher_model is compressed, and layers are compared or grafted with plain ones: load it with "
            "hf_sparse.load_dense, or set hidden_weight=0, attention_weight=0 and graft_start=1."
        )
    check_depths(student, teacher, config, hidden_weight)
    if config.attention_weight:
        asked = f"attention_weight={config.attention_weight}"
        _same(mine, theirs, "num_attention_heads", asked, "as many attention heads", "set attention_weight=0")
    if config.graft_start < 1.0:
        graft_sites(student, teacher)
        dtypes = [next((p.dtype for p in model.parameters()), None) for model in (student, teacher)]
        if dtypes[0] != dtypes[1]:
            raise ValueError(
                f"graft_start={config.graft_start} hands hidden states from layers of the model, in {dtypes[0]}, to "
                f"layers of the teacher, in {dtypes[1]}: load both in one dtype, or set graft_start=1."
            )


def check_depths(student: nn.Module, teacher: nn.Module, config: SparseDistillConfig, hidden_weight: float) -> None:
    """Refuse a teacher whose layers cannot be compared with the student's, as `layer_map` pairs them.

    Args:
        student, teacher: the models.
        config: the run's settings.
        hidden_weight: the weight in effect, with None resolved.

    Raises:
        ValueError: naming the setting, the layers of both or the forward that does not return them, and the way out.
    """
    own, others, layers = depths(student), depths(teacher), config.teacher_layers
    for field, weight in (("hidden_weight", hidden_weight), ("attention_weight", config.attention_weight)):
        if not weight:
            continue
        flag = {"hidden_weight": "output_hidden_states", "attention_weight": "output_attentions"}[field]
        for model in (student, teacher):
            if not _takes(model, flag):
                raise ValueError(
                    f"{field}={weight} asks both models for what their layers compute, but the forward of "
                    f"{type(model).__name__} does not take {flag}: add it, as models of transformers have it, or set "
                    f"{field}=0."
                )
        asked = f"{field}={weight} compares layer by layer, but the model has"
        if len(own) != len(others):
            raise ValueError(
                f"{asked} {len(own)} stack(s) of layers and the teacher {len(others)}: use a teacher of the same "
                f"kind, or set {field}=0."
            )
        if layers is None and list(own.values()) != list(others.values()):
            raise ValueError(
                f"{asked} {_counts(own)} layers and the teacher {_counts(others)}: say with layer_map which of them "
                f'each layer learns from ("uniform" spreads them evenly), use a teacher of the same depth, or set '
                f"{field}=0."
            )
        if layers is not None:
            check_sides(layers, own)
            for (side, mine), theirs in zip(own.items(), others.values(), strict=True):
                resolve_layer_map(layers, mine, theirs, side)


def _takes(model: nn.Module, name: str) -> bool:
    try:
        # Of what is called: a decorator may know arguments that the forward inside it does not.
        parameters = inspect.signature(model.forward, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return True  # not known, as of scripted modules: the call tells
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _counts(sides: Mapping[str, int]) -> str:
    return " + ".join(map(str, sides.values()))


def asked_of_teacher(teacher: nn.Module, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave labels out where the teacher would only compute a loss from them, which nobody reads.

    For a language model that loss takes more memory than its logits. Encoder-decoder models make the decoder's inputs
    of the labels, and what a model that is not of transformers does with them is not known.
    """
    config = getattr(teacher, "config", None)
    needed = getattr(config, "is_encoder_decoder", False) or getattr(config, "sparse_prediction", False)
    if needed or not isinstance(teacher, PreTrainedModel):
        return asked
    return {key: value for key, value in asked.items() if key != "labels"}


def return_attention_maps(*models: nn.Module) -> None:
    """Switch models to the attention implementation that returns its maps ("eager"), and say so once."""
    for model in models:
        if isinstance(model, PreTrainedModel) and model.config._attn_implementation != "eager":
            logger.info("attention_weight needs attention maps: %s now uses eager attention.", type(model).__name__)
            model.set_attn_implementation("eager")


def use_attention_of(student: nn.Module, teacher: nn.Module) -> None:
    """Switch the teacher to the student's attention implementation: grafted layers take over the student's masks."""
    if isinstance(student, PreTrainedModel) and isinstance(teacher, PreTrainedModel):
        if teacher.config._attn_implementation != student.config._attn_implementation:
            teacher.set_attn_implementation(student.config._attn_implementation)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Tell models apart cheaply: a hash over the names, shapes and first values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        head = parameter.detach().reshape(-1)[:256].float().cpu()
        digest.update(f"{name}{list(parameter.shape)}".encode() + head.numpy().tobytes())
    return digest.hexdigest()[:16]


def _same(mine: Any, theirs: Any, key: str, asked: str, why: str, way_out: str) -> None:
    own, other = (getattr(_text_config(c), key, getattr(c, key, None)) for c in (mine, theirs))
    if own is not None and other is not None and own != other:
        raise ValueError(
            f"{asked} needs {why}: {key} is {own} in the model and {other} in the teacher. "
            f"Use a teacher that agrees, or {way_out}."
        )


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _auto_class(student: nn.Module) -> Any:
    config = getattr(student, "config", None)
    for value in vars(modeling_auto).values():
        if isinstance(value, type) and issubclass(value, _BaseAutoModelClass) and value._model_mapping is not None:
            if type(config) in value._model_mapping and value._model_mapping[type(config)] is type(student):
                return value
    raise TypeError(
        f"no Auto class of transformers loads a {type(student).__name__}, so teacher_model must be a loaded model."
    )
