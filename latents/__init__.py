"""Images to latents and back: the VAE, image folders, the sharded latent store and its loader."""
