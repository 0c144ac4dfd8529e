"""Objects of any bucket as a job's inputs: what a source says, and which objects it brings."""
