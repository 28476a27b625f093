"""`GraloraModel`: switching, inspection, merging, and what users of PEFT and transformers ask a model."""
