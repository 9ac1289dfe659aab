"""What a model is made of: stacks, linears, experts, feed-forward parts."""
