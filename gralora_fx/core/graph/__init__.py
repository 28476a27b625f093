"""The vocabulary over `torch.fx`: the module tree, weight views, linear sites, annotations, user passes."""
