"""What the worker agent calls: start, sync-step, finish-task, end."""
