"""Sigmoid attention for Hopper (sm_90) in Gluon.

Imported where a CUDA tensor asks for it, never by ``import stability``.
"""

from .eligibility import can_run
from .sigmoid_backward import backward
from .sigmoid_forward import forward

__all__ = ["backward", "can_run", "forward"]
