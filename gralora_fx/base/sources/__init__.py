"""Sources of values: the hub, safetensors files, lazy tensors; and atomic writing of files."""

ADAPTER_FILE = "adapter_config.json"
ACTING = "alora_invocation_tokens"  # its field that says from which tokens on an adapter acts
