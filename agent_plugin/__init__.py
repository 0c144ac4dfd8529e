"""propmaster: the worker-side data plane of a render farm."""

__version__ = "0.1.0"
