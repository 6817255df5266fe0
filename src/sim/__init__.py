"""Simulated tasks to try a policy in."""
