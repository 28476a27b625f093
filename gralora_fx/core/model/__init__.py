"""`GraloraModel`: switching, inspection, merging, and the interface of PEFT's and transformers' models."""
