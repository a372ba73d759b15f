"""Linear layers that a student trains through, and the memory of the dense weight they were last rebuilt to.

A rebuild costs more than a small layer's matmul, and one set of parameters serves many forwards: micro-batches, the
recomputation of gradient checkpointing, every token of a generation. So the dense weight is kept and made again only
when the *values* it came from differ. Versions or flags would not do: optimizers that write through `.data` leave no
trace. The memory is one dense weight per layer, and in mode "none" a copy of W.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat
from raydistill.quant.grid import dequantize, quantize, straight_through
from raydistill.quant.lora import lora
from raydistill.quant.rebuild import merged_weight


class LastRebuild:
    """The last dense weight, with copies of the tensors it was made from."""

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()
        self._dense: Tensor | None = None

    def get(self, sources: Sequence[Tensor], build: Callable[[], Tensor]) -> Tensor:
        """`build()`, or its last result if the sources have the same values on the same device; has no gradient."""
        # A tensor made in inference mode could not be used by a later training step, so leave that mode to make it.
        with torch.inference_mode(False), torch.no_grad():
            if self._dense is None or not self._same(sources):
                self._sources = tuple(source.detach().clone() for source in sources)
                self._dense = build()
        return self._dense

    def _same(self, sources: Sequence[Tensor]) -> bool:
        return len(sources) == len(self._sources) and all(
            new.device == old.device and new.dtype == old.dtype and torch.equal(new, old)
            for new, old in zip(sources, self._sources, strict=True)
        )


class MergedLinear(lora.Linear):
    """PEFT LoRA layer that computes y = Q(W + scaling * B @ A) x, with straight-through gradients to A and B.

    W is frozen. Without a format Q is the identity, and with the adapter disabled B @ A is zero. `prepare_student`
    registers this class for `nn.Linear` through PEFT's custom-module hook.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, fmt: WeightFormat | None, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self._fmt = fmt
        self._rebuilt = LastRebuild()
        self._base_stamp: tuple[int, int] | None = None

    def student_weight(self) -> Tensor:
        """The dense weight of the forward, in W's dtype."""
        weight: Tensor = cast(Any, self.get_base_layer()).weight
        stamp = (weight.data_ptr(), weight._version)
        if stamp != self._base_stamp:
            self._rebuilt, self._base_stamp = LastRebuild(), stamp
        if self.disable_adapters:
            return self._rebuilt.get((), lambda: self._quantized(weight.detach().float()))
        adapter = self.active_adapters[0]
        lora_A, lora_B = (cast(Tensor, pair[adapter].weight) for pair in (self.lora_A, self.lora_B))
        scaling = float(self.scaling[adapter])
        dense = self._rebuilt.get(
            (lora_A, lora_B), lambda: self._quantized(merged_weight(weight, lora_A, lora_B, scaling))
        )
        return _MergedStraightThrough.apply(lora_A, lora_B, dense, scaling)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        return apply_linear(x, self.student_weight(), cast(Any, self.get_base_layer()).bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise QuantError("merging in place would be quantized a second time; use raydistill's export instead.")

    def _quantized(self, full: Tensor) -> Tensor:
        dense = full if self._fmt is None else dequantize(quantize(full, self._fmt))
        return dense.to(cast(Any, self.get_base_layer()).weight.dtype)


class _MergedStraightThrough(torch.autograd.Function):
    """Exactly `dense` forward; backward as if it were W + scaling * B @ A: dA = s B^T dW, dB = s dW A^T, in float32."""

    @staticmethod
    def forward(ctx: Any, lora_A: Tensor, lora_B: Tensor, dense: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(lora_A, lora_B)
        ctx.scaling = scaling
        return dense.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        lora_A, lora_B = ctx.saved_tensors
        with torch.autocast(lora_A.device.type, enabled=False):
            gradient = gradients[0].float() * ctx.scaling
            grad_A = (lora_B.float().t() @ gradient).to(lora_A.dtype)
            grad_B = (gradient @ lora_A.float().t()).to(lora_B.dtype)
        return grad_A, grad_B, None, None


class FakeQuantLinear(nn.Linear):
    """y = Q(W) x with W trained by straight-through gradients; takes over `linear`'s parameters, names unchanged."""

    def __init__(self, linear: nn.Linear, fmt: WeightFormat) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self._fmt = fmt
        self._rebuilt = LastRebuild()

    def forward(self, input: Tensor) -> Tensor:
        weight, fmt = self.weight, self._fmt
        dense = self._rebuilt.get((weight,), lambda: dequantize(quantize(weight, fmt)).to(weight.dtype))
        return apply_linear(input, straight_through(weight, dense), self.bias)
