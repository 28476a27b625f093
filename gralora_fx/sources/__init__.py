"""Where values come from and go to: the hub, safetensors files, lazy tensors, files that are saved together."""
