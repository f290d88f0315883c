"""Probes in trainers that own the training loop, a file each, which needs that trainer's package."""
