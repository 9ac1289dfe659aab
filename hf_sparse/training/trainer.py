"""`SparseDistillTrainer`: the Trainer that prunes and distils. It calls the other modules at the right moments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_sparse.training.checkpoint import check_writable, load_state, save_state
from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.graft import graft_at, graft_sites
from hf_sparse.training.losses import RunningMeans, distillation_terms
from hf_sparse.training.pruner import Pruner
from hf_sparse.training.saving import save_final
from hf_sparse.training.schedules import StepPlan, graft_draws, plan_step
from hf_sparse.training.share import StepTotals
from hf_sparse.training.support import predicts_next, refuse_unsupported_engine, refuse_unsupported_model
from hf_sparse.training.teacher import (
    check_teacher,
    copy_as_teacher,
    fingerprint,
    load_teacher,
    return_attention_maps,
)


class SparseDistillTrainer(Trainer):
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

    # compute_loss normalises over all micro-batches and ranks by itself (see share.py).
    loss_is_scaled_for_ga = True
    _tag_names = ["hf_sparse", "block-sparse", "pruned"]

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        teacher_model: nn.Module | str | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = SparseDistillConfig(output_dir="sparse_output")
        elif not isinstance(args, SparseDistillConfig):
            args = SparseDistillConfig.from_training_arguments(args)
        refuse_unsupported_engine(args)
        check_writable(args.output_dir)
        self.teacher_model: nn.Module | None = None
        self._given_teacher = teacher_model
        self._plan: StepPlan | None = None
        self._hooked: nn.Module | None = None
        self._totals, self._means = StepTotals(), RunningMeans()
        super().__init__(model, args, *positional, **kwargs)
        # The model would otherwise be handed a count that only some heads use, and be scaled as if all did.
        self.model_accepts_loss_kwargs = False
        if self.model_init is None:
            self._set_up(self.model)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        self.add_callback(_StepHooks(self))

    def _set_up(self, model: nn.Module) -> None:
        refuse_unsupported_model(model, self.args)
        self.pruner = Pruner(model, self.args)
        self._shifted = predicts_next(model)
        if self.args.attention_weight:
            return_attention_maps(model)
        if self.args.needs_teacher and self._given_teacher is not None:
            self.teacher_model = load_teacher(self._given_teacher, model)
            self._given_teacher = self.teacher_model
            check_teacher(model, self.teacher_model, self.args)
        elif self.args.graft_start < 1.0:
            graft_sites(model, model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model with `model_init`; a new model means new masks and a new teacher."""
        model = super().call_model_init(trial)
        self.teacher_model = None
        self.args.validate()
        self._set_up(model)
        self._copy_teacher(model)
        return model

    @property
    def student(self) -> nn.Module:
        """The model being pruned, without the wrappers of a distributed run or a compiler."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; the teacher is taken first, before a checkpoint replaces the weights."""
        if self.model_init is None:
            self._copy_teacher(self.model)
        return super().train(*args, **kwargs)

    def _copy_teacher(self, model: nn.Module) -> None:
        if self.args.needs_teacher and self.teacher_model is None:
            self.teacher_model = copy_as_teacher(model)
        if self.teacher_model is not None:
            if self.args.attention_weight:
                return_attention_maps(self.teacher_model)
            self.teacher_model.to(self.args.device)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Fetch the micro-batches of one step, and count what they hold."""
        batch_samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batch_samples:
            self._totals = StepTotals.of(batch_samples, self._shifted, device)
        return batch_samples, None

    def begin_step(self) -> None:
        """Do what is due before the forward of an optimizer step."""
        self._plan = plan_step(self.args, self.state.global_step, self.state.max_steps)
        self.pruner.begin_step(self._plan)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the weighted sum of task loss and distillation losses; in evaluation the plain task loss."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        config, teacher_outputs, asked = self.args, None, dict(inputs)
        if config.hidden_weight:
            asked["output_hidden_states"] = True
        if config.attention_weight:
            asked["output_attentions"] = True
        if config.kd_weight or config.hidden_weight or config.attention_weight:
            # The teacher goes first: its first forward installs the hooks that record what grafted layers return.
            with torch.no_grad(), self.accelerator.autocast():
                teacher_outputs = self.teacher_model(**asked)
                self._install_recording_hooks(asked)
        with self._grafted():
            if config.task_weight:
                # A copy, because Trainer takes the labels out where a label smoother or a loss function needs them.
                task_loss, outputs = super().compute_loss(model, dict(asked), return_outputs=True)
                terms = {"loss_task": task_loss}
            else:
                outputs, terms = model(**asked), {}
        if teacher_outputs is not None:
            student_config = getattr(self.student, "config", None)
            terms |= distillation_terms(outputs, teacher_outputs, inputs, student_config, config, self._shifted)
        loss = self._weighted_sum(terms, inputs)
        return (loss, outputs) if return_outputs else loss

    def _weighted_sum(self, terms: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
        by_item, by_sample = self._totals.shares(inputs, self._shifted)
        weights = {
            "loss_task": (self.args.task_weight, by_item),
            "loss_kd": (self.args.kd_weight, by_item),
            "loss_hidden": (self.args.hidden_weight, by_sample),
            "loss_attention": (self.args.attention_weight, by_sample),
        }
        total = None
        for name, term in terms.items():
            weight, share = weights[name]
            # A share of 1 is left out, so that one micro-batch gives the plain loss to the last bit.
            term = term if isinstance(share, float) else term * share.to(term.dtype)
            self._means.add(name, term)
            term = term if weight == 1.0 else weight * term
            total = term if total is None else total + term
        return total

    def _install_recording_hooks(self, asked: Mapping[str, Any]) -> None:
        # transformers hooks a model's layers at the first forward that asks for hidden states or attention maps. If
        # teacher layers stood in for some then, they would be hooked twice and the student's own never: so the first
        # such forward is an ungrafted one, in eval mode, where it draws no random numbers.
        recorded = self.args.hidden_weight or self.args.attention_weight
        if recorded and self.args.graft_start < 1.0 and self._hooked is not self.student:
            self._hooked = self.student
            self.student.eval()
            self.student(**asked)
            self.student.train()

    @contextlib.contextmanager
    def _grafted(self) -> Iterator[None]:
        if self._plan.graft_prob >= 1.0:
            yield
            return
        sites = graft_sites(self.student, self.teacher_model)
        draws = graft_draws(self._plan.graft_prob, len(sites), self.args.seed, self._plan.step)
        with graft_at(sites, draws):
            yield

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch; after the last one of a step, add the penalty's gradient, to be clipped with the rest."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            scale = None if scaler is None else scaler.scale(torch.ones((), device=self.args.device))
            penalty = self.pruner.add_penalty_gradient(self._plan, scale)
            if penalty is not None:
                self._means.add("penalty", penalty)
            self.pruner.masks.apply_to_grads_()
        return loss

    def finish_step(self) -> None:
        """Do what is due after the optimizer has moved the weights."""
        skipped = self.accelerator.optimizer_step_was_skipped
        groups = [] if skipped else self.optimizer.param_groups
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        penalty = self.pruner.finish_step(self._plan, rates)
        if penalty is not None:
            self._means.add("penalty", penalty)
        self._means.end_step()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log` does; training logs also hold sparsity, graft_prob, the penalty and every loss term."""
        if "loss" in logs and self._plan is not None:
            logs["sparsity"] = self.pruner.masks.sparsity
            logs["graft_prob"] = self._plan.graft_prob
            logs.update({"penalty": 0.0, **self._means.read()})
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # A model that is still being pruned scores higher than any that is done, and is not what was asked for.
        if self._plan is not None and not self._plan.final_sparsity:
            return False
        return super()._determine_best_metric(metrics, trial)

    # Checkpoints and saving

    def _agreed_facts(self) -> dict[str, Any]:
        return {} if self.teacher_model is None else {"teacher": fingerprint(self.teacher_model)}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        coefs = load_state(resume_from_checkpoint, self.pruner.masks, self._agreed_facts())
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.pruner.coefs = coefs

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_state(self.state.best_model_checkpoint, self.pruner.masks, self._agreed_facts())
        self.pruner.masks.apply_()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; outside checkpoints without its pruned blocks, if `save_format` is "compressed"."""
        folder = Path(output_dir or self.args.output_dir)
        is_checkpoint = _internal_call and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if is_checkpoint or not isinstance(self.student, PreTrainedModel):
            super().save_model(output_dir, _internal_call)
            if is_checkpoint and self.args.should_save:
                save_state(folder, self.pruner.masks, self.pruner.coefs, self._agreed_facts())
            return
        if self.args.should_save:
            self._save_final(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_final(self, folder: Path) -> None:
        masks = self.pruner.masks.state_dict() if self.args.save_format == "compressed" else {}

        def save_others(staging: Path) -> None:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            torch.save(self.args, staging / "training_args.bin")

        save_final(self.student, folder, masks, save_others)


class _StepHooks(TrainerCallback):
    """Passes the moments of a step on to the trainer. Keeps no state, so that nothing is restored from checkpoints."""

    def __init__(self, trainer: SparseDistillTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin_step()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.finish_step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer.pruner.check_target()
