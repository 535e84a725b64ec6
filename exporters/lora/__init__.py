"""Adapters chosen per row: the fused graph gets slots for them.

    products  which products of the graph belong to which linear layers
    slots     the nodes and inputs that let adapters change them

How a PEFT folder becomes what goes into a slot is the business of ``exporters.adapters``.
"""

from exporters.lora.slots import add_lora_slots

__all__ = ["add_lora_slots"]
