"""hf_sparse: make a fine-tuned transformer small and fast without losing its accuracy.

Importing this package registers the checkpoint format with transformers, so that plain `from_pretrained` reads
compressed models. The trainer loads on first use: it costs seconds that a serving process need not pay.
"""
