"""An adapter folded into the safetensors files of a model, one tensor at a time."""
