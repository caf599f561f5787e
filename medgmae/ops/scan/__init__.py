"""The selective scan of a state space, with gradients."""
