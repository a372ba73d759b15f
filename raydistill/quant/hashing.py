"""Short fingerprints of weights: equal on every device and in every process if and only if the values are equal."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from raydistill.quant.grid import QuantizedWeight

DIGITS = 16  # 64 bits: enough to tell versions of one run apart, short enough for a log line


def hash_tensors(tensors: Mapping[str, np.ndarray | Tensor]) -> str:
    """Fingerprint of named tensors: names (sorted), dtypes, shapes and bytes. A torch tensor and the numpy array with
    the same contents have the same one."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _update(digest, name, tensors[name])
    return digest.hexdigest()[:DIGITS]


def hash_codes(codes: Mapping[str, QuantizedWeight]) -> str:
    """Fingerprint of a quantized student: names (sorted), formats, codes, scales and zero points."""
    digest = CodesDigest()
    for name in sorted(codes):
        digest.add(name, codes[name])
    return digest.value


class CodesDigest:
    """`hash_codes` one layer at a time, for a side that never holds all codes at once. Add the layers sorted by name."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, quantized: QuantizedWeight) -> None:
        _update(self._digest, f"{name} {quantized.fmt.name} codes", quantized.codes_OI)
        _update(self._digest, "scale", quantized.scale_OG)
        if quantized.zero_point_OG is not None:
            _update(self._digest, "zero_point", quantized.zero_point_OG)

    @property
    def value(self) -> str:
        return self._digest.hexdigest()[:DIGITS]


def _update(digest: "hashlib._Hash", name: str, values: np.ndarray | Tensor) -> None:
    if isinstance(values, Tensor):
        dtype = str(values.dtype).removeprefix("torch.")
        flat = values.detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    else:
        dtype, data = str(values.dtype), np.ascontiguousarray(values).tobytes()
    digest.update(f"{len(name)} {name} {dtype} {tuple(values.shape)}\n".encode())
    digest.update(data)
