"""raydistill: distil a full-precision teacher into a quantized student, on text the student writes itself."""

__version__ = "0.1.0"
