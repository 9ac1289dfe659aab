"""The checkpoints of the trainer: whole or not taken, older ones removed only once the new one is whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints

from hf_sparse.training.checkpoints.whole import (
    check_optimizer,
    check_whole,
    last_whole_checkpoint,
    mark_whole,
    what_is_missing,
)
from hf_sparse.training.distillation.teaching import TeachingTrainer

logger = logging.getLogger(__name__)


class ResumingTrainer(TeachingTrainer):
    """Writes checkpoints that a kill at any moment cannot leave half-written, and resumes from whole ones alone."""

    _holds_rotation = False
    _begun_for: int | None = None
    plan: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True = the last whole one in `output_dir`.
            args: as `Trainer.train` takes.
            kwargs: as `Trainer.train` takes.

        Raises:
            ValueError: if the checkpoint is not whole, holds the model alone, or belongs to a run that was set up
                otherwise.
            OSError: if a checkpoint cannot be written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole_checkpoint(self.args.output_dir or "."))
        elif resume_from_checkpoint:
            check_whole(resume_from_checkpoint)
        if resume_from_checkpoint:
            check_optimizer(resume_from_checkpoint)
        self._begun_for = _total_steps(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compare_length(self) -> None:
        """Say so if a resumed run will not end as it would have: it has another length, or its data have none."""
        if self._begun_for not in (None, self.state.max_steps):
            logger.warning(
                "The run was begun for %s steps and is resumed for %d: sparsity, penalty, grafting and learning rate "
                "follow the new length from here on, and it will not end as either run would have without a stop.",
                self._begun_for,
                self.state.max_steps,
            )
        if self._begun_for is not None and not has_length(self.train_dataset):
            logger.warning(
                "The training data tell no length: batches are counted from their beginning to find the place again, "
                "which fails for a checkpoint that was written at or after the end of their first pass. From such a "
                "one the run goes on with other samples than without the stop.",
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model` does."""
        super().save_model(output_dir, _internal_call)
        if self._holds_rotation:
            # From here on, and not before, because the settings have just been saved with the model.
            self.args.save_total_limit = None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # A model that is still being pruned scores higher than any that is done, and is not what was asked for.
        return bool(self.plan.final_sparsity and super()._determine_best_metric(metrics, trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        folder, limit = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self.args.save_total_limit
        if self.args.should_save and folder.is_dir():
            # What an interrupted save left there would otherwise pass for part of this one.
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        self._holds_rotation = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_whole(folder, self.state.global_step, self.args.world_size)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise self._cannot_write(folder, error) from error
        finally:
            self._holds_rotation, self.args.save_total_limit = False, limit
        if self.args.should_save:
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(load_result)
        # What is tied to another weight, or computed by the class itself, is never in a file.
        absent = {*(getattr(self.student, "all_tied_weights_keys", None) or ())}
        absent.update(getattr(self.student, "_keys_to_ignore_on_save", None) or ())
        missing = set(load_result.missing_keys) - absent
        if lost := [name for name, _ in self.student.named_parameters() if name in missing]:
            # `Trainer` warns, and goes on with the weights that the model happens to have.
            raise ValueError(
                f"the checkpoint lacks {len(lost)} weights of {type(self.student).__name__}, {lost[0]} first: it was "
                f"written by another class, or with weights under other names. Load it with from_pretrained and begin "
                f"anew."
            )

    def _cannot_write(self, folder: Path, error: Exception) -> OSError:
        free = shutil.disk_usage(folder.parent).free / 2**20
        if self.args.should_save:
            # It could never be resumed from, and takes up room.
            shutil.rmtree(folder, ignore_errors=True)
        whole = [path for path in folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if what_is_missing(path) is None]
        last = max(whole, key=os.path.getmtime, default=None)
        way_out = "resume with resume_from_checkpoint=True" if last else "begin anew"
        return OSError(
            f"{folder} could not be written: {error} ({free:.1f} MiB were free there). The last whole checkpoint is "
            f"{last}. Make room, or lower save_total_limit, then {way_out}."
        )


def _total_steps(checkpoint: str | os.PathLike[str]) -> int | None:
    file = Path(checkpoint) / TRAINER_STATE_NAME
    found: int | None = json.loads(file.read_text(encoding="utf-8")).get("max_steps") if file.is_file() else None
    return found
