"""The checkpoint folder: files only, no loops."""
