"""What stands in the place of a dense layer: linears and experts that hold kept blocks alone."""
