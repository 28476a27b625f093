"""Vocabulary over `torch.fx`: the module tree, weight views, linear call sites, annotations, user passes."""
