"""Conditional diffusion and efficient model adaptation: derived, proved and built from scratch in PyTorch.

One module per chapter, made from the chapter's notebook. Import what you need:
`from lecture26.ddpm import Diffusion`.
"""
