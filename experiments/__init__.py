"""Experiments on softmax and sigmoid attention, run from the checkout with ``python -m``; not installed."""
