"""`SparseDistillTrainer`: the Trainer that prunes and distils. It calls the other modules at the right moments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_sparse.hub.card import CARD_FILE, is_rendered, write_card
from hf_sparse.training.checkpoints.checkpoint import check_writable, load_squares, load_state, save_state
from hf_sparse.training.checkpoints.facts import run_facts
from hf_sparse.training.checkpoints.resuming import ResumingTrainer
from hf_sparse.training.checkpoints.saving import save_final, under_own_names
from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.distillation.distiller import Distiller
from hf_sparse.training.distillation.teacher import check_tokenizer
from hf_sparse.training.distributed import Engine
from hf_sparse.training.hooks import StepHooks
from hf_sparse.training.losses import RunningMeans, distillation_terms, weighted_sum
from hf_sparse.training.pruning.importance import input_rms
from hf_sparse.training.pruning.pruner import Pruner
from hf_sparse.training.schedules import StepPlan, plan_step
from hf_sparse.training.share import StepTotals, count_units
from hf_sparse.training.speech import seen_by_losses, task_unit
from hf_sparse.training.stages import freeze_outside_layers, reset_optimizer, restarting_scheduler, with_graph
from hf_sparse.training.support import (
    explaining_loss,
    predicts_next,
    refuse_unsupported_engine,
    refuse_unsupported_model,
    refuse_unsupported_optimizer,
)


class SparseDistillTrainer(ResumingTrainer):
    """A `Trainer` whose model ends block-sparse: pruned step by step while it learns from its dense teacher.

    Takes everything `Trainer` takes. Evaluation, prediction and checkpoints are those of the student alone; the final
    `save_model` leaves pruned blocks out of the file (`save_format="compressed"`).

    Args:
        model: the fine-tuned model to prune.
        args: a `SparseDistillConfig`, or plain `TrainingArguments`, which get the sparse defaults.
        teacher_model: a model, a path or a repo id; None takes a frozen copy of the dense model when training starts,
            or none at all where no setting uses a teacher.

    Raises:
        ValueError: if layers, block shapes, teacher or launch mode do not fit; the message says what to change.
        OSError: if `output_dir` cannot be written.
    """

    args: SparseDistillConfig
    config_class: type[SparseDistillConfig] = SparseDistillConfig
    # compute_loss normalises over all micro-batches and ranks by itself (see share.py).
    loss_is_scaled_for_ga = True
    _tag_names = ["hf_sparse", "block-sparse", "pruned"]

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        teacher_model: nn.Module | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = self.config_class(output_dir="sparse_output")
        elif not isinstance(args, self.config_class):
            args = self.config_class.from_training_arguments(args)
        refuse_unsupported_engine(args)
        check_writable(args.output_dir or ".")
        self._given_teacher = teacher_model
        self._teacher_metrics = {}
        self._plan: StepPlan | None = None
        self._loss_scale: Tensor | None = None
        self._micro_batches: list[dict[str, Any]] = []
        self.passed: set[str] = set()
        self.totals, self._means = StepTotals(), RunningMeans()
        super().__init__(model, args, *positional, **kwargs)
        check_tokenizer(self.processing_class, self._given_teacher if self.args.needs_teacher else None)
        # The model would otherwise be handed a count that only some heads use, and be scaled as if all did.
        self.model_accepts_loss_kwargs = False
        if self.model_init is None:
            self._set_up(self.student)
        if isinstance(self.student, PreTrainedModel):
            self.student.add_model_tags(self._tag_names)
        self.add_callback(StepHooks(self))

    def _set_up(self, model: nn.Module) -> None:
        refuse_unsupported_model(model, self.args)
        if self.args.train_only_layers:
            freeze_outside_layers(model)
        self.pruner = Pruner(model, self.args)
        self._shifted, self._task_unit = predicts_next(model), task_unit(model)
        self.engine = Engine(self.accelerator, model)
        self.engine.check_targets(self.pruner.masks.targets)
        refuse_unsupported_optimizer(self)
        self.distiller = Distiller(model, self.args, self._given_teacher, self.engine)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model with `model_init`; a new model means new masks and a new teacher."""
        model = super().call_model_init(trial)
        self.args.validate()
        self._set_up(model)
        self._hire_teacher(model)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if self.hp_search_backend is not None and trial is not None:
            # The trial's settings came after its model was made, and another accelerator with them.
            self.args.validate()
            self._set_up(self.student)
            self._hire_teacher(self.student)

    @property
    def plan(self) -> StepPlan:
        """What the running optimizer step does; the first one's plan where none has begun."""
        if self._plan is None:
            return plan_step(self.args, 0, max(self.state.max_steps, 1))
        return self._plan

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; the teacher is taken first, before a checkpoint replaces the weights."""
        if self.model_init is None:
            self._hire_teacher(self.student)
        return super().train(*args, **kwargs)

    def _hire_teacher(self, model: nn.Module) -> None:
        if self.args.needs_teacher:
            self.distiller.hire(model, self.args.device)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Fetch the micro-batches of one step, and count what they hold."""
        if self.state.global_step >= self.state.max_steps:
            # A checkpoint of the last step, resumed: all steps are done, and another one would leave the schedule.
            self.control.should_training_stop = True
            return [], None
        batch_samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batch_samples:
            self._micro_batches = batch_samples
            self.totals = StepTotals.of(batch_samples, self._shifted, device)
        return batch_samples, None

    def begin_step(self) -> None:
        """Do what is due before the forward of an optimizer step."""
        self._plan = plan_step(self.args, self.state.global_step, self.state.max_steps)
        self.pruner.begin_step(self.plan, self._input_rms, self.optimizer)
        reset_optimizer(self.args, self.optimizer, self.plan.step, self.state.max_steps)

    def _input_rms(self) -> dict[str, Tensor]:
        batches = [self._prepare_inputs(batch) for batch in self._micro_batches]
        with self.accelerator.autocast():
            model = self.engine.runnable(self.student, self.model_wrapped)
            return input_rms(model, self.pruner.masks.targets, batches)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Create the learning-rate schedule, with its restart where `lr_restart` asks for one."""
        if self.lr_scheduler is None:
            self.lr_scheduler = restarting_scheduler(self.args, optimizer or self.optimizer, num_training_steps)
            self._created_lr_scheduler = self.lr_scheduler is not None
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the weighted sum of task loss and distillation losses; in evaluation the plain task loss."""
        if not model.training:
            loss, outputs = self._task_loss(model, inputs)
            return (loss, outputs) if return_outputs else loss
        self.passed.add("compute_loss")
        asked, student, device = self.distiller.asked_of_models(inputs), self.student, self.args.device
        with self.accelerator.autocast():
            teacher_outputs = self.distiller.teacher_outputs(self.engine.runnable(student, model), asked, device)
        with self.distiller.grafted(student, self.plan, device):
            if self.args.task_weight:
                # A copy, because Trainer takes the labels out where a label smoother or a loss function needs them.
                task_loss, outputs = self._task_loss(model, dict(asked))
                terms = {"loss_task": (task_loss, self._task_unit)}
            else:
                outputs, terms = model(**asked), {}
        if teacher_outputs is not None:
            student_config = getattr(student, "config", None)
            seen = seen_by_losses(student, inputs, outputs)
            hidden = self.distiller.compares_hidden(outputs, teacher_outputs, seen)
            terms |= distillation_terms(
                outputs, teacher_outputs, seen, student_config, self.args, self._shifted, hidden,
                self.distiller.projections,
            )  # fmt: skip
        loss = with_graph(
            weighted_sum(terms, self.distiller.weight_of, self.totals.shares(inputs, self._shifted), self._means)
        )
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        # A mean over the micro-batch, also from a function that divides by the count which Trainer gives it.
        items = None if self.compute_loss_func is None else count_units(inputs, self._shifted)[0]
        with explaining_loss(self.student):
            loss, outputs = super().compute_loss(model, inputs, True, items)
        if items is not None and self.args.average_tokens_across_devices:
            loss = loss / self.accelerator.num_processes
        return loss, outputs

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch; after a step's last one, add the penalty's gradient, to be clipped with the rest."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.passed.add("training_step")
        if self.accelerator.sync_gradients:
            self._loss_scale = self._scale_of_loss()
            penalty = self.pruner.finish_backward(self.plan, self._loss_scale)
            if penalty is not None:
                self._means.add("penalty", penalty)
            self.end_backward()
        return loss

    def _scale_of_loss(self) -> Tensor | None:
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.scale(torch.ones((), device=self.args.device))

    def finish_step(self) -> None:
        """Do what is due after the optimizer has moved the weights."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        # Fused optimizers skip a step that overflowed and tell nobody; that the scale fell does, without waiting.
        now = self._scale_of_loss()
        moved = None if now is None or self._loss_scale is None else now >= self._loss_scale
        self.pruner.watch_gradients(self.plan, self.optimizer, moved)
        penalty = self.pruner.finish_step(self.plan, rates, moved)
        if penalty is not None:
            self._means.add("penalty", penalty)
        self._means.end_step()
        self.end_update()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log` does; training logs also hold sparsity, graft_prob, the penalty and every loss term."""
        if "loss" in logs and self._plan is not None:
            logs["sparsity"] = self.pruner.masks.sparsity
            logs["graft_prob"] = self.plan.graft_prob
            logs.update({"penalty": 0.0, **self._means.read()})
        super().log(logs, start_time)

    # Checkpoints and saving

    def _agreed_facts(self) -> dict[str, Any]:
        return {**self.args.agreed_facts, **self.distiller.agreed_facts()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        coefs = load_state(resume_from_checkpoint, self.pruner.masks, self._agreed_facts())
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.pruner.coefs = coefs
        load_squares(resume_from_checkpoint, self.pruner.squares)
        self.distiller.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_state(str(self.state.best_model_checkpoint), self.pruner.masks, self._agreed_facts())
        self.pruner.masks.apply_()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; outside checkpoints without its pruned blocks, if `save_format` is "compressed"."""
        folder = Path(output_dir or self.args.output_dir or ".")
        is_checkpoint = _internal_call and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if is_checkpoint:
            with under_own_names(self.student):
                super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                save_state(folder, self.pruner.masks, self.pruner.coefs, self._agreed_facts(), self.pruner.squares)
                self.distiller.save(folder)
            return
        whole = self.engine.whole(self.student, keep=self.args.should_save)
        if isinstance(whole, PreTrainedModel):
            self._save_final(whole, folder)
        elif whole is not None:
            self._save(str(folder), state_dict=whole.state_dict())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_final(self, model: PreTrainedModel, folder: Path) -> None:
        masks = self.pruner.masks.state_dict() if self.args.save_format == "compressed" else {}

        def save_others(staging: Path) -> None:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            torch.save(self.args, staging / "training_args.bin")
            card = folder / CARD_FILE
            # A card that somebody wrote or edited stays; `hf-sparse card --force` replaces it.
            if not card.is_file() or is_rendered(card.read_text(encoding="utf-8")):
                write_card(staging, run_facts(self, staging, self._teacher_metrics))

        cropped, is_copy = self.args.save_format == "cropped", model is not self.student
        save_final(model, folder, masks, save_others, cropped=cropped, is_copy=is_copy)
