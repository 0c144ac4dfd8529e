"""What becomes of a task's outputs besides the store: objects, archives, and their results."""
