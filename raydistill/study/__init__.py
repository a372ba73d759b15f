"""Comparisons: arms of distillation and plain quantization side by side, in one table that decides (`compare`, `demo`)."""
