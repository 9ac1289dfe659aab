"""The cells of the accuracy grid: one by the trainer, or many side by side in a stack."""
