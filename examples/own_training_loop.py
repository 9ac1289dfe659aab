"""The parts of hf_sparse in a training loop of your own: plain torch, no Trainer.

python examples/own_training_loop.py MODEL TRAIN.csv OUTPUT     a fine-tuned classifier; columns sentence, label (name)
python examples/own_training_loop.py --smoke OUTPUT             a tiny one, offline
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from datasets import load_dataset
from tiny_task import write_csv, write_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_sparse
from hf_sparse.training.pruning.penalty import next_coef
from hf_sparse.training.schedules import graft_draws


def train(model: str, data: str, output: str, epochs: int = 3, learning_rate: float = 3e-4) -> None:
    """Prune and distil a classifier, and save it compressed."""
    torch.manual_seed(0)
    config = hf_sparse.SparseDistillConfig(output_dir=output, sparsity=0.8, penalty_weight=1e-5, graft_start=0.5)
    tokenizer = AutoTokenizer.from_pretrained(model)
    student = AutoModelForSequenceClassification.from_pretrained(model).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    shape, sites = config.block_shape, student.config.num_hidden_layers

    def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        batch = tokenizer([row["sentence"] for row in rows], padding=True, truncation=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([student.config.label2id[row["label"]] for row in rows])}

    loader = DataLoader(load_dataset("csv", data_files=data, split="train"), 32, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    masks = hf_sparse.BlockMasks.for_model(student, shape)
    coefs: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(batch for _ in range(epochs) for batch in loader):
        plan = hf_sparse.plan_step(config, step, total_steps=epochs * len(loader))
        if plan.update_coefs:
            coefs = {name: next_coef(weight, shape, config.penalty_epsilon) for name, weight in masks.weights()}
        if plan.update_masks:
            masks.choose(plan.sparsity)
            masks.apply_()
        # The teacher answers; then, while grafting lasts, some of its layers stand in for the student's.
        with torch.no_grad():
            wanted = teacher(**batch).logits
        with hf_sparse.graft(student, teacher, graft_draws(plan.graft_prob, sites, seed=0, step=step)):
            outputs = student(**batch)
        kd = hf_sparse.distillation_loss(outputs.logits, wanted, config.kd_temperature)
        loss = config.task_weight * outputs.loss + config.kd_weight * kd
        for name, weight in masks.weights() if plan.penalty_weight else ():
            loss = loss + plan.penalty_weight * hf_sparse.group_lasso(weight, shape, coefs[name])
        loss.backward()
        masks.apply_to_grads_()
        optimizer.step()
        optimizer.zero_grad()
        masks.apply_()  # momentum and weight decay have moved the pruned weights as well
        if step % 8 == 0:
            print(f"step {step:4}  loss {loss.item():.4f}  sparsity {plan.sparsity:.3f}  graft {plan.graft_prob:.2f}")

    hf_sparse.compress(student, masks.masks).save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(hf_sparse.report(output))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="MODEL TRAIN.csv OUTPUT")
    parser.add_argument("--smoke", metavar="OUTPUT", type=Path, help="try it on a tiny model")
    given = parser.parse_args()
    if given.smoke:
        data = write_csv(given.smoke / "train.csv", 256, seed=0)
        given.paths = [str(write_model(given.smoke / "dense", True)), str(data), str(given.smoke / "pruned")]
    if len(given.paths) != 3:
        parser.error("give MODEL TRAIN.csv OUTPUT, or --smoke OUTPUT")
    train(*given.paths)
