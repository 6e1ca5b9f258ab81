"""What serves a problem better than torch's own: triton kernels on an accelerator, oneDNN's fp32 products on a CPU."""
