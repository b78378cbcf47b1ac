"""The diffusion transformer, the operators that can be grafted into it, and the choice between them."""
