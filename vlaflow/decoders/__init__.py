"""Decoders turn an encoded observation into actions: a token codec, a stack and a flow."""
