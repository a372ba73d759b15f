"""Sweeps: many runs of one base config on one cluster, under Ray Tune."""
