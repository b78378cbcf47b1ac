"""The diffusion transformer, the operators grafted into it, and the choice between them."""
