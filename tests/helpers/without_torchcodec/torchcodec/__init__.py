"""Stands in for torchcodec: its import fails as it does on a machine without FFmpeg's libraries."""

raise RuntimeError("Could not load libtorchcodec. Likely causes: FFmpeg is not properly installed in your environment.")
