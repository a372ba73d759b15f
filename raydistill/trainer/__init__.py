"""The trainer group: Ray Train workers that update the student with DeepSpeed."""
