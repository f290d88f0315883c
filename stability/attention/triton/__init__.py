"""Triton kernels. Imported where a CUDA tensor asks for them, never by ``import stability``."""
