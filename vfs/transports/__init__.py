"""The ways to the kernel: the only modules that know a FUSE protocol."""
