"""Names in configurations and parameters that indicate experts."""

SIZES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")
STACKS = "(?i)expert"
