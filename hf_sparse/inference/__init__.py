"""The right wing: what a finished model needs. It never imports the training code."""
