"""The operators of this project for `torch.fx` graphs, each one class: arguments, reference, shape rule and calls."""
