"""What a run needs, found out without the hardware: targets, programs, memory, communication."""
