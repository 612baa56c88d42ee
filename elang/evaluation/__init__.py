"""What a pair of models does and costs, measured: predictions, FLOPs, seconds."""
