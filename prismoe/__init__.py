"""prismoe turns a dense decoder checkpoint into a Mixture-of-Experts model in a standard architecture."""
