"""Sources of values: the hub, safetensors files, lazy tensors; and atomic writing of files."""

ADAPTER_FILE = "adapter_config.json"
