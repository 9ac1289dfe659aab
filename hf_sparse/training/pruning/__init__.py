"""Which blocks go: importance, masks, the group lasso, and what is due in a step."""
