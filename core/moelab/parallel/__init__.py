"""One run on many processes: torch.distributed, FSDP2 and expert parallelism, applied to a model from outside."""
