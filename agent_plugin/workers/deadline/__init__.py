"""What AWS Deadline Cloud's worker agent starts in place of its own."""
