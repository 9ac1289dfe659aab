"""The teacher's part in a run: taken in time, asked in every step, grafted into the student."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.distillation.comparable import classifies_text, why_not_alike, why_not_compared
from hf_sparse.training.distillation.graft import GraftSite, graft_at, graft_sites
from hf_sparse.training.distillation.projections import HiddenProjections, needed_projections
from hf_sparse.training.distillation.teacher import (
    asked_of_teacher,
    check_depths,
    check_teacher,
    copy_as_teacher,
    fingerprint,
    load_teacher,
    return_attention_maps,
    use_attention_of,
)
from hf_sparse.training.distributed import Engine, is_sharded_model, uncompiled
from hf_sparse.training.schedules import StepPlan, graft_draws

logger = logging.getLogger(__name__)


class Distiller:
    """Holds the teacher of a run, if its settings use one.

    Args:
        student: the model to train; only checked here.
        config: the run's settings.
        given: the teacher that the caller chose: a model, a path or a repo id; None = a copy of the student.
        engine: shards the teacher where the student is sharded; None = it stays whole.

    Raises:
        ValueError: if the teacher does not fit the settings.
    """

    def __init__(
        self,
        student: nn.Module,
        config: SparseDistillConfig,
        given: nn.Module | str | os.PathLike[str] | None,
        engine: Engine | None = None,
    ) -> None:
        self.config, self.was_given, self.engine = config, given is not None, engine
        self.teacher: nn.Module | None = None
        self._placed_on: torch.device | None = None
        self._fingerprint: str | None = None
        self._hooked: nn.Module | None = None
        self.projections: HiddenProjections | None = None
        self._sites: tuple[nn.Module, list[GraftSite]] | None = None
        if config.attention_weight:
            return_attention_maps(student)
        if given is not None and config.needs_teacher:
            self.teacher = load_teacher(given, student)
        self.hidden_weight = config.wanted_hidden_weight
        self._why_not: str | None = None
        self._told: set[str] = set()
        self.has_compared_hidden = False
        if not config.hidden_is_decided:
            self._look_at(student, student if self.teacher is None else self.teacher)
        if self.teacher is not None:
            if config.graft_start < 1.0:
                use_attention_of(student, self.teacher)
            check_teacher(student, self.teacher, config, self.hidden_weight)
            if self.hidden_weight:
                self.projections = needed_projections(student, self.teacher, config.seed)
            if self.projections is not None and engine is not None and engine.is_sharded:
                raise ValueError(
                    "hidden_weight with a teacher of another width trains projections beside the model, which FSDP2 "
                    "does not shard. Launch with DDP, use a teacher of the student's width, or set hidden_weight=0."
                )
        elif config.needs_teacher:
            check_depths(student, student, config, self.hidden_weight)
            if config.graft_start < 1.0:
                graft_sites(student, student)
        if given is not None and not config.needs_teacher:
            logger.warning(
                "teacher_model is not used: kd_weight, hidden_weight and attention_weight do not ask for one, and "
                "graft_start is 1."
            )

    def hire(self, student: nn.Module, device: torch.device) -> nn.Module:
        """Give the teacher, on the device; where none was given, the first call copies the student as it is then."""
        if self.teacher is None:
            if is_sharded_model(student):
                raise RuntimeError(
                    "the model was sharded before a teacher could be copied from it: call train() first, or pass "
                    "teacher_model."
                )
            self.teacher = copy_as_teacher(student)
        # Once, and not in every micro-batch: walking over all parameters takes longer than a small step.
        if self._placed_on != device:
            if self.config.attention_weight:
                return_attention_maps(self.teacher)
            if self.engine is not None:
                self.engine.complete_teacher(self.teacher)
            self._fingerprint = fingerprint(self.teacher)
            self.teacher.to(device)
            if self.projections is not None:
                self.projections.to(device)
            if self.engine is not None:
                self.engine.place_teacher(self.teacher, grafted=self.config.graft_start < 1.0)
            self._placed_on = device
        return self.teacher

    def asked_of_models(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Add to a batch what the losses need both models to return."""
        asked = dict(inputs)
        if self.hidden_weight:
            asked["output_hidden_states"] = True
        if self.config.attention_weight:
            asked["output_attentions"] = True
        return asked

    @torch.no_grad()
    def teacher_outputs(self, student: nn.Module, asked: Mapping[str, Any], device: torch.device) -> Any:
        """Run the teacher on a batch; None where no loss compares with it.

        Call it before the student's forward: a teacher's first forward installs the hooks that record what its layers
        return when they are grafted.
        """
        config = self.config
        if not (config.kd_weight or self.hidden_weight or config.attention_weight):
            return None
        self._tell(self._why_not)
        teacher = self.hire(student, device)
        outputs = teacher(**asked_of_teacher(teacher, asked))
        self._install_recording_hooks(student, asked)
        return outputs

    def compares_hidden(self, student: Any, teacher: Any, inputs: Mapping[str, Any]) -> bool | None:
        """Tell whether hidden states of a batch are compared.

        Args:
            student, teacher: the outputs of both.
            inputs: what both were called with.

        Returns:
            None if `hidden_weight` is 0; False where the settings leave it to the models and these states cannot be.
        """
        if not self.hidden_weight:
            return None
        reason = None
        if not self.config.hidden_is_decided:
            reason = why_not_alike(student, teacher, inputs, self.config.layer_map is not None)
            self._tell(reason)
        self.has_compared_hidden |= reason is None
        return reason is None

    def _look_at(self, student: nn.Module, teacher: nn.Module) -> None:
        if not classifies_text(student):
            self.hidden_weight = 0.0
        elif self.hidden_weight:
            self._why_not = why_not_compared(student, teacher, self.config.layer_map is not None)
            self.hidden_weight = 0.0 if self._why_not else self.hidden_weight

    def _tell(self, reason: str | None) -> None:
        if reason and self.config.should_log and reason not in self._told:
            self._told.add(reason)
            logger.warning("hidden states are not compared, unless hidden_weight is given: %s.", reason)

    def weight_of(self, name: str) -> float:
        """Give the weight of a term: "task", "kd", "hidden" or "attention"."""
        return self.hidden_weight if name == "hidden" else float(getattr(self.config, f"{name}_weight"))

    @contextlib.contextmanager
    def grafted(self, student: nn.Module, plan: StepPlan, device: torch.device) -> Iterator[None]:
        """Run the teacher's layers where this step's draws say so, until the block ends."""
        if plan.graft_prob >= 1.0:
            yield
            return
        if self._sites is None or self._sites[0] is not student:
            self._sites = student, graft_sites(student, self.hire(student, device))
        sites = self._sites[1]
        with graft_at(sites, graft_draws(plan.graft_prob, len(sites), self.config.seed, plan.step)):
            yield

    def agreed_facts(self) -> dict[str, Any]:
        """Give what a resumed run has to agree with: which teacher it is."""
        return {} if self._fingerprint is None else {"teacher": self._fingerprint}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what a resumed run needs beside its student into a training checkpoint."""
        if self.projections is not None:
            self.projections.save(folder)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read what `save` wrote."""
        if self.projections is not None:
            self.projections.load(folder)

    def _install_recording_hooks(self, student: nn.Module, asked: Mapping[str, Any]) -> None:
        # transformers hooks a model's layers at the first forward that asks for hidden states or attention maps. If
        # teacher layers stood in for some then, they would be hooked twice and the student's own never; and a compiler
        # cannot look through the hooking. So the first such forward is an ungrafted one, uncompiled, in eval mode,
        # where it draws no random numbers.
        recorded = self.hidden_weight or self.config.attention_weight
        needed = self.config.graft_start < 1.0 or self.config.torch_compile
        if recorded and needed and self._hooked is not student:
            self._hooked = student
            student.eval()
            with uncompiled(student):
                student(**asked)
            student.train()
