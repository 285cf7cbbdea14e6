"""RLEF: reinforcement learning of code language models with execution feedback."""
