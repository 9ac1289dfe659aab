"""The left wing: prune and distil while training. Serving code never imports it."""
