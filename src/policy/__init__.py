"""Policies: build them, load them, act with them, and our own, flow."""
