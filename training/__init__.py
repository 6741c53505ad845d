"""What a run needs around the model: optimizers, checkpoints, processes, tasks, exports."""
