"""Sigmoid attention for Hopper (sm_90) in Gluon. Imported where a CUDA tensor asks for it, never by ``import stability``."""
