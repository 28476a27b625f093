"""The operators of this project for `torch.fx` graphs, each one class: arguments, reference, shape rule and calls."""

FILES = ("attention", "experts", "layers", "linear_attention", "state_spaces")  # that define some
