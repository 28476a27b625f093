"""How each weight of an export is stored: the formats, their arithmetic, and the plan that gives every matrix one."""
