"""Quantization without training: rounding (RTN), GPTQ and AWQ, as what a distilled student has to beat."""
