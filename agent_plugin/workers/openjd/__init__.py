"""What the OpenJD environment templates (packaging/openjd/) call: jobs without the farm's help."""
