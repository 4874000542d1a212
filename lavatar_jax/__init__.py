"""Live Avatar in JAX: a talking avatar streamed from one photo, a prompt and speech."""

__version__ = "0.1.0"
