"""Rollout, teacher and evaluation actors, the feed between driver and trainer, and the pool that spreads work."""
