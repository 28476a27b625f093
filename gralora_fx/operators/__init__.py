"""The project's operators for `torch.fx` graphs."""
