"""What a run will ask for, and whether it can have it: known before anything starts."""
