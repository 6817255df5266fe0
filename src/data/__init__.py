"""A LeRobot dataset as batches: source (what is on disk), windows (which rows), frames (pixels), loader (batches)."""
