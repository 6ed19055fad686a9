"""What every stage may use: errors, environment, seeds, GPU memory."""
