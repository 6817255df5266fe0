"""Runs and policies of other tools: in and out."""
