"""Decoders that papers compare with, on the same backbone: FAST autoregression, masked diffusion, a plain flow."""
