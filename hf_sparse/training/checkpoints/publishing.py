"""The publishing side of the trainer: the card of a run, and pushes that say why the Hub refused them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_sparse.hub.card import write_card
from hf_sparse.hub.push import explained, persistently
from hf_sparse.training.checkpoints.facts import run_facts, with_given


class PublishingTrainer(Trainer):
    """Writes the card of a run, and turns what the Hub's client raises into `hf_sparse.hub.push.PushError`."""

    _teacher_metrics: dict[str, float]

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository, as `Trainer.init_hf_repo` does: before training, so that a wrong token costs no run."""
        make = super().init_hf_repo
        with explained(self._repository()):
            persistently(lambda: make(*args, **kwargs))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save and push, as `Trainer.push_to_hub` does; a dropped connection does not end it."""
        push = super().push_to_hub
        with explained(self._repository()):
            # Among several ranks only one pushes, and saving again would wait for the others for ever.
            alone = self.args.world_size == 1
            return persistently(lambda: push(*args, **kwargs)) if alone else push(*args, **kwargs)

    def create_model_card(self, **given: Any) -> None:  # type: ignore[override]
        """Write the card of the saved model from what the run recorded and what is given here.

        Args:
            given: as `Trainer.create_model_card` takes: language, license, model_name, finetuned_from, tasks, dataset,
                dataset_tags, dataset_args.
        """
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir or ".")
            run: Any = self
            write_card(folder, with_given(run_facts(run, folder, self._teacher_metrics), given))

    def _repository(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir or ".").resolve().name
