"""Policies: built, loaded, acting."""
