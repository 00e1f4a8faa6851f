"""What every run does, whatever its method: config, checkpoints, metrics, optimizer, and the pages it leaves."""
