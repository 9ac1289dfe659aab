"""How fast a model is, beside which engines, and on what machine."""
