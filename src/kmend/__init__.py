"""kmend: live patching for running Linux kernels."""

__version__ = "0.1.0"
