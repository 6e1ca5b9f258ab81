"""Triton kernels for what torch does in several passes over memory on an accelerator. A CPU needs none of them."""
