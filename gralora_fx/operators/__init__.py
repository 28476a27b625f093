"""The operators of this project for `torch.fx` graphs: schema, reference, shape rule and calls of each in one place."""
