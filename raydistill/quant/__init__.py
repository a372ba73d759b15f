"""Quantized students: weight formats, fake quantization, the student's one function, packing and export.

Nothing is imported here, so that `raydistill.quant.formats` (plain data) loads without torch.
"""
