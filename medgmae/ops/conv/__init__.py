"""The causal convolution of Mamba, with gradients."""
