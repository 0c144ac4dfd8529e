"""What worker agents start: drop-ins for theirs, and the host service that runs them for others."""
