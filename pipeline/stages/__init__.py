"""The stages of the chain: each turns upstream artifacts into one of its own."""
