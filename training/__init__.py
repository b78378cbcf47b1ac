"""What every training entry needs: processes, precision, optimiser, averages, checkpoints, logs."""
