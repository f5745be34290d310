"""Training: loss, schedules, optimizer, step, loop and what a run reports."""
