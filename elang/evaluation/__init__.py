"""What a pair of models does and costs, measured: predictions, FLOPs, seconds; and the tasks of the paper."""
