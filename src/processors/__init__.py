"""From a batch as recorded to what the policy takes, and back."""
