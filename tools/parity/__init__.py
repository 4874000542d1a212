"""Recomputing recorded cases of the PyTorch reference with the public modules, one file per part."""
