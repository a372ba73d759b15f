"""What we use of PEFT, imported in one place: without bitsandbytes, as none of our layers is one of its own."""

from raydistill.imports import UNUSED_BY_MODELS, without

with without("bitsandbytes", *UNUSED_BY_MODELS):
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners import lora

__all__ = ["LoraConfig", "inject_adapter_in_model", "lora"]
