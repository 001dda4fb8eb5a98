"""What `panfpn-fast demo` does: the shipped network on its samples, comparisons of speed, and a training run."""
