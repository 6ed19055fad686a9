"""What every stage may use: errors, environment, files, device, seeds, GPU memory, ranks."""
