"""Any model as a causal language model of transformers: what judges and trainers of that library can be handed."""
