"""What the course needs but does not teach: data, training loop, checkpoints, evaluation, figures."""
