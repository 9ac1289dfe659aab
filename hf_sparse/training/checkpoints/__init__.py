"""What a run leaves behind: checkpoints that are whole or not taken, the final save, facts and card."""
