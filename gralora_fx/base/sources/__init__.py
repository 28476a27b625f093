"""Sources of values: the hub, safetensors files, lazy tensors; and atomic saving of files."""

ADAPTER_FILE = "adapter_config.json"
