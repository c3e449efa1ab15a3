"""Training: a stock `transformers` model, weighted domains in, a stock Hugging Face folder out."""
