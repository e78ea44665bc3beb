"""Deploys `fedavg_core` through NVIDIA FLARE."""
