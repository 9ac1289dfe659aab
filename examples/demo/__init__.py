"""The whole loop on one machine: real text, a real encoder, a pruned model folder, one table. Run by `make demo`."""
