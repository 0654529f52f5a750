"""The recipe of the tiny Wan in shared/tiny: drawn clips, a VAE, a DiT, and a model card of what was measured."""
