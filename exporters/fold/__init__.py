"""Folding of adapters into weight files, without a model: those of an export, and a checkpoint's safetensors files."""
